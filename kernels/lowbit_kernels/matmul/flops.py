"""What ``torch.utils.flop_counter`` counts for the linear ops, once this module is imported.

A module of its own because the counter imports Triton, which ``import lowbit_kernels`` must not.

Dimension key: M rows of the input, N output features, K input features.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from lowbit_kernels.matmul import folded_op as _folded_op  # noqa: F401  (defines the ops)
from lowbit_kernels.matmul import int8_op as _int8_op  # noqa: F401  (defines the op)
from lowbit_kernels.matmul import op as _op  # noqa: F401  (defines the ops)


@register_flop_formula(torch.ops.lowbit.linear_int8)
def _linear_int8_flops(
    q_shape: Sequence[int],
    q_scale_shape: Any,
    bias_shape: Any,
    residual_shape: Any,
    epilogue: str | None,
    dtype: Any,
    out_scale_shape: Any,
    qweight_shape: Sequence[int],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """2 M N K, of integers."""
    return 2 * math.prod(q_shape) * qweight_shape[0]


@register_flop_formula(torch.ops.lowbit.linear_normed)
def _linear_normed_flops(
    x_shape: Sequence[int],
    stats_shape: Any,
    weight_sum_shape: Any,
    eps: float,
    bias_shape: Any,
    residual_shape: Any,
    epilogue: str | None,
    qweight_shape: Sequence[int],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """2 M N K, as without the norm."""
    return 2 * math.prod(x_shape) * qweight_shape[0]


@register_flop_formula(
    [
        torch.ops.lowbit.linear,
        torch.ops.lowbit.linear_train,
        torch.ops.lowbit.linear_with_stats,
    ]
)
def _linear_flops(
    x_shape: Sequence[int],
    bias_shape: Any,
    residual_shape: Any,
    epilogue: str | None,
    qweight_shape: Sequence[int],
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """2 M N K: a multiplication and an addition a weight and row, as PyTorch counts a matmul."""
    return 2 * math.prod(x_shape) * qweight_shape[0]


@register_flop_formula(torch.ops.lowbit.linear_backward)
def _linear_backward_flops(
    grad_y_shape: Sequence[int],
    preactivation_shape: Any,
    epilogue: str | None,
    needs_bias_grad: bool,
    qweight_shape: Sequence[int],
    scale_shape: Any,
    group_scale_shape: Any,
    zero_point_shape: Any,
    input_scale_shape: Any,
    K: int,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """2 M N K for dx; the weight is frozen."""
    return 2 * math.prod(grad_y_shape[:-1]) * qweight_shape[0] * K
