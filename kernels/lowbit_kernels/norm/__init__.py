"""Normalizations and activations fused with what surrounds them: masks, residuals, quantization."""

from lowbit_kernels.norm.batch_norm_op import masked_batch_norm
from lowbit_kernels.norm.group_norm_op import masked_group_norm
from lowbit_kernels.norm.norm_quantize_op import norm_activation, norm_of_norm, norm_quantize
from lowbit_kernels.norm.reference import (
    masked_group_norm_reference,
    norm_quantize_reference,
)

__all__ = [
    "masked_batch_norm",
    "masked_group_norm",
    "masked_group_norm_reference",
    "norm_activation",
    "norm_of_norm",
    "norm_quantize",
    "norm_quantize_reference",
]
