"""What low_bit_conv1d accepts, checked once before anything runs."""

from torch import Tensor

from lowbit_kernels.checks import (
    check_dtype,
    check_epilogue,
    check_lengths,
    check_like,
    check_weight_inputs,
)
from lowbit_kernels.conv1d.geometry import Geometry, Padding, resolve_padding
from lowbit_kernels.formats import QuantizedWeight


def check_geometry(
    x: Tensor, weight: QuantizedWeight, stride: int, padding: Padding, dilation: int, groups: int
) -> Geometry:
    if not isinstance(weight, QuantizedWeight):
        raise ValueError(f"weight must be a QuantizedWeight, got {type(weight).__name__}")
    if weight.is_depthwise and x.dim() == 3 and not groups == x.shape[1] == weight.N:
        raise ValueError(
            "a depthwise weight needs groups == input channels == output channels, "
            f"got {groups}, {x.shape[1]} and {weight.N}"
        )
    return make_geometry(x, weight.N, weight.K, stride, padding, dilation, groups)


def make_geometry(
    x: Tensor, N: int, K: int, stride: int, padding: Padding, dilation: int, groups: int
) -> Geometry:
    """The geometry of a convolution of x with a weight of N channels of K values."""
    if x.dim() != 3:
        raise ValueError(f"x must be [B, C, T], got shape {tuple(x.shape)}")
    for name, value in (("stride", stride), ("dilation", dilation), ("groups", groups)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    C = x.shape[1]
    if C % groups or N % groups:
        raise ValueError(f"groups must divide the channels, got {groups} for {C} in and {N} out")
    if C == 0 or K % (C // groups):
        raise ValueError(
            f"x has {C} channels in {groups} groups, which do not fit a weight of "
            f"{K} values an output channel"
        )
    kernel_size = K // (C // groups)
    left, right = resolve_padding(padding, kernel_size, stride, dilation)
    geometry = Geometry(kernel_size, stride, left, right, dilation, groups)
    if x.shape[2] + left + right < geometry.span:
        raise ValueError(
            f"x must have at least {geometry.span} frames, padding included, for kernel size "
            f"{kernel_size} and dilation {dilation}, got {x.shape[2]} + {left} + {right}"
        )
    return geometry


def check_tensors(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    geometry: Geometry,
    epilogue: str | None,
) -> None:
    N = weight.N
    check_weight_inputs(weight, (None, "int8"))
    check_dtype("x", x)
    check_epilogue(epilogue, N)
    if weight.qweight.device != x.device:
        raise ValueError(
            f"x and weight must share a device, got {x.device} and {weight.qweight.device}"
        )
    B, T_out = x.shape[0], geometry.frames_out(x.shape[2])
    N_out = N // 2 if epilogue == "glu" else N
    check_like("bias", bias, (N,), x.dtype, x)
    check_like("residual", residual, (B, N_out, T_out), x.dtype, x)
    check_lengths(lengths, x)
