"""What integrations add to a conversion, without conversion knowing any model library.

An *adapter* makes a module that reads its layers' weights directly call the layers instead. A
*finisher* tells the model's own library that the model is quantized.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lowbit_kernels.formats import QuantConfig


@dataclass(frozen=True)
class Adapter:
    """Stands in for modules of one kind.

    Args:
        matches: whether a module is of the kind; looks at class names, imports nothing.
        adapt: changes the module so that it calls its layers; returns the module to use, the same
            one or another.
        restore: undoes ``adapt`` for ``dequantize``.
    """

    matches: Callable[[nn.Module], bool]
    adapt: Callable[[nn.Module], nn.Module]
    restore: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class AttentionModules:
    """Attention modules that call ``modules.attend``.

    Args:
        find: those of a model; changes nothing.
        use: makes the model call them.
    """

    find: Callable[[nn.Module], list[nn.Module]]
    use: Callable[[nn.Module], None]


ADAPTERS: list[Adapter] = []
ATTENTIONS: list[AttentionModules] = []
# adapters that must act before a plan is made: they turn raw weights into layers, or make a module
# call the layers that calibration watches
EXPOSERS: list[Adapter] = []
# each finds input offsets [C] of a model's convolutions (``QuantSpec.input_offset``); the model is
# in eval mode, without gradients, while it does
OFFSETS: list[Callable[[nn.Module], dict[nn.Module, Tensor]]] = []
# each returns a remark for the report, or None
FINISHERS: list[Callable[[nn.Module, QuantConfig | None], str | None]] = []


def finish(model: nn.Module, config: QuantConfig | None) -> list[str]:
    """Run every finisher; ``config=None`` says that the model is in float again.

    Returns:
        Remarks for the report.
    """
    return [note for finisher in FINISHERS if (note := finisher(model, config))]
