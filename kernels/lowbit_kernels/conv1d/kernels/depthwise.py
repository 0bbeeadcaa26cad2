"""Depthwise convolution by a rolling register window, forward and gradient of the input.

Dimension key: B batch, C channels, T frames read, T_out frames written.

A program owns BLOCK_C channels and WINDOW output frames. It walks over the taps; each step loads
one new input frame and one row of weights and updates all WINDOW sums, so an input is loaded
(taps + WINDOW) / WINDOW times an output, not once a tap. Frames and taps are stepped so that this
holds for every stride and dilation: outputs ``base + OUT_STEP * i`` and taps
``phase + TAP_STEP * q`` meet in the frame ``first + LEAP * (i + q)``.

The gradient of the input is the same walk with the taps flipped over an output gradient that has
UPSAMPLE - 1 zeros between its frames (UPSAMPLE is the stride of the forward).
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.epilogue_kernel import activate

WINDOW = 8
BLOCK_C = 64


@triton.jit
def _load_frame(
    x_ptr, frame, limit, offs_c, mask_c, stride_xt, UPSAMPLE: tl.constexpr, ACC: tl.constexpr
):
    # a vector, though all its values are equal: the interpreter cannot mask with a scalar
    frames = frame + tl.zeros_like(offs_c)
    mask = mask_c & (frames >= 0) & (frames < limit)
    row = frame.to(tl.int64)
    if UPSAMPLE > 1:
        mask = mask & (frames % UPSAMPLE == 0)
        row = row // UPSAMPLE
    return tl.load(x_ptr + row * stride_xt + offs_c, mask=mask, other=0).to(ACC)


@triton.jit
def _step(
    acc, window, x_ptr, level_ptr, frame, limit, tap, C, offs_c, mask_c, stride_xt,
    UPSAMPLE: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    x = _load_frame(x_ptr, frame, limit, offs_c, mask_c, stride_xt, UPSAMPLE, ACC)
    w = tl.load(level_ptr + tap * C + offs_c, mask=mask_c, other=0).to(ACC)
    window += (x,)  # type: ignore[assignment]
    updated = ()
    for i in tl.static_range(WINDOW):
        updated += (acc[i] + window[i] * w,)  # type: ignore[assignment]
    return updated, window[1:]


@triton.jit
def _add_phase(
    acc, x_ptr, level_ptr, first, limit, C, offs_c, mask_c, stride_xt,
    PHASE: tl.constexpr, TAPS: tl.constexpr, TAP_STEP: tl.constexpr, LEAP: tl.constexpr,
    UPSAMPLE: tl.constexpr, FLIP: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    steps: tl.constexpr = (TAPS - PHASE + TAP_STEP - 1) // TAP_STEP
    # whole turns of the window loop at run time, which keeps compiling short
    whole: tl.constexpr = steps // WINDOW * WINDOW
    window = ()
    for i in tl.static_range(WINDOW - 1):
        x = _load_frame(x_ptr, first + LEAP * i, limit, offs_c, mask_c, stride_xt, UPSAMPLE, ACC)
        window += (x,)  # type: ignore[assignment]
    for start in range(0, whole, WINDOW):
        for j in tl.static_range(WINDOW):
            tap = PHASE + TAP_STEP * (start + j)
            acc, window = _step(
                acc, window, x_ptr, level_ptr, first + LEAP * (WINDOW - 1 + start + j), limit,
                TAPS - 1 - tap if FLIP else tap, C, offs_c, mask_c, stride_xt,
                UPSAMPLE, WINDOW, ACC,
            )  # fmt: skip
    for q in tl.static_range(whole, steps):
        acc, window = _step(
            acc, window, x_ptr, level_ptr, first + LEAP * (WINDOW - 1 + q), limit,
            TAPS - 1 - PHASE - TAP_STEP * q if FLIP else PHASE + TAP_STEP * q, C,
            offs_c, mask_c, stride_xt, UPSAMPLE, WINDOW, ACC,
        )  # fmt: skip
    return acc


# a new length must not compile again
@triton.jit(do_not_specialize=["T", "T_out", "chunks", "left"])
def _depthwise_conv1d_kernel(
    x_ptr, level_ptr, scale_ptr, input_scale_ptr, bias_ptr, residual_ptr, lengths_ptr,
    y_ptr, z_ptr,
    T, T_out, C, chunks, stride_xb, stride_xt, left,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, UPSAMPLE: tl.constexpr,
    OUT_STEP: tl.constexpr, TAP_STEP: tl.constexpr, FLIP: tl.constexpr, EPILOGUE: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.int32 if input_scale_ptr is not None else tl.float32
    batch = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    base = chunk // OUT_STEP * (WINDOW * OUT_STEP) + chunk % OUT_STEP
    x_ptr += batch.to(tl.int64) * stride_xb
    limit = T
    if lengths_ptr is not None and not FLIP:
        limit = tl.minimum(T, tl.load(lengths_ptr + batch).to(tl.int32))

    acc = ()
    for _ in tl.static_range(WINDOW):
        acc += (tl.zeros((BLOCK_C,), dtype=ACC),)  # type: ignore[assignment]
    for phase in tl.static_range(TAP_STEP):
        acc = _add_phase(
            acc, x_ptr, level_ptr, base * STRIDE + phase * DILATION - left, limit,
            C, offs_c, mask_c, stride_xt,
            phase, TAPS, TAP_STEP, STRIDE * OUT_STEP, UPSAMPLE, FLIP, WINDOW, ACC,
        )  # fmt: skip

    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    if input_scale_ptr is not None:
        scale = scale * tl.load(input_scale_ptr + batch)
    bias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    kept = T_out
    if lengths_ptr is not None and FLIP:
        kept = tl.load(lengths_ptr + batch).to(tl.int32)
    for i in tl.static_range(WINDOW):
        t = base + OUT_STEP * i
        offs = (batch.to(tl.int64) * T_out + t) * C + offs_c
        mask = mask_c & (t + tl.zeros_like(offs_c) < T_out)
        z = acc[i].to(tl.float32) * scale + bias
        if z_ptr is not None:
            tl.store(z_ptr + offs, z, mask=mask)
        y = activate(z, EPILOGUE, y_ptr.dtype.element_ty.primitive_bitwidth < 32)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        # where, not a product: a masked gradient is 0 even where the sum is infinite
        tl.store(y_ptr + offs, tl.where(t < kept, y, 0.0), mask=mask)


def depthwise_conv1d_triton(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    geometry: Geometry,
    epilogue: str | None,
    y: Tensor,
    preactivation: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> None:
    """Convolve x [B, T, C] (channels adjacent) into y [B, T_out, C] and the pre-activation.

    ``residual`` is contiguous like y. With ``input_scale`` [B] x holds int8 integers.
    """
    _launch(x, weight, bias, residual, lengths, geometry, epilogue, y, preactivation, input_scale)


def depthwise_conv1d_dx_triton(
    dz: Tensor, weight: QuantizedWeight, lengths: Tensor | None, geometry: Geometry, dx: Tensor
) -> None:
    """Gradient of the input: dx [B, T, C] from dz [B, T_out, C] (channels adjacent)."""
    flipped = Geometry(
        geometry.kernel_size, 1, geometry.span - 1 - geometry.left, 0, geometry.dilation
    )
    _launch(
        dz, weight, None, None, lengths, flipped, None, dx, None, None,
        flip=True, upsample=geometry.stride,
    )  # fmt: skip


def _launch(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    geometry: Geometry,
    epilogue: str | None,
    y: Tensor,
    preactivation: Tensor | None,
    input_scale: Tensor | None,
    flip: bool = False,
    upsample: int = 1,
) -> None:
    (B, T_out, C), T = y.shape, x.shape[1]
    if y.numel() == 0:
        return
    assert x.stride(2) == 1 or x.shape[2] == 1, "the caller passes channel-last tensors"
    shared = math.gcd(geometry.stride, geometry.dilation)
    out_step = geometry.dilation // shared
    chunks = triton.cdiv(T_out, WINDOW * out_step) * out_step
    # frames are counted in the zero-stuffed gradient when upsampling
    frames = (T - 1) * upsample + 1
    _depthwise_conv1d_kernel[(B * chunks, triton.cdiv(C, BLOCK_C))](
        x, weight.qweight, weight.scale, input_scale, bias, residual, lengths, y, preactivation,
        frames, T_out, C, chunks, x.stride(0), x.stride(1), geometry.left,
        TAPS=geometry.kernel_size, STRIDE=geometry.stride, DILATION=geometry.dilation,
        UPSAMPLE=upsample, OUT_STEP=out_step, TAP_STEP=geometry.stride // shared, FLIP=flip,
        EPILOGUE=epilogue, WINDOW=WINDOW, BLOCK_C=BLOCK_C,
        num_warps=1,
    )  # fmt: skip
