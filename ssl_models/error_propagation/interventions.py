"""Changes to a model for the length of a ``with``: parts of another one, or noise.

Dimension key: B draws of one utterance, T frames, C channels.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def swapped(model: nn.Module, donor: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """``model`` with the modules of these dotted names taken from ``donor``."""
    places = [(*_place(model, name), donor.get_submodule(name)) for name in names]
    own = [model.get_submodule(name) for name in names]
    try:
        for parent, child, module in places:
            parent._modules[child] = module
        yield
    finally:
        for (parent, child, _), module in zip(places, own, strict=True):
            parent._modules[child] = module


@contextlib.contextmanager
def noisy(
    model: nn.Module, levels: Mapping[str, float], seed: int, *, times: float = 1.0
) -> Iterator[None]:
    """``model`` with Gaussian noise added to what modules give.

    Args:
        model: what is changed.
        levels: signal to noise in decibels by the module's dotted name. It holds exactly, for each
            utterance and draw.
        seed: of the noise. That of a module depends on the seed and its name alone, so that it is
            the same whether other modules have noise as well; the draws of a batch differ.
        times: what the noise is multiplied by, after its level was set.
    """
    with contextlib.ExitStack() as hooks:
        for name, level in levels.items():
            factor = times * 10 ** (-level / 20)
            hook = partial(_add_noise, (seed, *name.encode()), factor)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
        yield


def _add_noise(
    key: tuple[int, ...], factor: float, module: nn.Module, args: tuple[Any, ...], output: Any
) -> Any:
    if isinstance(output, tuple):
        return _add_noise(key, factor, module, args, output[0]), *output[1:]
    # numpy's seeds take any number of integers
    import numpy as np

    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(output.shape, generator=generator).to(output)
    return output + noise * (factor * _norm(output) / _norm(noise))


def _norm(x: Tensor) -> Tensor:
    """Of each utterance [B, ...]: [B, 1, 1]."""
    norms: Tensor = x.flatten(1).norm(dim=1)
    return norms[:, None, None]


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, child = name.rpartition(".")
    return model.get_submodule(parent), child
