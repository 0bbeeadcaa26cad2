"""FLOPs of lowbit::conv1d for torch.utils.flop_counter.FlopCounterMode; import it to register them.

Apart from op.py because PyTorch's flop counter imports Triton.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from lowbit_kernels.conv1d import op as op  # the formulas need the ops to exist


@register_flop_formula([torch.ops.lowbit.conv1d, torch.ops.lowbit.conv1d_train])
def _flops(x_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    kernel_size, groups = args[12], args[17]
    y_shape = out_shape if isinstance(out_shape[0], int) else out_shape[0]
    N = args[1][0]  # the scale has a row an output channel
    return int(2 * y_shape[0] * y_shape[2] * N * kernel_size * (x_shape[1] // groups))


@register_flop_formula(torch.ops.lowbit.conv1d_backward)
def _flops_backward(
    grad_y_shape: Any, preactivation_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    kernel_size, groups, C, needs_x = args[9], args[14], args[16], args[18]
    N = args[1][0]
    return int(
        2 * grad_y_shape[0] * grad_y_shape[2] * N * kernel_size * (C // groups) if needs_x else 0
    )
