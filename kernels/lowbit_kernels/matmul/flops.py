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
from lowbit_kernels.matmul.op import PACKED

_ops = torch.ops.lowbit
# a packed weight, which its integers open, closes the arguments of every op
_QWEIGHT = -len(PACKED.split(","))
_K = _QWEIGHT + PACKED.split(", ").index("int K")


@register_flop_formula(
    [_ops.linear, _ops.linear_train, _ops.linear_with_stats, _ops.linear_normed, _ops.linear_int8]
)
def _forward_flops(x_shape: Sequence[int], *args: Any, **_: Any) -> int:
    """2 M N K: a multiplication and an addition a weight and row, as PyTorch counts a matmul."""
    return 2 * math.prod(x_shape) * int(args[_QWEIGHT][0])


@register_flop_formula(_ops.linear_backward)
def _backward_flops(grad_y_shape: Sequence[int], *args: Any, **_: Any) -> int:
    """2 M N K for dx; the weight is frozen."""
    return 2 * math.prod(grad_y_shape[:-1]) * int(args[_QWEIGHT][0] * args[_K])
