"""What ``torch.utils.flop_counter`` counts for the training linear layer, once this is imported.

A module of its own because the counter imports Triton, which ``import lowbit_kernels`` must not.

Dimension key: M rows of the input, N output features, K input features.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from lowbit_kernels.fake_quant import linear_op as _linear_op  # noqa: F401  (defines the ops)

Shape = Sequence[int]


@register_flop_formula(torch.ops.lowbit.training_linear)
def _forward_flops(x_shape: Shape, weight_shape: Shape, *_: Any, **__: Any) -> int:
    """2 M N K: a multiplication and an addition a weight and row, as PyTorch counts a matmul."""
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.lowbit.training_linear_backward)
def _backward_flops(
    grad_y_shape: Shape, x_shape: Shape, weight_shape: Shape, *args: Any, **kwargs: Any
) -> int:
    """2 M N K for each of dx and dweight that is needed."""
    _, _, _, needs_x, needs_weight, *_ = args
    products = int(needs_x) + int(needs_weight)
    return 2 * math.prod(x_shape) * weight_shape[0] * products
