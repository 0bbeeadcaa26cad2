"""Low-bit matrix products in the attention modules of a model."""

from torch import nn

from lowbit_kernels.conversion.registry import ATTENTIONS
from lowbit_kernels.formats.config import ATTENTION_BITS
from lowbit_kernels.modules.low_bit_matmuls import NAME, LowBitMatmuls


def find_attention(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that can attend in low bits.

    Raises:
        ValueError: if there are none.
    """
    found = [module for each in ATTENTIONS for module in each.find(model)]
    if not found:
        raise ValueError(
            "attention_matmuls must be None for a model without attention modules that this "
            f"library serves, got a {type(model).__name__}"
        )
    return found


def add_matmuls(model: nn.Module, kind: str | None, quantizer: str = "lsq") -> None:
    """Give the attention modules of a model low-bit products, unless they have some, in place.

    Args:
        model: any module.
        kind: ``QuantConfig.attention_matmuls``.
        quantizer: of their scales.

    Raises:
        ValueError: if there are no such modules.
    """
    if kind is None:
        return
    for attention in find_attention(model):
        if NAME not in attention._modules:
            device = next(attention.parameters()).device
            attention.add_module(NAME, LowBitMatmuls(ATTENTION_BITS[kind], quantizer, device))
    for each in ATTENTIONS:
        if each.find(model):
            each.use(model)


def matmuls_of(model: nn.Module) -> str | None:
    """The ``QuantConfig.attention_matmuls`` of a model."""
    bits = {module.bits for module in model.modules() if isinstance(module, LowBitMatmuls)}
    return next((kind for kind, number in ATTENTION_BITS.items() if number in bits), None)


def remove_matmuls(model: nn.Module) -> None:
    """Undo ``add_matmuls``."""
    for module in model.modules():
        module._modules.pop(NAME, None)
