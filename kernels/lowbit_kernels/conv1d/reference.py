"""What a low-bit convolution means, in plain PyTorch.

Dimension key: B batch, C input channels, N output channels, T input frames, T_out output frames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.reference import (
    INT8_MAX,
    apply_epilogue,
    epilogue_backward_reference,
    int8_scale,
)


def conv1d_reference(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    geometry: Geometry,
    epilogue: str | None = None,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """``epilogue(conv1d(x, W) + bias) + residual``, [B, N_out, T_out]; see ``low_bit_conv1d``."""
    z = preactivation_reference(x, weight, bias, geometry, lengths)
    y = apply_epilogue(z.transpose(1, 2), epilogue).transpose(1, 2)
    return y if residual is None else y + residual


def preactivation_reference(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    geometry: Geometry,
    lengths: Tensor | None = None,
) -> Tensor:
    """``conv1d(x, W) + bias``, [B, N, T_out], in the dtype of x [B, C, T]."""
    x = mask_frames(x, lengths)
    if weight.spec.inputs is None:
        return convolve(x, conv_weight(weight.dequantize(x.dtype), geometry), bias, geometry)
    q, input_scale = quantize_utterances(x, weight.input_scale)
    # integers below 2 ** 53 are exact in float64, and so are their sums
    sums = convolve(q.double(), conv_weight(weight.integers().double(), geometry), None, geometry)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = sums.to(wide) * (input_scale[:, None] * weight.scale).to(wide)[..., None]
    return (y if bias is None else y + bias.to(wide)[:, None]).to(x.dtype)


def mask_frames(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [B, C, T] with zeros from frame ``lengths[b]`` on."""
    if lengths is None:
        return x
    padded = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
    return x.masked_fill(padded[:, None], 0.0)


def quantize_utterances(x: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize to int8, symmetric, one scale an utterance.

    Args:
        x: [B, C, T], floating point, padded frames zero.
        static_scale: [] fp32, the scale of every utterance instead of its largest magnitude.

    Returns:
        The integers [B, C, T], int8 in [-127, 127], and the scales [B] fp32. Both come from fp32
        arithmetic whatever the dtype of x, so that every backend finds the same integers.
    """
    x = x.float()
    if static_scale is None:
        scale = int8_scale(x.abs().amax((1, 2)))
    else:
        scale = static_scale.float().expand(x.shape[0])
    q = (x * (1 / scale)[:, None, None]).round().clamp(-INT8_MAX, INT8_MAX)
    return q.to(torch.int8), scale


def conv_weight(weight: Tensor, geometry: Geometry) -> Tensor:
    """The tap-major view [N, taps * C / groups] as PyTorch's [N, C / groups, taps]."""
    taps = weight.view(weight.shape[0], geometry.kernel_size, -1)
    return taps.transpose(1, 2)


def conv1d_backward_reference(
    grad_y: Tensor,
    preactivation: Tensor | None,
    weight: QuantizedWeight,
    geometry: Geometry,
    T: int,
    epilogue: str | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, C, T] and of the bias [N]; int8 inputs pass it straight through."""
    z = None if preactivation is None else preactivation.transpose(1, 2)
    grad = epilogue_backward_reference(grad_y.transpose(1, 2), z, epilogue).transpose(1, 2)
    weight_nct = conv_weight(weight.dequantize(grad.dtype), geometry)
    dx = F.conv_transpose1d(
        grad,
        weight_nct,
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    # the transposed convolution starts in the padding and may stop before the last input frame
    dx = F.pad(dx, (-geometry.left, T + geometry.left - dx.shape[2]))
    return mask_frames(dx, lengths), grad.sum((0, 2))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``F.conv1d`` of x [B, C, T] and a weight [N, C / groups, taps]."""
    return F.conv1d(
        F.pad(x, (geometry.left, geometry.right)),
        weight,
        bias,
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )


def convolution_gradients(
    dz: Tensor, frames: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """PyTorch's gradients of padded frames [B, C, T] and of the weight [N, taps * C / groups].

    Args:
        dz: [B, N, T_out].
        frames: [B, C, T].
        weight: [N, taps * C / groups].
        geometry: its padding is in ``frames``.
        needs: which of the two are wanted; the other one is empty.
    """
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dz, frames, conv_weight(weight, geometry), None, [geometry.stride], [0],
        [geometry.dilation], False, [0], geometry.groups, [*needs, False],
    )  # fmt: skip
    empty = dz.new_empty(0)
    dweight = dweight.transpose(1, 2).flatten(1) if needs[1] else empty
    return dx if needs[0] else empty, dweight
