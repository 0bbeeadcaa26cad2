"""Linear layers with low-bit weights: their ops, the reference, the kernels."""

from lowbit_kernels.matmul.folded_op import low_bit_linear_normed, low_bit_linear_with_stats
from lowbit_kernels.matmul.int8_op import low_bit_linear_int8
from lowbit_kernels.matmul.op import low_bit_linear
from lowbit_kernels.matmul.reference import linear_reference, norm_columns, row_statistics

__all__ = [
    "linear_reference",
    "low_bit_linear",
    "low_bit_linear_int8",
    "low_bit_linear_normed",
    "low_bit_linear_with_stats",
    "norm_columns",
    "row_statistics",
]
