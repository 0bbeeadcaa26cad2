"""What is quantized in each arm of the experiment."""

import copy
import re
from collections.abc import Mapping, Sequence
from itertools import combinations

from torch import nn

from bench.experiment.models import DigitReader
from lowbit_kernels import QuantConfig, QuantSpec, quantize
from ssl_models.error_propagation.sources import Source, find_sources, modules_of

# bits of weights after training; inputs have 8
WIDTHS = (8, 4, 2)
ALL = "all"
# the names of branches in a layer, by slot
Slots = Mapping[str, Sequence[str]]


def spec_of(weight_bits: int, input_bits: int = 8) -> QuantSpec:
    """Groups of 64 weights at 4 and 2 bits; a scale a channel for 8 and 1, and depthwise."""
    # below 8 bits the scale of inputs is learned
    scale = "token" if input_bits == 8 else "static"
    return QuantSpec(bits=weight_bits, inputs=f"int{input_bits}", input_scale=scale)


def only(names: Sequence[str], spec: QuantSpec) -> QuantConfig:
    """A config that quantizes the modules of these names, or the layers within them, alone."""
    inside = "|".join(map(re.escape, names))
    return QuantConfig(spec, overrides={rf"^(?!(?:{inside})(?:\.|$))": None})


def quantized(model: nn.Module, names: Sequence[str], spec: QuantSpec) -> nn.Module:
    """A copy of a model with the layers within these modules quantized, for inference."""
    donor = copy.deepcopy(model).eval()
    quantize(donor, only(names, spec))
    return donor


def groups_of(model: nn.Module, slots: Slots) -> dict[str, tuple[str, ...]]:
    """Modules by the name of an arm: all sources, and the subsets of slots.

    Slots are X and Y, the first and second place of a Conformer's layer, and F, its feed-forward
    halves.
    """
    sources = find_sources(model)
    found = {}
    for size in range(1, len(slots)):
        for names in combinations(slots, size):
            chosen = [source for source in sources if _slot(source, slots) in names]
            found["".join(names)] = modules_of(chosen)
    found[ALL] = modules_of(sources)
    return found


def _slot(source: Source, slots: Slots) -> str | None:
    branch = source.name.rpartition(".")[2]
    return next((slot for slot, names in slots.items() if branch in names), None)


def front_end_modules(model: DigitReader) -> tuple[str, ...]:
    """What is before the blocks."""
    names = ("feature_extractor", "feature_projection", "encoder.pos_conv_embed")
    known = {name for name, _ in model.speech.named_modules()}
    return tuple(f"speech.{name}" for name in names if name in known)


def storage(model: DigitReader) -> dict[str, float]:
    """Decimal MB of a model by the bits of its branches' weights, the rest in 16 bits.

    The accounting of ``ssl_models.cost``, arXiv 2301.00652's: scales do not count.
    """
    inside = tuple(f"{name}." for name in modules_of(find_sources(model)))
    weights = sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d) and name.startswith(inside)
    )
    rest = sum(each.numel() for each in model.parameters()) - weights
    return {str(bits): (rest * 16 + weights * bits) / 8e6 for bits in (16, 8, 4, 2, 1)}
