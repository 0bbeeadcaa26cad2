"""FLOPs of the convolutions for torch.utils.flop_counter.FlopCounterMode; import to register them.

Apart from the ops because PyTorch's flop counter imports Triton.
"""

import json
import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# the formulas need the ops to exist
from lowbit_kernels.conv1d import depthwise_op as depthwise_op
from lowbit_kernels.conv1d import front_end as front_end
from lowbit_kernels.conv1d import op as op
from lowbit_kernels.conv1d import training_op as training_op

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


@register_flop_formula(torch.ops.lowbit.training_conv1d)
def _training_flops(
    x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """2 a weight and output frame, as PyTorch counts a convolution."""
    B, _, T_out = out_shape[0]
    return int(2 * B * T_out * math.prod(weight_shape))


@register_flop_formula(torch.ops.lowbit.training_conv1d_backward)
def _training_flops_backward(
    grad_y_shape: Any, x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any
) -> int:
    """As much for each of dx and dweight that is needed."""
    B, _, T_out = grad_y_shape
    products = int(args[3]) + int(args[4])
    return int(2 * B * T_out * math.prod(weight_shape) * products)


@register_flop_formula(torch.ops.lowbit.depthwise_conv1d_norm)
def _depthwise_flops(
    x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """2 a tap and output value."""
    return int(2 * math.prod(out_shape[0]) * weight_shape[0])


@register_flop_formula(torch.ops.lowbit.front_end)
def _front_end_flops(x_shape: Any, _lengths: Any, _tensors: Any, layout: str, **__: Any) -> int:
    """2 a weight and output frame of every layer."""
    (B, frames), channels, flops = x_shape, 1, 0
    for layer in json.loads(layout):
        frames = (frames - layer["taps"]) // layer["stride"] + 1
        flops += 2 * B * frames * layer["N"] * layer["taps"] * channels
        channels = layer["N"]
    return flops
