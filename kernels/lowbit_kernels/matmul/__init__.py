"""Linear layers with low-bit weights: one op, its reference, its kernels."""

from lowbit_kernels.matmul.op import low_bit_linear
from lowbit_kernels.matmul.reference import linear_reference

__all__ = ["linear_reference", "low_bit_linear"]
