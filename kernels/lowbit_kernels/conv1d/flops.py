"""FLOPs of lowbit::conv1d for torch.utils.flop_counter.FlopCounterMode; import it to register them.

Apart from op.py because PyTorch's flop counter imports Triton.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from lowbit_kernels.conv1d import op as op  # the formulas need the ops to exist

# of lowbit::conv1d_backward, after the gradient of the output
_BACKWARD_ARGS, _NEEDS_X = 24, 5


@register_flop_formula(
    [torch.ops.lowbit.conv1d, torch.ops.lowbit.conv1d_train, torch.ops.lowbit.conv1d_backward]
)
def _flops(x_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 M N K, K of a group; of the gradient 2 M N K for dx, as the weight is frozen."""
    # the scale has a row an output channel
    scale, K, is_backward = args[-10], args[-6], len(args) == _BACKWARD_ARGS
    if is_backward and not args[_NEEDS_X]:
        return 0
    y_shape = out_shape if isinstance(out_shape[0], int) else out_shape[0]
    B, _, T_out = x_shape if is_backward else y_shape
    return int(2 * B * T_out * scale[0] * K)
