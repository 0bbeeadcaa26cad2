"""low_bit_conv1d on a CPU, channels last: dense and strided, grouped, depthwise.

Dimension key: B batch, T input frames, C input channels, G groups, M output frames, N output
channels. A group's input is a plane [padded T, C / G], in which the taps of one output frame lie
side by side: the convolution is a matmul over overlapping rows and copies nothing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.cpu import library as lib
from lowbit_kernels.cpu import portable
from lowbit_kernels.cpu.linear import SLACK_BYTES
from lowbit_kernels.cpu.product import ACTIVATIONS, Finish, Rows, check_inputs, multiply
from lowbit_kernels.formats import QuantizedWeight


@dataclass(frozen=True)
class Geometry:
    """Where a convolution's taps fall; padding is (left, right) in frames."""

    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    groups: int = 1

    def out_frames(self, T: int, taps: int) -> int:
        """Output frames of T input frames."""
        return (T + sum(self.padding) - self.dilation * (taps - 1) - 1) // self.stride + 1


def conv1d_cpu(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: str | None = None,
    *,
    geometry: Geometry,
    lengths: Tensor | None = None,
) -> Tensor:
    """``epilogue(conv1d(x, W) + bias) + residual``, channels last.

    With ``inputs="int8"`` each utterance is quantized by one scale, from its valid frames, or by the
    static one.

    Args:
        x: [B, T, C], fp16, bf16, fp32 or fp64; computed in fp32 (fp64 for fp64).
        weight: [N, taps * C / groups], or depthwise with N = C = groups.
        bias: [N] or None.
        residual: [B, M, N] ([B, M, N / 2] for ``glu``) or None.
        epilogue: None, "gelu", "gelu_tanh", "silu", "relu" or "glu".
        geometry: stride, padding, dilation and groups.
        lengths: [B], the valid input frames; later ones count as zero. None: all are valid.

    Returns:
        [B, M, N] ([B, M, N / 2] for ``glu``), in the dtype of x.

    Raises:
        NotImplementedError: for inputs other than None and "int8".
    """
    check_inputs(weight)
    B, T, C = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight.K if weight.is_depthwise else weight.K // (C // geometry.groups)
    width = weight.N // 2 if epilogue == "glu" else weight.N
    y = torch.empty(B, geometry.out_frames(T, taps), width, dtype=x.dtype)
    run = _depthwise if weight.is_depthwise else _dense
    for b in range(B if y.numel() else 0):
        valid = T if lengths is None else min(max(int(lengths[b]), 0), T)
        finish = Finish(bias, epilogue, None if residual is None else residual[b])
        y[b] = run(x[b].to(wide).contiguous(), valid, weight, finish, geometry)
    return y


def _dense(
    x: Tensor, valid: int, weight: QuantizedWeight, finish: Finish, geometry: Geometry
) -> Tensor:
    """One utterance [T, C] to [M, N]."""
    scale = input_scale(x, valid, weight)
    if scale is None:
        planes = _float_planes(x, valid, geometry)
    else:
        planes = quantize_planes(x, valid, scale, geometry)
    taps = weight.K // planes.shape[2]
    M = geometry.out_frames(x.shape[0], taps)
    return multiply(_rows(planes, taps, M, geometry), weight, scale, finish, x.dtype)


def input_scale(x: Tensor, valid: int, weight: QuantizedWeight) -> Tensor | None:
    """The int8 scale [] of one utterance [T, C] over its valid frames; None for float inputs."""
    if weight.spec.inputs is None:
        return None
    if weight.spec.input_scale == "static":
        assert weight.input_scale is not None, "a static spec has its scale"
        return weight.input_scale.float()
    library = lib.native() if x.dtype == torch.float32 else None
    if library is None or valid == 0:
        largest = x[:valid].abs().amax() if valid else x.new_zeros(())
        return portable.scale_of(largest)
    scale = torch.empty(())
    library.shared_scale(
        lib.pointer(x), x.stride(0), valid, x.shape[1], lib.pointer(scale), torch.get_num_threads()
    )
    return scale


