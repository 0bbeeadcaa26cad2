"""Where errors come from, and where they are measured: the residual branches of blocks."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from lowbit_kernels.modules import QuantizedModule
from ssl_models.module_kinds import BRANCHES, RATES

# kinds of residual branches by their names, here and in transformers; the last one is Whisper's
_KINDS = {name: kind for kind, names in BRANCHES.items() for name in names} | {
    "fc2": "feed_forward"
}
# what a branch has beside it in the block: Whisper's first layer, a Squeezeformer's scale, which
# ``quantize`` makes part of the layer after it
_BESIDE = {
    "fc2": "fc1",
    "self_attn": "self_attn_scale",
    "ffn1": "ffn1_scale",
    "ffn2": "ffn2_scale",
    "conv_module": "conv_scale",
}

_BLOCK = re.compile(r"(?:^|\.)\w*layers\.\d+$")
_OTHER_STACKS = re.compile(r"(?:^|\.)(?:decoder|feature_extractor|adapter)(?:\.|$)")


class Source(NamedTuple):
    """A part of a model that is quantized, or made noisy, alone.

    Attributes:
        kind: ``"attention"``, ``"feed_forward"``, ``"conv"`` or ``"rate"``.
        modules: their dotted names; the last one's output is the branch's.
    """

    kind: str
    modules: tuple[str, ...]

    @property
    def name(self) -> str:
        """The dotted name, for people."""
        return self.modules[-1]


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Dotted names of an encoder's blocks, in the order in which they run.

    Raises:
        ValueError: for a model in which no block is found.
    """
    blocks = tuple(name for name, _ in _blocks(model))
    if not blocks:
        raise ValueError(
            "model must have blocks called layers.0, layers.1, ... with branches called "
            f"{', '.join(_KINDS)}, got a {type(model).__name__}"
        )
    return blocks


def find_sources(model: nn.Module) -> tuple[Source, ...]:
    """The residual branches of all blocks, and what changes the rate between blocks.

    Raises:
        ValueError: as ``find_blocks``.
    """
    find_blocks(model)
    found = []
    for name, block in _blocks(model):
        for child in block._modules:
            if child in _KINDS:
                parts = [part for part in (_BESIDE.get(child), child) if part in block._modules]
                modules = tuple(f"{name}.{part}" for part in parts)
                found.append(Source(_KINDS[child], modules))
    rates = [name for name, _ in model.named_modules() if name.split(".")[-1] in RATES]
    return (*found, *(Source("rate", (name,)) for name in rates))


def modules_of(sources: Sequence[Source]) -> tuple[str, ...]:
    """The names of all their modules."""
    return tuple(name for source in sources for name in source.modules)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        is_block = _BLOCK.search(name) and not _OTHER_STACKS.search(name)
        if is_block and _KINDS.keys() & module._modules.keys():
            yield name, module


def rest_of(donor: nn.Module, sources: Sequence[Source]) -> tuple[str, ...]:
    """The largest modules outside of the sources that hold low-bit layers: the front end.

    A Squeezeformer's changes of the rate are sources.
    """
    taken = modules_of(sources)

    def meets(name: str) -> bool:
        return any(f"{each}.".startswith(f"{name}." if name else "") for each in taken)

    found: list[str] = []
    for name, module in donor.named_modules():
        inside = any(f"{name}.".startswith(f"{each}.") for each in (*taken, *found))
        low_bit = any(isinstance(layer, QuantizedModule) for layer in module.modules())
        if low_bit and not inside and not meets(name):
            found.append(name)
    return tuple(found)
