"""Which layer of a model becomes what: decided once, before anything is changed."""

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from lowbit_kernels.conversion.registry import ADAPTERS
from lowbit_kernels.conversion.replace import names_of
from lowbit_kernels.formats import QuantConfig, QuantSpec
from lowbit_kernels.formats.config import DEFAULT_SKIP
from lowbit_kernels.modules import QuantizedModule, check_spec
from lowbit_kernels.modules.base import OP_INPUTS
from lowbit_kernels.modules.conv1d import CONV1D_INPUTS

# their children are read by weight, not called
_WEIGHT_READERS = (nn.MultiheadAttention,)
# hold matrices, too, and are listed so that nobody wonders where the bytes went
_NOT_SERVED = (nn.modules.conv._ConvNd, nn.RNNBase, nn.Embedding, nn.EmbeddingBag, nn.Bilinear)
_PRECEDENCE = ("override", "skip", "default")


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer: ``spec`` is ``None`` where it is left alone.

    ``other_names``: the layer is registered under these, too.
    """

    name: str
    module: nn.Module
    spec: QuantSpec | None
    reason: str
    other_names: tuple[str, ...] = ()


def is_plain(module: nn.Module) -> bool:
    """Whether a module is exactly nn.Linear or nn.Conv1d, weight norm allowed.

    A subclass may compute something else, so it is left alone.
    """
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    return kind in (nn.Linear, nn.Conv1d)


def make_plan(
    model: nn.Module, config: QuantConfig, served: tuple[str | None, ...] = OP_INPUTS
) -> list[Decision]:
    """One decision for every linear layer and convolution, in the model's order.

    Layers of other kinds that hold a matrix are listed as left alone.

    Raises:
        NotImplementedError: for input kinds other than ``served``.
    """
    for spec in (config.default, *config.overrides.values()):
        if spec is not None:
            check_spec("config", spec, served)
    readers = {
        id(child)
        for module in model.modules()
        if isinstance(module, _WEIGHT_READERS) and not any(a.matches(module) for a in ADAPTERS)
        for child in module.modules()
    }
    shared = _shared_weights(model)
    plan = []
    for module, names in names_of(model).items():
        spec = None
        if isinstance(module, QuantizedModule):
            reason = "quantized already"
        elif isinstance(module, nn.Linear | nn.Conv1d):
            spec, reason = _decide(names, module, config, readers, shared)
        elif isinstance(module, _NOT_SERVED):
            reason = f"nn.{_nn_name(module)} is not served"
        else:
            continue
        plan.append(Decision(names[0], module, spec, reason, names[1:]))
    return plan


def unmatched_patterns(plan: list[Decision], config: QuantConfig) -> list[str]:
    """A remark for every override, and every skip but the default ones, that matches no layer."""
    names = [name for decision in plan for name in (decision.name, *decision.other_names)]
    patterns = [("override", pattern) for pattern in config.overrides]
    patterns += [("skip", pattern) for pattern in config.skip if pattern not in DEFAULT_SKIP]
    return [
        f"{kind} {pattern!r} matched no layer"
        for kind, pattern in patterns
        if not any(re.search(pattern, name) for name in names)
    ]


def _decide(
    names: tuple[str, ...],
    module: nn.Module,
    config: QuantConfig,
    readers: set[int],
    shared: set[int],
) -> tuple[QuantSpec | None, str]:
    """The spec of a layer and the reason, from the strongest rule for any of its names."""
    found = [config.spec_for(name) for name in names]
    spec, rule = min(found, key=lambda each: _PRECEDENCE.index(each[1].partition(" ")[0]))
    if spec is None:
        return None, rule
    if id(module) in readers:
        return None, "its weight is read by nn.MultiheadAttention"
    if not is_plain(module):
        return None, f"{type(module).__name__} is not plain nn"
    if _weight_id(module) in shared:
        return None, "its weight is shared with another module"
    if isinstance(module, nn.Conv1d):
        if spec.inputs not in CONV1D_INPUTS:
            return None, f"convolutions take no {spec.inputs} inputs"
        if module.padding_mode != "zeros":
            return None, f"padding_mode {module.padding_mode!r}"
        if module.in_channels == 1 and rule == "default":
            return None, "one input channel: little to gain"
        if module.groups > 1 and not spec.symmetric:
            return None, "grouped convolutions take symmetric weights"
    return spec, rule


def _nn_name(module: nn.Module) -> str:
    """The class of torch.nn that a module is an instance of."""
    kinds = type(module).__mro__
    return next(k.__name__ for k in kinds if k.__module__.startswith("torch.nn.modules"))


def _weight_id(module: nn.Module) -> int:
    # reading a parametrized weight would compute it
    return id(module._parameters.get("weight"))


def _shared_weights(model: nn.Module) -> set[int]:
    weights = (module._parameters.get("weight") for module in model.modules())
    counts = Counter(id(weight) for weight in weights if weight is not None)
    return {weight for weight, count in counts.items() if count > 1}