def quantize_planes(x: Tensor, valid: int, scale: Tensor, geometry: Geometry) -> Tensor:
    """One utterance [T, C] to padded uint8 planes [G, left + T + right, C / G], zero point 128.

    The planes are followed in memory by a few bytes that may be read.
    """
    (T, C), (left, right), G = x.shape, geometry.padding, geometry.groups
    shape = (G, left + T + right, C // G)
    flat = torch.empty(shape[0] * shape[1] * shape[2] + SLACK_BYTES, dtype=torch.uint8)
    planes = flat[:-SLACK_BYTES].view(shape)
    library = lib.native() if x.dtype == torch.float32 else None
    if library is not None:
        library.quantize_frames(
            lib.pointer(x), x.stride(0), T, valid, G, C // G, left, right,
            lib.pointer(scale), lib.pointer(planes), torch.get_num_threads(),
        )  # fmt: skip
        return planes
    quantized = portable.quantize(x[:valid], scale) + portable.ZERO_POINT
    planes.fill_(portable.ZERO_POINT)
    planes[:, left : left + valid] = quantized.view(valid, G, C // G).transpose(0, 1)
    return planes


def _float_planes(x: Tensor, valid: int, geometry: Geometry) -> Tensor:
    """One utterance [T, C] to padded planes [G, left + T + right, C / G]; x itself where it can be."""
    (T, C), (left, right), G = x.shape, geometry.padding, geometry.groups
    frames = x[:valid]
    if left or right or valid < T:
        frames = F.pad(frames, (0, 0, left, right + T - valid))
    return frames.view(-1, G, C // G).transpose(0, 1).contiguous()


def _rows(planes: Tensor, taps: int, M: int, geometry: Geometry) -> Rows:
    G, T, C = planes.shape
    step = geometry.stride * C
    if geometry.dilation == 1:
        return Rows(planes, M, taps * C, step, G, T * C)
    # taps are apart: gather them
    spread = planes.as_strided(
        (G, M, taps, C), (T * C, step, geometry.dilation * C, 1), planes.storage_offset()
    )
    flat = torch.empty(spread.numel() + SLACK_BYTES, dtype=planes.dtype)
    flat[:-SLACK_BYTES].view(spread.shape).copy_(spread)
    return Rows(flat, M, taps * C, taps * C, G, M * taps * C)


def _depthwise(
    x: Tensor, valid: int, weight: QuantizedWeight, finish: Finish, geometry: Geometry
) -> Tensor:
    """One utterance [T, C] to [M, C]."""
    if finish.epilogue == "glu":
        y = F.glu(_depthwise(x, valid, weight, Finish(finish.bias, None, None), geometry))
        return y if finish.residual is None else y.add_(finish.residual)
    scale = input_scale(x, valid, weight)
    library = lib.native() if x.dtype == torch.float32 else None
    if library is not None:
        return _native_depthwise(library, x, valid, scale, weight, finish, geometry)
    x = F.pad(x[:valid], (0, 0, 0, x.shape[0] - valid))
    if scale is not None:
        x = portable.quantize(x, scale)
    padded = F.pad(x.t(), geometry.padding)[None]
    integers = weight.integers().to(x.dtype)[:, None]
    sums = F.conv1d(padded, integers, None, geometry.stride, 0, geometry.dilation, geometry.groups)[
        0
    ].t()
    total = sums * weight.scale.to(x.dtype) * (1 if scale is None else scale.to(x.dtype))
    total = total if finish.bias is None else total + finish.bias.to(x.dtype)
    y = portable.activate(total, finish.epilogue)
    return y if finish.residual is None else y + finish.residual.to(x.dtype)


def _native_depthwise(
    library: lib.ctypes.CDLL, x: Tensor, valid: int, scale: Tensor | None,
    weight: QuantizedWeight, finish: Finish, geometry: Geometry,
) -> Tensor:  # fmt: skip
    T, C = x.shape
    out = torch.empty(geometry.out_frames(T, weight.K), C)
    bias = None if finish.bias is None else finish.bias.float().contiguous()
    residual = None if finish.residual is None else finish.residual.float().contiguous()
    levels = weight.qweight.float()
    arguments = lib.Depthwise(
        frames=T, valid=valid, channels=C, out_frames=out.shape[0],
        taps=weight.K, stride=geometry.stride, padding=geometry.padding[0],
        dilation=geometry.dilation, x=lib.pointer(x), x_stride=C,
        input_scale=lib.pointer(scale), weight=lib.pointer(levels),
        scale=lib.pointer(weight.scale), bias=lib.pointer(bias),
        residual=lib.pointer(residual), residual_stride=C,
        activation=ACTIVATIONS[finish.epilogue], out=lib.pointer(out), out_stride=C,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    if library.depthwise(arguments):
        raise MemoryError("no memory for the frames of a depthwise convolution")
    return out
