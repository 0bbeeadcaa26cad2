"""Which layer of a model becomes what: decided once, before anything is changed."""

from dataclasses import dataclass

from torch import nn

from lowbit_kernels.conversion.registry import ADAPTERS
from lowbit_kernels.formats import QuantConfig, QuantSpec
from lowbit_kernels.modules import QuantizedModule

# their children are read by weight, not called
_WEIGHT_READERS = (nn.MultiheadAttention,)
_SERVED_INPUTS = (None, "int8")


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer: ``spec`` is ``None`` where it is left alone."""

    name: str
    module: nn.Module
    spec: QuantSpec | None
    reason: str


def is_plain(module: nn.Module) -> bool:
    """Whether a module is exactly nn.Linear or nn.Conv1d, weight norm allowed.

    A subclass may compute something else, so it is left alone.
    """
    kind = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    return kind in (nn.Linear, nn.Conv1d)


def make_plan(model: nn.Module, config: QuantConfig) -> list[Decision]:
    """One decision for every linear layer and convolution, in the model's order.

    Raises:
        NotImplementedError: for input kinds that this version does not compute with.
    """
    for spec in (config.default, *config.overrides.values()):
        if spec is not None and spec.inputs not in _SERVED_INPUTS:
            raise NotImplementedError(
                f"inputs must be one of {_SERVED_INPUTS} in this version, got {spec.inputs!r}"
            )
    readers = {
        id(child)
        for module in model.modules()
        if isinstance(module, _WEIGHT_READERS) and not any(a.matches(module) for a in ADAPTERS)
        for child in module.modules()
    }
    shared = _shared_weights(model)
    plan = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            plan.append(Decision(name, module, None, "quantized already"))
        elif isinstance(module, nn.Linear | nn.Conv1d):
            plan.append(_decide(name, module, config, readers, shared))
    return plan


def _decide(
    name: str, module: nn.Module, config: QuantConfig, readers: set[int], shared: set[int]
) -> Decision:
    spec, rule = config.spec_for(name)
    if spec is None:
        return Decision(name, module, None, rule)
    if id(module) in readers:
        return Decision(name, module, None, "its weight is read by nn.MultiheadAttention")
    if not is_plain(module):
        return Decision(name, module, None, f"{type(module).__name__} is not plain nn")
    if _weight_id(module) in shared:
        return Decision(name, module, None, "its weight is shared with another module")
    if isinstance(module, nn.Conv1d):
        if module.padding_mode != "zeros":
            return Decision(name, module, None, f"padding_mode {module.padding_mode!r}")
        if module.in_channels == 1 and rule == "default":
            return Decision(name, module, None, "one input channel: little to gain")
        if module.groups > 1 and not spec.symmetric:
            return Decision(name, module, None, "grouped convolutions take symmetric weights")
    return Decision(name, module, spec, rule)


def _weight_id(module: nn.Module) -> int:
    # reading a parametrized weight would compute it
    return id(module._parameters.get("weight"))


def _shared_weights(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        (shared if id(weight) in seen else seen).add(id(weight))
    return shared
