"""Low-bit matrix products in the attention modules of a model."""

from typing import Any

from torch import nn

from lowbit_kernels.conversion.registry import ATTENTIONS
from lowbit_kernels.formats import QuantConfig
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


def add_matmuls(model: nn.Module, config: QuantConfig, quantizer: str = "lsq") -> None:
    """Give the attention modules of a model low-bit products, unless they have some, in place.

    Args:
        model: any module.
        config: its ``attention_matmuls`` and ``attention_shift``.
        quantizer: of their scales.

    Raises:
        ValueError: if there are no such modules.
    """
    if config.attention_matmuls is None:
        return
    bits = ATTENTION_BITS[config.attention_matmuls]
    for attention in find_attention(model):
        if NAME not in attention._modules:
            # whichever projection: queries, keys, values and output have one width
            projection = next(m for m in attention.children() if isinstance(m, nn.Linear))
            width = projection.out_features if config.attention_shift else None
            device = next(attention.parameters()).device
            attention.add_module(NAME, LowBitMatmuls(bits, quantizer, device, width))
    for each in ATTENTIONS:
        if each.find(model):
            each.use(model)


def matmuls_of(model: nn.Module) -> dict[str, Any]:
    """The ``QuantConfig.attention_matmuls`` and ``attention_shift`` of a model."""
    found = next((module for module in model.modules() if isinstance(module, LowBitMatmuls)), None)
    if found is None:
        return {"attention_matmuls": None, "attention_shift": False}
    kind = next(kind for kind, bits in ATTENTION_BITS.items() if bits == found.bits)
    return {"attention_matmuls": kind, "attention_shift": found.shift is not None}


def remove_matmuls(model: nn.Module) -> None:
    """Undo ``add_matmuls``."""
    for module in model.modules():
        module._modules.pop(NAME, None)
