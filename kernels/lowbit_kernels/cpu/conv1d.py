"""low_bit_conv1d on a CPU, channels last: dense and strided, grouped, depthwise.

Dimension key: B batch, T input frames, C input channels, G groups, M output frames, N output
channels, N_out N / 2 with ``glu`` and N without. A group's input is a plane [padded T, C / G], in
which the taps of one output frame lie side by side: the convolution is a matmul over overlapping
rows and copies nothing.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.cpu import library as lib
from lowbit_kernels.cpu import portable
from lowbit_kernels.cpu.product import ACTIVATIONS, Finish, Rows, check, multiply, with_slack
from lowbit_kernels.cpu.resident import ZERO_POINT
from lowbit_kernels.formats import QuantizedWeight


@dataclass(frozen=True)
class Window:
    """Which frames a tap reads; padding is (left, right)."""

    taps: int
    stride: int
    padding: tuple[int, int]
    dilation: int
    groups: int

    def frames_out(self, T: int) -> int:
        """Output frames of T input frames."""
        return (T + sum(self.padding) - self.dilation * (self.taps - 1) - 1) // self.stride + 1


def conv1d_cpu(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: str | None = None,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
    groups: int = 1,
    lengths: Tensor | None = None,
) -> Tensor:
    """``epilogue(conv1d(x, W) + bias) + residual``, channels last, computed in fp32.

    With ``inputs="int8"`` each utterance is quantized by one scale, from its valid frames, or by
    the static one.

    Args:
        x: [B, T, C], fp16, bf16 or fp32.
        weight: [N, taps * C / groups], or depthwise with N = C = groups.
        bias: [N] or None.
        residual: [B, M, N_out] or None.
        epilogue: None, "gelu", "gelu_tanh", "silu", "relu" or "glu".
        stride: input frames between two output frames.
        padding: frames of zeros before and after the input.
        dilation: input frames between two taps.
        groups: groups of channels that do not see each other.
        lengths: [B], the valid input frames; later ones count as zero. None: all are valid.

    Returns:
        [B, M, N_out], in the dtype of x.

    Raises:
        NotImplementedError: for inputs other than None and "int8".
    """
    check(x, weight, epilogue)
    B, T, C = x.shape
    taps = weight.K if weight.is_depthwise else weight.K // (C // groups)
    window = Window(taps, stride, padding, dilation, groups)
    run = _depthwise if weight.is_depthwise else _dense
    valid = [T] * B if lengths is None else lengths.clamp(0, T).tolist()
    y = []
    for b in range(B):
        finish = Finish(bias, epilogue, None if residual is None else residual[b])
        layer = partial(run, x[b].float().contiguous(), valid[b], weight, window)
        y.append(finish.run(layer).to(x.dtype))
    if B == 1:
        return y[0][None]
    width = weight.N // 2 if epilogue == "glu" else weight.N
    return torch.stack(y) if y else x.new_empty(0, window.frames_out(T), width)


def _dense(
    x: Tensor, valid: int, weight: QuantizedWeight, window: Window, finish: Finish
) -> Tensor:
    """One utterance [T, C] to [M, N]."""
    scale = input_scale(x, valid, weight)
    if scale is None:
        planes = _float_planes(x, valid, window)
    else:
        planes = quantize_planes(x, valid, scale, window)
    rows = _rows(planes, window.frames_out(x.shape[0]), window)
    return multiply(rows, weight, scale, finish)


def input_scale(x: Tensor, valid: int, weight: QuantizedWeight) -> Tensor | None:
    """The int8 scale [] of one utterance [T, C] over its valid frames; None for float inputs."""
    if weight.spec.inputs is None:
        return None
    if weight.input_scale is not None:
        return weight.input_scale.float()
    library = lib.native()
    if library is None or valid == 0:
        return portable.scale_of(x[:valid].abs().amax() if valid else torch.zeros(()))
    scale = torch.empty(())
    library.shared_scale(lib.pointer(x), valid, x.shape[1], lib.pointer(scale), lib.threads())
    return scale


def quantize_planes(x: Tensor, valid: int, scale: Tensor, window: Window) -> Tensor:
    """One utterance [T, C] to padded uint8 planes [G, left + T + right, C / G], zero point 128."""
    (T, C), (left, right), G = x.shape, window.padding, window.groups
    planes = with_slack((G, left + T + right, C // G), torch.uint8)
    library = lib.native()
    if library is not None:
        library.quantize_frames(
            lib.pointer(x), T, valid, G, C // G, left, right,
            lib.pointer(scale), None, lib.pointer(planes), lib.threads(),
        )  # fmt: skip
        return planes
    quantized = portable.quantize(x[:valid], scale) + ZERO_POINT
    planes.fill_(ZERO_POINT)
    planes[:, left : left + valid] = quantized.view(valid, G, C // G).transpose(0, 1)
    return planes


def _float_planes(x: Tensor, valid: int, window: Window) -> Tensor:
    """One utterance [T, C] to padded planes [G, left + T + right, C / G]; x itself if it can be."""
    (T, C), (left, right), G = x.shape, window.padding, window.groups
    frames = x[:valid]
    if left or right or valid < T:
        frames = F.pad(frames, (0, 0, left, right + T - valid))
    return frames.view(-1, G, C // G).transpose(0, 1).contiguous()


def _rows(planes: Tensor, M: int, window: Window) -> Rows:
    G, T, C = planes.shape
    taps, step = window.taps, window.stride * C
    if window.dilation == 1:
        return Rows(planes, M, taps * C, step, G, T * C)
    # the taps are apart: gather them
    spread = planes.as_strided(
        (G, M, taps, C), (T * C, step, window.dilation * C, 1), planes.storage_offset()
    )
    gathered = with_slack((G, M, taps, C), planes.dtype).copy_(spread)
    return Rows(gathered, M, taps * C, taps * C, G, M * taps * C)


def _depthwise(
    x: Tensor, valid: int, weight: QuantizedWeight, window: Window, finish: Finish
) -> Tensor:
    """One utterance [T, C] to [M, C]."""
    (T, C), scale = x.shape, input_scale(x, valid, weight)
    library = lib.native()
    if library is None:
        x = F.pad(x[:valid], (0, 0, 0, T - valid))
        x = x if scale is None else portable.quantize(x, scale)
        padded, integers = F.pad(x.t(), window.padding)[None], weight.integers().float()[:, None]
        sums = F.conv1d(padded, integers, None, window.stride, 0, window.dilation, window.groups)
        y = sums[0].t() * (weight.scale if scale is None else weight.scale * scale)
        y = portable.activate(y if finish.bias is None else y + finish.bias, finish.epilogue)
        return y if finish.residual is None else y + finish.residual
    out = lib.empty(window.frames_out(T), C)
    levels, channel_scale = weight.qweight.contiguous(), weight.scale.float().contiguous()
    arguments = lib.Depthwise(
        valid=valid, channels=C, out_frames=out.shape[0], taps=window.taps,
        stride=window.stride, padding=window.padding[0], dilation=window.dilation,
        x=lib.pointer(x), input_scale=lib.pointer(scale), weight=lib.pointer(levels),
        scale=lib.pointer(channel_scale), bias=lib.pointer(finish.bias),
        residual=lib.pointer(finish.residual), activation=ACTIVATIONS[finish.epilogue],
        out=lib.pointer(out), threads=lib.threads(),
    )  # fmt: skip
    if library.depthwise(arguments):
        raise MemoryError("no memory for the frames of a depthwise convolution")
    return out
