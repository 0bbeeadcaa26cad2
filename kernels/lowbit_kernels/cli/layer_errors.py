"""How much noise each low-bit layer adds, on the inputs that the float model gives it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.modules import QuantizedModule


@dataclass(frozen=True)
class LayerError:
    """One low-bit layer.

    Args:
        name: dotted name in the model.
        spec: how it is quantized.
        weight_sqnr_db: signal to noise of the weight.
        output_sqnr_db: of the layer's output on the float layer's inputs; ``None`` if the float
            model reads the layer's weight instead of calling the layer.
    """

    name: str
    spec: str
    weight_sqnr_db: float
    output_sqnr_db: float | None


class LayerErrors:
    """Compares the layers of two models of one architecture.

    Args:
        wanted: the float model.
        got: the model with low-bit layers.
    """

    def __init__(self, wanted: nn.Module, got: nn.Module) -> None:
        modules = dict(wanted.named_modules())
        self.pairs = {
            name: (modules[name], module)
            for name, module in got.named_modules()
            if isinstance(module, QuantizedModule) and name in modules
        }
        self.powers = dict.fromkeys(self.pairs, (0.0, 0.0))
        self.watched = False

    @contextlib.contextmanager
    def watch_once(self) -> Iterator[None]:
        """Measure outputs while the float model runs inside; the first time only.

        Each low-bit layer runs once more, so all of the audio would take half as long again.
        """
        with contextlib.ExitStack() as hooks:
            for name, (module, _) in () if self.watched else self.pairs.items():
                hooks.enter_context(module.register_forward_hook(partial(self._measure, name)))
            self.watched = True
            yield

    def _measure(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        signal, noise = self.powers[name]
        error = self.pairs[name][1](args[0]).float() - output.float()
        signal += output.float().square().sum().item()
        self.powers[name] = signal, noise + error.square().sum().item()

    def results(self) -> tuple[LayerError, ...]:
        """One entry a layer, in the model's order."""
        found = []
        for name, (module, layer) in self.pairs.items():
            weight = module.weight.detach().float()
            error = layer.weight.detach().as_subclass(Tensor).float() - weight
            signal, noise = self.powers[name]
            found.append(
                LayerError(
                    name,
                    str(layer.spec),
                    _decibels(weight.square().sum().item(), error.square().sum().item()),
                    _decibels(signal, noise) if signal else None,
                )
            )
        return tuple(found)


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return float("inf")
    return round(10 * torch.log10(torch.tensor(signal / noise)).item(), 2)
