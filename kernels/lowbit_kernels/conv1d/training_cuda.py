"""A training convolution on CUDA: which kernels serve it, forward and backward.

Dimension key: B batch, C input channels, N output channels, T input frames, T_out output frames.
"""

import torch
from torch import Tensor

from lowbit_kernels.conv1d.cuda import convolve_dense, padded_frames, unpadded_gradient
from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.conv1d.kernels.depthwise import (
    depthwise_conv1d_dx_triton,
    depthwise_conv1d_triton,
)
from lowbit_kernels.conv1d.kernels.depthwise_dw import depthwise_conv1d_dw_triton
from lowbit_kernels.conv1d.kernels.grouped import (
    grouped_conv1d_dw_triton,
    grouped_conv1d_dx_triton,
    grouped_conv1d_triton,
)
from lowbit_kernels.conv1d.layout import channel_last
from lowbit_kernels.conv1d.reference import convolution_gradients
from lowbit_kernels.conv1d.runs import conv1d_dw_by_runs, conv1d_dx_by_runs
from lowbit_kernels.fake_quant.linear_cuda import preactivation_gradient_cuda
from lowbit_kernels.matmul.epilogue_kernel import finish_triton

# cuBLAS reaches the matrix units' full rate where rows begin at multiples of 16 bytes
_ALIGNED = 8


def choose_training_kernel(C: int, N: int, geometry: Geometry, dtype: torch.dtype) -> str:
    """What computes a training convolution: a pure function.

    Returns:
        ``"depthwise"`` and ``"grouped"``: kernels of ours; ``"runs"``: cuBLAS over views, where
        the rows that it reads are aligned; ``"torch"``: its own convolution, of fp32 (torch's TF32
        setting applies), of dilated ones and of few channels. PyTorch decides there whether the
        weight's gradient is deterministic.
    """
    if geometry.groups == C == N and C > 1:
        return "depthwise"
    if dtype == torch.float32 or geometry.dilation > 1:
        return "torch"
    if geometry.groups > 1:
        return "grouped"
    return "runs" if geometry.stride * C % _ALIGNED == 0 else "torch"


def training_conv1d_cuda(
    x: Tensor,
    rounded: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    geometry: Geometry,
    epilogue: str | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T_out, N_out] and pre-activations [B, T_out, N], the latter only with ``save``.

    Args:
        x: [B, C, T].
        rounded: [N, taps * C / groups], contiguous, the weight that multiplies, like x.
        bias, residual, lengths, geometry, epilogue: as in ``training_conv1d``.
        save: whether there will be a backward.
    """
    (B, C, T), N = x.shape, rounded.shape[0]
    kernel = choose_training_kernel(C, N, geometry, x.dtype)
    residual = None if residual is None else residual.mT.contiguous()
    if kernel == "depthwise":
        x, weight, glu = channel_last(x), rounded.t().contiguous(), epilogue == "glu"
        y = x.new_empty(B, geometry.frames_out(T), N)
        z = torch.empty_like(y) if save and not glu and epilogue is not None else None
        fused = (None, lengths, geometry, None) if glu else (residual, lengths, geometry, epilogue)
        depthwise_conv1d_triton(x, weight, bias, *fused, y, z)
        if not glu:
            return y, y if z is None else z
        z, bias = y, None
    elif kernel == "grouped":
        z, bias = grouped_conv1d_triton(channel_last(x), rounded, bias, lengths, geometry), None
    else:
        frames = padded_frames(channel_last(x), lengths, geometry)
        z = convolve_dense(frames, rounded, None, geometry, kernel == "runs")
    if bias is None and epilogue is None and residual is None:
        return z, z
    parts, rows = z.flatten(0, 1)[None], None if residual is None else residual.flatten(0, 1)
    seen = None
    if save and bias is not None and epilogue is not None:  # else it is there already, or not asked
        z = torch.empty_like(z)
        seen = z.flatten(0, 1)
    y = finish_triton(parts, None, None, bias, rows, epilogue, z.dtype, seen)
    return y.view(*z.shape[:2], -1), z


def training_gradients_cuda(
    grad_y: Tensor,
    x: Tensor,
    rounded: Tensor,
    z: Tensor | None,
    lengths: Tensor | None,
    geometry: Geometry,
    epilogue: str | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [B, T, C], the weight [N, taps * C / groups] and the bias [N].

    Args:
        grad_y: [B, N_out, T_out].
        x: [B, C, T].
        rounded: [N, taps * C / groups], contiguous, the weight that multiplied.
        z: [B, N, T_out], pre-activations; None without an epilogue.
        lengths, geometry, epilogue: as in ``training_conv1d``.
        needs: which of the three are wanted; the others are empty.
    """
    (B, C, T), N, (needs_x, needs_weight, needs_bias) = x.shape, rounded.shape[0], needs
    dz, dbias = preactivation_gradient_cuda(
        grad_y.mT, None if z is None else z.mT, epilogue, needs_bias
    )
    dz = dz.contiguous().view(B, grad_y.shape[2], N)
    kernel = choose_training_kernel(C, N, geometry, x.dtype)
    dx = dweight = x.new_empty(0)
    if kernel == "depthwise":
        if needs_x:
            dx = x.new_empty(B, T, C)
            depthwise_conv1d_dx_triton(dz, rounded.t().contiguous(), lengths, geometry, dx)
        if needs_weight:
            dweight = depthwise_conv1d_dw_triton(dz, channel_last(x), lengths, geometry).t()
        return dx, dweight, dbias
    if kernel == "grouped":
        if needs_x:
            dx = grouped_conv1d_dx_triton(dz, rounded, lengths, geometry, T)
        if needs_weight:
            dweight = grouped_conv1d_dw_triton(dz, channel_last(x), lengths, geometry)
        return dx, dweight, dbias
    frames = padded_frames(channel_last(x), lengths, geometry)
    if kernel == "runs":
        if needs_weight:
            dweight = conv1d_dw_by_runs(dz, frames, geometry)
        if needs_x:
            dx = conv1d_dx_by_runs(dz, rounded, geometry, frames.shape[1])
    else:
        dx, dweight = convolution_gradients(dz.mT, frames.mT, rounded, geometry, needs[:2])
        dx = dx.mT if needs_x else dx
    return unpadded_gradient(dx, lengths, geometry, T) if needs_x else dx, dweight, dbias
