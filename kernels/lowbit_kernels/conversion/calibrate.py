"""Static input scales: the largest input each layer sees on calibration clips."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

INT8_MAX = 127


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode and no gradients; afterwards each in the mode that it was in.

    No dropout then draws a random number and no BatchNorm counts what it sees.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def observe_input_scales(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    clips: Iterable[Any],
    offsets: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Run the float model on clips and return one input scale [] fp32 a layer.

    It is max |input| / 127; where the layer has an input offset, max |input - offset| / 127. Inputs
    in fp8, whose precision does not depend on the scale, have room for 3.5 times as much.

    Args:
        model: the float model; every module of it is left in the mode it was in.
        layers: the layers to watch, by name.
        clips: each a tensor (the model's first argument; a 1-D waveform becomes a batch of one) or
            a mapping of keyword arguments.
        offsets: input offsets [C] of convolutions, by name.

    Returns:
        Scales of the layers that were called; a model may hold others.

    Raises:
        ValueError: if there is no clip, something that is none, or a layer that was called and
            never saw a finite, non-zero input.
    """
    largest: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        x = x - offsets[name][:, None].to(x.dtype) if name in offsets else x
        amax = x.abs().amax().float().cpu()
        largest[name] = torch.maximum(largest.get(name, amax), amax)

    count = 0
    with ExitStack() as hooks, evaluating(model):
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(watch, name)))
        for count, clip in enumerate(clips, 1):
            if isinstance(clip, Mapping):
                model(**clip)
            elif isinstance(clip, Tensor) and clip.dim():
                model(clip[None] if clip.dim() == 1 else clip)
            else:
                raise ValueError(
                    "calibration must hold waveforms [S], [B, S] or mappings, "
                    f"got a {type(clip).__name__} at {count - 1}"
                )
    if not count:
        raise ValueError("calibration must hold at least one clip, got none")
    for name, amax in largest.items():
        if not torch.isfinite(amax) or amax == 0:
            raise ValueError(
                f"calibration must give every static layer a finite, non-zero input; "
                f"{name!r} saw a largest magnitude of {amax.item()}"
            )
    return {name: amax / INT8_MAX for name, amax in largest.items()}
