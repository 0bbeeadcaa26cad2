"""Bidirectional self-attention with key lengths, a local window and position schemes."""

from lowbit_kernels.attention.blocks import block_attention
from lowbit_kernels.attention.dispatch import Backend, backend_of
from lowbit_kernels.attention.int8_op import int8_scores_attention
from lowbit_kernels.attention.low_bit_op import low_bit_attention
from lowbit_kernels.attention.op import attend_int8, flash_attention
from lowbit_kernels.attention.packed import flash_attention_packed
from lowbit_kernels.attention.position import (
    BucketedBias,
    DenseBias,
    Position,
    RelativeKey,
    TransformerXL,
)
from lowbit_kernels.attention.reference import flash_attention_reference

__all__ = [
    "Backend",
    "BucketedBias",
    "DenseBias",
    "Position",
    "RelativeKey",
    "TransformerXL",
    "attend_int8",
    "backend_of",
    "block_attention",
    "flash_attention",
    "flash_attention_packed",
    "flash_attention_reference",
    "int8_scores_attention",
    "low_bit_attention",
]
