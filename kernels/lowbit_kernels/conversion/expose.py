"""Modules that read raw weights, made to call layers while a model is planned and converted."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from lowbit_kernels.conversion.registry import EXPOSERS
from lowbit_kernels.conversion.replace import replace_modules
from lowbit_kernels.modules import LowBitMatmuls, QATModule, QuantizedModule

_KEPT = (LowBitMatmuls, QATModule, QuantizedModule)


@contextmanager
def exposed(model: nn.Module, only: Collection[str] | None = None) -> Iterator[None]:
    """Let the registered exposers stand in for the modules they match, in place.

    Whatever holds neither a quantized layer, nor a training twin, nor low-bit products of attention
    at the end, as after a dry run or an error, is put back.

    Args:
        model: any module.
        only: names of layers; modules that hold none of them are left alone. ``None``: no such
            limit.
    """
    replaced = []
    # children first: an exposer may ask what became of them
    for name, module in reversed(list(model.named_modules())):
        for exposer in EXPOSERS:
            if name and _holds(name, only) and exposer.matches(module):
                stand_in = exposer.adapt(module)
                replace_modules(model, {module: stand_in})
                replaced.append((module, stand_in, exposer))
    try:
        yield
    finally:
        for module, stand_in, exposer in replaced:
            if any(isinstance(part, _KEPT) for part in stand_in.modules()):
                continue
            if stand_in is module:
                exposer.restore(module)
            else:
                replace_modules(model, {stand_in: module})


def _holds(name: str, only: Collection[str] | None) -> bool:
    return only is None or any(layer.startswith(f"{name}.") for layer in only)
