"""A low-bit convolution on CUDA: the chosen kernels, one after the other.

Dimension key: B batch, C input channels, N output channels, T input frames, T_out output frames,
M = B * T_out rows of the output.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.conv1d.dispatch import choose_conv1d, choose_kernel
from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.conv1d.kernels.depthwise import (
    depthwise_conv1d_dx_triton,
    depthwise_conv1d_triton,
)
from lowbit_kernels.conv1d.kernels.frames import (
    copy_frames_triton,
    quantize_frames_triton,
    windows,
)
from lowbit_kernels.conv1d.kernels.grouped import grouped_conv1d_dx_triton
from lowbit_kernels.conv1d.layout import channel_first, channel_last
from lowbit_kernels.conv1d.reference import conv_weight
from lowbit_kernels.conv1d.runs import conv1d_by_runs, conv1d_dx_by_runs
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.decode_kernel import dequantize_triton
from lowbit_kernels.matmul.dispatch import DEQUANTIZE_DX_FROM_M, LinearConfig
from lowbit_kernels.matmul.epilogue_kernel import epilogue_backward_triton, finish_triton
from lowbit_kernels.matmul.gpu import gpu_of
from lowbit_kernels.matmul.kernel import linear_triton

Outputs = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class _Call:
    """What the kernels of a forward pass are told besides x; the residual is [B, T_out, N_out]."""

    weight: QuantizedWeight
    bias: Tensor | None
    residual: Tensor | None
    lengths: Tensor | None
    geometry: Geometry
    epilogue: str | None
    want_preactivation: bool

    def finish(self, z: Tensor) -> Tensor:
        """``epilogue(z) + residual`` in one pass: [M, N_out] of z [M, N]."""
        residual = None if self.residual is None else self.residual.flatten(0, 1)
        return finish_triton(z[None], None, None, None, residual, self.epilogue, z.dtype)


def conv1d_cuda(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    geometry: Geometry,
    epilogue: str | None,
    *,
    want_preactivation: bool = False,
) -> Outputs:
    """Outputs [B, N_out, T_out] and, if wanted, pre-activations [B, N, T_out].

    Both lie in channel-last memory. See ``low_bit_conv1d``.
    """
    x = channel_last(x)
    residual = None if residual is None else residual.transpose(1, 2).contiguous()
    B, T_out, spec = x.shape[0], geometry.frames_out(x.shape[1]), weight.spec
    choice = choose_conv1d(
        B * T_out, weight.N // geometry.groups, weight.K, geometry, weight.is_depthwise, spec,
        x.dtype, gpu_of(x.device), epilogue is None and residual is None,
    )  # fmt: skip
    call = _Call(weight, bias, residual, lengths, geometry, epilogue, want_preactivation)
    if isinstance(choice.config, LinearConfig):
        y, z = _matmul(x, call, choice.config)
    elif choice.backend == "depthwise":
        y, z = _depthwise(x, call)
    else:
        y, z = _dequantized(x, call, by_runs=choice.backend == "dequant_cublas")
    y = channel_first(y.view(B, T_out, y.shape[-1]))
    return y, None if z is None else channel_first(z.view(B, T_out, weight.N))


def conv1d_backward_cuda(
    grad_y: Tensor,
    preactivation: Tensor | None,
    weight: QuantizedWeight,
    lengths: Tensor | None,
    geometry: Geometry,
    epilogue: str | None,
    C: int,
    T: int,
    needs_x: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, [B, C, T] in channel-last memory, and of the bias [N]; [0] if not needed."""
    B, N_out, T_out = grad_y.shape
    dy = grad_y.transpose(1, 2).reshape(B * T_out, N_out).contiguous()
    z = None if preactivation is None else preactivation.transpose(1, 2).reshape(-1, weight.N)
    dz, dbias = epilogue_backward_triton(dy, z, epilogue, needs_bias)
    if not needs_x:
        return grad_y.new_empty(0), dbias
    kernel = choose_kernel(
        B * T_out, geometry, weight.is_depthwise, None, dz.dtype, gpu_of(grad_y.device).capability,
        weight.spec.deterministic,
    )  # fmt: skip
    dz = dz.view(B, T_out, weight.N)
    may_run = geometry.groups == geometry.dilation == 1 and not weight.spec.deterministic
    if kernel == "matmul" and may_run and B * T_out >= DEQUANTIZE_DX_FROM_M:
        kernel = "dequant_cublas"
    if kernel.startswith("dequant"):
        by_runs = kernel == "dequant_cublas"
        return _dequantized_dx(dz, weight, lengths, geometry, T, by_runs), dbias
    if kernel == "depthwise":
        dx = torch.empty(B, T, C, dtype=dz.dtype, device=dz.device)
        depthwise_conv1d_dx_triton(dz, weight, lengths, geometry, dx)
    else:
        dense = dequantize_triton(weight, dz.dtype)
        dx = grouped_conv1d_dx_triton(dz, dense, lengths, geometry, T)
    return channel_first(dx), dbias


