"""Depthwise convolution by a rolling register window, forward and gradient of the input.

Dimension key: B batch, C channels, T frames read, T_out frames written, W frames of a lane.

Frames and taps are stepped so that the window (see ``depthwise_walk.py``) rolls for every stride
and dilation: outputs ``base + OUT_STEP * i`` and taps ``phase + TAP_STEP * q`` meet in the frame
``first + LEAP * (i + q)``. The gradient of the input is the same walk with the taps flipped over an
output gradient that has UPSAMPLE - 1 zeros between its frames (the stride of the forward).

The end may normalize over channels (LayerNorm) and quantize to int8 by a scale a frame; then a
program holds all channels of its frames. A folded BatchNorm is in scale and bias.

Floors and counts for k = 31 on an H200, from data sheet and compiled code, not measured: 4 bytes a
bf16 value, 0.22 cycles of a multiprocessor; 31 multiply-adds, 0.24. The kernel has 75 instructions
a value (0.59 cycles), of which 25 are the end with SiLU and the beginning; with a LayerNorm 95. An
input is read 2.9 times, 1.5 times from beyond the cache that the runs of a program share. 32 frames
a lane would leave 59 instructions, and take a minute to compile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.conv1d.kernels.depthwise_walk import lanes, stack, unstack, walk
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.epilogue_kernel import activate
from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.quantize_kernel import int8_scale, round_to_int8

# sums of int8 products of so many taps are exact in fp32, which multiplies twice as fast as int32
MAX_FP32_TAPS = 2**24 // (127 * 128)
# of a result, from which on a lane has 16 frames: fewer would leave multiprocessors idle
MANY_VALUES = 2**22
_TRITON_DTYPES = {
    torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32,
}  # fmt: skip


@triton.jit
def _normalize(
    z, mask, norm_weight, norm_bias, EPS: tl.constexpr, C: tl.constexpr, LOG2: tl.constexpr
):
    # LayerNorm over channels of a tuple of frames
    frames = stack(z, LOG2)
    frames = tl.where(mask[:, None], frames, 0.0)
    centered = frames - (tl.sum(frames, 0) / C)[None, :]
    centered = tl.where(mask[:, None], centered, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centered * centered, 0) / C + EPS))
    normalized = unstack(centered * rstd[None, :], LOG2)
    y = ()
    for i in tl.static_range(1 << LOG2):
        y += (normalized[i] * norm_weight + norm_bias,)
    return y


@triton.jit
def _token_scales(y, mask, LOG2: tl.constexpr):
    # of each frame, as matmul/quantize_kernel.py has them, [2 ** LOG2]
    frames = stack(y, LOG2)
    magnitudes = tl.where(frames == frames, tl.abs(frames), float("inf"))
    return int8_scale(tl.max(tl.where(mask[:, None], magnitudes, 0.0), 0))


# a new length must not compile again
@triton.jit(do_not_specialize=["T", "T_out", "groups", "left"])
def _depthwise_conv1d_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr,
    residual_ptr, lengths_ptr, out_scale_ptr, y_ptr, z_ptr, y_scale_ptr,
    T, T_out, groups, stride_xb, stride_xt, left,
    C: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    UPSAMPLE: tl.constexpr, FLIP: tl.constexpr, FRAME_SCALE: tl.constexpr,
    EPILOGUE: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
    LOG2: tl.constexpr, OUT_STEP: tl.constexpr, TAP_STEP: tl.constexpr, VEC: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = 1 << LOG2
    batch = (tl.program_id(0) // groups).to(tl.int64)
    run, read_c, offs_c, mask = lanes(C, BLOCK_C, BLOCK, VEC)
    run += tl.program_id(0) % groups * (BLOCK // BLOCK_C)
    t = run // OUT_STEP * (WINDOW * OUT_STEP) + run % OUT_STEP
    limit = T
    if lengths_ptr is not None and not FLIP:
        limit = tl.minimum(T, tl.load(lengths_ptr + batch).to(tl.int32))
    stride_xt *= VEC
    x_ptrs = x_ptr + batch * (stride_xb * VEC) + read_c

    acc = ()
    for _ in tl.static_range(WINDOW):
        acc += (tl.zeros((BLOCK,), dtype=ACC),)
    for phase in tl.static_range(TAP_STEP):
        first = t * STRIDE + phase * DILATION - left
        starts = x_ptrs
        if UPSAMPLE == 1:
            starts += first.to(tl.int64) * stride_xt
        scales = None
        if FRAME_SCALE:
            scales = x_scale_ptr + batch * T + first
        acc = walk(
            acc, starts, scales,
            weight_ptr + (TAPS - 1 - phase if FLIP else phase) * C + read_c,
            stride_xt, -TAP_STEP * C if FLIP else TAP_STEP * C, first, limit,
            (TAPS - phase + TAP_STEP - 1) // TAP_STEP,
            (TAPS - phase + TAP_STEP - 1) // TAP_STEP, STRIDE * OUT_STEP, UPSAMPLE, WINDOW, ACC,
        )  # fmt: skip

    scale = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + read_c)
    if x_scale_ptr is not None and not FRAME_SCALE:
        scale *= tl.load(x_scale_ptr + batch)
    bias = tl.zeros((BLOCK,), dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + read_c).to(tl.float32)
    z = ()
    for i in tl.static_range(WINDOW):
        z += (acc[i].to(tl.float32) * scale + bias,)
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + read_c).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + read_c).to(tl.float32)
        z = _normalize(z, mask, norm_weight, norm_bias, EPS, C, LOG2)

    kept = T_out
    if lengths_ptr is not None and FLIP:
        kept = tl.load(lengths_ptr + batch).to(tl.int32)
    offs = (batch * T_out + t) * C + offs_c
    rows = tl.where(mask, T_out - t, 0)
    y = ()
    for i in tl.static_range(WINDOW):
        inside = rows > OUT_STEP * i
        if z_ptr is not None:
            tl.store(z_ptr + offs + OUT_STEP * i * C, z[i], mask=inside)
        value = activate(z[i], EPILOGUE, DTYPE.primitive_bitwidth < 32)
        if residual_ptr is not None:
            value += tl.load(residual_ptr + offs + OUT_STEP * i * C, mask=inside, other=0.0)
        if FLIP:
            # where, not a product: a masked gradient is 0 even where the sum is infinite
            value = tl.where(t + OUT_STEP * i < kept, value, 0.0)
        if y_ptr.dtype.element_ty == tl.int8:
            # the integers are those of the rounded result
            value = value.to(DTYPE).to(tl.float32)
        y += (value,)
    if y_scale_ptr is not None:
        y_scale = _token_scales(y, mask, LOG2)
        inverses = unstack(tl.broadcast_to(tl.div_rn(1.0, y_scale)[None, :], (BLOCK, WINDOW)), LOG2)
        offs_t = tl.program_id(0) % groups * WINDOW + tl.arange(0, WINDOW)
        tl.store(y_scale_ptr + batch * T_out + offs_t, y_scale, mask=offs_t < T_out)
    elif out_scale_ptr is not None:
        inverse = tl.div_rn(1.0, tl.load(out_scale_ptr)) + tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(WINDOW):
        value = y[i]
        if y_scale_ptr is not None:
            value, _ = round_to_int8(value, inverses[i], CLAMP=False)
        elif out_scale_ptr is not None:
            value, _ = round_to_int8(value, inverse, CLAMP=True)
        tl.store(y_ptr + offs + OUT_STEP * i * C, value, mask=rows > OUT_STEP * i)


def depthwise_conv1d_triton(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    geometry: Geometry,
    epilogue: str | None,
    y: Tensor,
    preactivation: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> None:
    """Convolve x [B, T, C] (channels adjacent) into y [B, T_out, C] and the pre-activation.

    Args:
        x: floating point, or int8 integers with ``input_scale``.
        weight: quantized, or a tensor [taps, C] of any dtype.
        residual: contiguous like y.
        input_scale: fp32, [B] or a scale a frame, [B, T].
        scale: [C] fp32, of the weight; a quantized one has its own.
        norm: weight [C], bias [C] and eps of a LayerNorm before the epilogue.
        dtype: that of the result, which an int8 y is rounded to first; None: that of y.
        out_scale: [] fp32, of an int8 y.
        y_scale: [B, T_out] fp32, written: the scale of each frame of an int8 y.
    """
    levels = weight if isinstance(weight, Tensor) else weight.qweight
    _launch(
        (x, input_scale, levels, scale if isinstance(weight, Tensor) else weight.scale, bias,
         *((None, None) if norm is None else norm[:2]),
         residual, lengths, out_scale, y, preactivation, y_scale),
        geometry, False, 1, epilogue, 0.0 if norm is None else norm[2], dtype or y.dtype,
    )  # fmt: skip


def depthwise_conv1d_dx_triton(
    dz: Tensor,
    weight: QuantizedWeight | Tensor,
    lengths: Tensor | None,
    geometry: Geometry,
    dx: Tensor,
) -> None:
    """Gradient of the input: dx [B, T, C] from dz [B, T_out, C] (channels adjacent)."""
    flipped = Geometry(
        geometry.kernel_size, 1, geometry.span - 1 - geometry.left, 0, geometry.dilation
    )
    levels = weight if isinstance(weight, Tensor) else weight.qweight
    scale = None if isinstance(weight, Tensor) else weight.scale
    _launch(
        (dz, None, levels, scale, *[None] * 4, lengths, None, dx, None, None),
        flipped, True, geometry.stride, None, 0.0, dx.dtype,
    )  # fmt: skip


def _launch(
    tensors: tuple[Tensor | None, ...],
    geometry: Geometry,
    flip: bool,
    upsample: int,
    epilogue: str | None,
    eps: float,
    dtype: torch.dtype,
) -> None:
    x, x_scale, y = tensors[0], tensors[1], tensors[10]
    assert x is not None
    assert y is not None
    (B, T_out, C), T = y.shape, x.shape[1]
    if y.numel() == 0:
        return
    assert x.stride(2) == 1 or C == 1, "the caller passes channel-last tensors"
    stride_b, stride_t = x.stride(0) if B > 1 else 0, x.stride(1)
    norm_weight, y_scale = tensors[5], tensors[12]
    whole_frames = norm_weight is not None or y_scale is not None
    # both ends at once take long to compile for 16 frames
    many = y.numel() >= MANY_VALUES and (norm_weight is None or y_scale is None)
    vec = math.gcd(C, stride_b, stride_t, 4 if whole_frames else 2)
    shared = math.gcd(geometry.stride, geometry.dilation)
    constants, tile = _constants(
        C, vec, whole_frames, many, geometry.kernel_size, geometry.stride,
        geometry.dilation, upsample, flip, x_scale is not None and x_scale.dim() == 2, epilogue,
        eps, dtype, not x.is_floating_point() and x_scale is not None,
    )  # fmt: skip
    (runs, window, block_c), out_step = tile, geometry.dilation // shared
    groups = triton.cdiv(triton.cdiv(T_out, window * out_step) * out_step, runs)
    # frames are counted in the zero-stuffed gradient when upsampling
    frames = (T - 1) * upsample + 1
    _launcher(
        (B * groups, triton.cdiv(C, block_c)),
        (*tensors, frames, T_out, groups, stride_b // vec, stride_t // vec, geometry.left),
        constants,
    )


_launcher = Launcher(_depthwise_conv1d_kernel)


@functools.cache
def _constants(
    C: int,
    vec: int,
    whole_frames: bool,
    many: bool,
    taps: int,
    stride: int,
    dilation: int,
    upsample: int,
    flip: bool,
    frame_scale: bool,
    epilogue: str | None,
    eps: float,
    dtype: torch.dtype,
    is_int8: bool,
) -> tuple[Constants, tuple[int, int, int]]:
    """Constants of a launch, and its tile: runs of a program, frames of a run, channels."""
    shared = math.gcd(stride, dilation)
    # a scale a frame takes registers
    many = many and not frame_scale
    block_c, block, log2, num_warps = (
        frame_tile(C, many) if whole_frames else run_tile(C, vec, many)
    )
    exact = taps <= MAX_FP32_TAPS or not is_int8 or frame_scale
    values: dict[str, Any] = {
        "C": C, "TAPS": taps, "STRIDE": stride, "DILATION": dilation, "UPSAMPLE": upsample,
        "FLIP": flip, "FRAME_SCALE": frame_scale, "EPILOGUE": epilogue, "EPS": eps,
        "DTYPE": _TRITON_DTYPES[dtype], "ACC": tl.float32 if exact else tl.int32, "LOG2": log2,
        "OUT_STEP": dilation // shared, "TAP_STEP": stride // shared, "VEC": vec,
        "BLOCK_C": block_c, "BLOCK": block, "num_warps": num_warps,
    }  # fmt: skip
    return Constants(values), (block // block_c, 1 << log2, block_c)


def run_tile(C: int, vec: int, many: bool) -> tuple[int, int, int, int]:
    """BLOCK_C, BLOCK, LOG2 and num_warps of a pass that treats channels alone: 2 a lane.

    BLOCK_C is what leaves the fewest lanes idle. ``many`` values: 16 frames a lane, else 8.
    """
    block = 256
    sizes = range(-(-min(32, C) // vec) * vec, min(64, C) + 1, vec)
    used = {n: round(C / (-(-C // n) * n) * (block // n * n) / block, 2) for n in sizes}
    return max(sizes, key=lambda n: (used[n], n)), block, 4 if many else 3, 4


def frame_tile(C: int, many: bool) -> tuple[int, int, int, int]:
    """The same of a pass that needs all of its frames' channels, at most 1024: 4 a lane."""
    block = max(128, triton.next_power_of_2(C))
    return block, block, 4 if many else 3, block // 128
