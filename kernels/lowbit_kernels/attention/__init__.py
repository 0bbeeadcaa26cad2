"""Bidirectional self-attention with key lengths, a local window and a position bias."""

from lowbit_kernels.attention.op import flash_attention
from lowbit_kernels.attention.position import DenseBias
from lowbit_kernels.attention.reference import flash_attention_reference

__all__ = ["DenseBias", "flash_attention", "flash_attention_reference"]