def _matmul(x: Tensor, call: _Call, config: LinearConfig) -> Outputs:
    """A matmul a group over windows [B, T_out, taps * C / groups] that overlap in memory.

    Of a base model's positional convolution, 4 bits, read off sm_90's code and not measured: a step
    of 64 x 128 x 64 takes 180 instructions a thread and 256 cycles of the matrix unit, of which 48
    of 64 rows count; shared memory and L1 are busy for 432.
    """
    weight, lengths, geometry = call.weight, call.lengths, call.geometry
    (_, T, C), dtype, G, x_scale = x.shape, x.dtype, geometry.groups, None
    if weight.spec.inputs is not None:
        x, x_scale = quantize_frames_triton(
            x, weight.input_scale, lengths, geometry, pad=True, groups=G,
            scale_rows=geometry.frames_out(T),
        )  # fmt: skip
    elif geometry.left or geometry.right or lengths is not None or G > 1 or x.stride(1) != C:
        x = copy_frames_triton(x, lengths, geometry, pad=True, groups=G)
    # a channel and its gate lie in different groups: one more pass
    gates_after = G > 1 and call.epilogue == "glu"
    y, z = linear_triton(
        windows(x, geometry), weight, call.bias,
        None if call.residual is None or gates_after else call.residual.flatten(0, 1),
        None if gates_after else call.epilogue, config, x_scale=x_scale, dtype=dtype,
        want_preactivation=call.want_preactivation and not gates_after, groups=G,
    )  # fmt: skip
    return (call.finish(y), y) if gates_after else (y, z)


def _depthwise(x: Tensor, call: _Call) -> Outputs:
    (B, T, C), dtype, input_scale, lengths = x.shape, x.dtype, None, call.lengths
    weight, geometry = call.weight, call.geometry
    if weight.spec.inputs is not None:
        x, input_scale = quantize_frames_triton(x, weight.input_scale, lengths, geometry, pad=False)
        lengths = None  # the padded integers are zeros already
    y = torch.empty(B, geometry.frames_out(T), C, dtype=dtype, device=x.device)
    # a channel and its gate lie in different tiles: one more pass
    gates_after = call.epilogue == "glu"
    z = torch.empty_like(y) if call.want_preactivation and not gates_after else None
    depthwise_conv1d_triton(
        x, weight, call.bias, None if gates_after else call.residual, lengths, geometry,
        None if gates_after else call.epilogue, y, z, input_scale,
    )  # fmt: skip
    return (call.finish(y.flatten(0, 1)), y) if gates_after else (y, z)


def _dequantized(x: Tensor, call: _Call, by_runs: bool) -> Outputs:
    x = padded_frames(x, call.lengths, call.geometry)
    z = convolve_dense(
        x, dequantize_triton(call.weight, x.dtype), call.bias, call.geometry, by_runs
    )
    if call.epilogue is None and call.residual is None and not call.want_preactivation:
        return z, None
    return call.finish(z.flatten(0, 1)), z


def padded_frames(x: Tensor, lengths: Tensor | None, geometry: Geometry) -> Tensor:
    """x [B, T, C], frames adjacent in memory, with its padding and without what is invalid."""
    if geometry.left or geometry.right or lengths is not None or x.stride(1) != x.shape[2]:
        return copy_frames_triton(x, lengths, geometry, pad=True)
    return x


def unpadded_gradient(dx: Tensor, lengths: Tensor | None, geometry: Geometry, T: int) -> Tensor:
    """The gradient [B, T, C] of frames from that of padded ones; 0 from ``lengths[b]`` on."""
    dx = dx.narrow(1, geometry.left, T)
    if lengths is None and dx.is_contiguous():
        return dx
    return copy_frames_triton(channel_last(dx.mT), lengths, Geometry(1), pad=False)


def convolve_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, by_runs: bool
) -> Tensor:
    """[B, T_out, N] of padded frames [B, T, C] and a weight [N, taps * C / groups], by torch.

    ``by_runs``: by matrix products, one group and no dilation; else by torch's convolution.
    """
    if by_runs:
        return conv1d_by_runs(x, weight, bias, geometry)
    z = F.conv1d(
        x.mT, conv_weight(weight, geometry), bias,
        stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups,
    )  # fmt: skip
    return z.mT.contiguous()


def _dequantized_dx(
    dz: Tensor,
    weight: QuantizedWeight,
    lengths: Tensor | None,
    geometry: Geometry,
    T: int,
    by_runs: bool,
) -> Tensor:
    matrix, T_padded = dequantize_triton(weight, dz.dtype), geometry.left + T + geometry.right
    if by_runs:
        dx = conv1d_dx_by_runs(dz, matrix, geometry, T_padded)
    else:
        dx = F.conv_transpose1d(
            dz.mT, conv_weight(matrix, geometry),
            stride=geometry.stride, dilation=geometry.dilation, groups=geometry.groups,
        )  # fmt: skip
        # the transposed convolution may stop before the last input frame
        dx = F.pad(dx, (0, T_padded - dx.shape[2])).mT
    return channel_first(unpadded_gradient(dx, lengths, geometry, T))
