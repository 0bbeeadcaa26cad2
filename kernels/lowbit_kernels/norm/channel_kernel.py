"""Triton kernels that normalize each channel over valid frames: of one utterance, or of a batch.

Dimension key: B batch, C channels, T frames, S sets of statistics (B, or 1 for a whole batch), E
parts of a set: chunks of ``CHUNK`` frames, or processes.

Either of frames and channels may be adjacent in memory. Floors and estimates for an H200, from data
sheet and compiled code, not measured, for 16-bit inputs whose channels are adjacent, with SiLU: the
passes statistics, result, sums of the backward and dx cost 2, 4, 4 and 6 bytes a value, in which a
multiprocessor at full memory bandwidth issues 12, 25, 25 and 37 instructions; they have 12, 21, 27
and 30. With frames adjacent 16-bit loads are not vectorized, as T need not be even.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.matmul.epilogue_kernel import activate, activation_slope
from lowbit_kernels.norm.levels import empty_channels, is_channel_last

# frames of a program: a constant, so that an utterance's sums do not depend on its padding
CHUNK = 256


@triton.jit
def _load_length(lengths_ptr, b, T):
    if lengths_ptr is None:
        length = T
    else:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), T).to(tl.int32)
    return length


@triton.jit
def _parameter(ptr, offs_c, mask_c):
    return tl.load(ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["T"])
def _statistics_kernel(
    x_ptr, lengths_ptr, moments_ptr,
    T, C, stride_xb, stride_xc, stride_xt,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_C channels of one chunk of one utterance; a mean and a sum of squared
    # deviations of every BLOCK_T-th frame (Welford), and then of all
    chunk, b = tl.program_id(0), tl.program_id(2)
    offs_c, offs_t = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_T)
    mask_c = offs_c < C
    length = _load_length(lengths_ptr, b, T)
    frames = tl.minimum(tl.maximum(length - chunk * CHUNK, 0), CHUNK)
    x_ptr += b.to(tl.int64) * stride_xb + (chunk * CHUNK).to(tl.int64) * stride_xt
    x_ptrs = x_ptr + offs_t[:, None].to(tl.int64) * stride_xt + offs_c[None, :] * stride_xc
    mean = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start in range(0, frames, BLOCK_T):
        valid = (start + offs_t < frames)[:, None]
        x = tl.load(x_ptrs, mask=valid & mask_c[None, :], other=0.0).to(tl.float32)
        inverse = 1.0 / (start // BLOCK_T + 1)
        delta = x - mean
        mean += delta * tl.where(valid, inverse, 0.0)
        squares += delta * delta * tl.where(valid, 1.0 - inverse, 0.0)
        x_ptrs += BLOCK_T * stride_xt
    count = ((frames - offs_t + BLOCK_T - 1) // BLOCK_T).to(tl.float32)[:, None]
    # from the first frame on: a sum of the means themselves would lose what is below their size
    origin = tl.load(
        x_ptr + offs_c * stride_xc, mask=offs_c < tl.where(frames > 0, C, 0), other=0.0
    )
    origin = origin.to(tl.float32)
    distance = tl.sum((mean - origin[None, :]) * count, 0)
    chunk_mean = origin + distance / tl.maximum(frames, 1).to(tl.float32)
    centered = mean - chunk_mean[None, :]
    moments_ptr += (b * tl.num_programs(0) + chunk).to(tl.int64) * (2 * C + 1)
    tl.store(moments_ptr + offs_c, chunk_mean, mask=mask_c)
    chunk_squares = tl.sum(squares + centered * centered * count, 0)
    tl.store(moments_ptr + C + offs_c, chunk_squares, mask=mask_c)
    if tl.program_id(1) == 0:
        tl.store(moments_ptr + 2 * C, frames.to(tl.float32))


@triton.jit(do_not_specialize=["E"])
def _merge_kernel(
    moments_ptr, merged_ptr, mean_ptr, rstd_ptr,
    E, C, eps,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_C channels of one set, as reference.py::merge_moments merges them
    s = tl.program_id(1).to(tl.int64)
    offs_c, offs_e = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_E)
    mask_c, pitch = offs_c < C, 2 * C + 1
    moments_ptr += s * E * pitch
    origin = tl.load(moments_ptr + offs_c, mask=offs_c < tl.where(E > 0, C, 0), other=0.0)
    counts = tl.zeros((BLOCK_E,), dtype=tl.float32)
    means = tl.zeros((BLOCK_E, BLOCK_C), dtype=tl.float32)
    for start in range(0, E, BLOCK_E):
        e = (start + offs_e).to(tl.int64)
        mask = (e < E)[:, None] & mask_c[None, :]
        count = tl.load(moments_ptr + e * pitch + 2 * C, mask=e < E, other=0.0)
        mean = tl.load(moments_ptr + e[:, None] * pitch + offs_c[None, :], mask=mask, other=0.0)
        counts += count
        means += (mean - origin[None, :]) * count[:, None]
    total = tl.sum(counts)
    divisor = tl.maximum(total, 1.0)
    set_mean = tl.where(total > 0.0, origin + tl.sum(means, 0) / divisor, 0.0)
    squares = tl.zeros((BLOCK_E, BLOCK_C), dtype=tl.float32)
    for start in range(0, E, BLOCK_E):
        e = (start + offs_e).to(tl.int64)
        mask = (e < E)[:, None] & mask_c[None, :]
        count = tl.load(moments_ptr + e * pitch + 2 * C, mask=e < E, other=0.0)[:, None]
        ptrs = moments_ptr + e[:, None] * pitch + offs_c[None, :]
        centered = tl.load(ptrs, mask=mask, other=0.0) - set_mean[None, :]
        squares += tl.load(ptrs + C, mask=mask, other=0.0) + centered * centered * count
    set_squares = tl.sum(squares, 0)
    # rounded correctly, unlike / and sqrt on a GPU: once a channel it costs nothing
    rstd = tl.div_rn(1.0, tl.sqrt_rn(set_squares / divisor + eps))
    tl.store(mean_ptr + s * C + offs_c, set_mean, mask=mask_c)
    tl.store(rstd_ptr + s * C + offs_c, rstd, mask=mask_c)
    merged_ptr += s * pitch
    tl.store(merged_ptr + offs_c, set_mean, mask=mask_c)
    tl.store(merged_ptr + C + offs_c, set_squares, mask=mask_c)
    if tl.program_id(0) == 0:
        tl.store(merged_ptr + 2 * C, total)


@triton.jit(do_not_specialize=["T"])
def _normalize_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, lengths_ptr, y_ptr,
    T, C, stride_s, stride_xb, stride_xc, stride_xt, stride_yb, stride_yc, stride_yt,
    ACTIVATION: tl.constexpr, TO_HALF: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_C channels of one chunk of one utterance
    first, b = tl.program_id(0) * CHUNK, tl.program_id(2).to(tl.int64)
    offs_c, offs_t = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_T)
    mask_c = offs_c < C
    length = _load_length(lengths_ptr, b, T)
    mean = _parameter(mean_ptr + b * stride_s, offs_c, mask_c)
    factor = _parameter(rstd_ptr + b * stride_s, offs_c, mask_c)
    factor *= _parameter(weight_ptr, offs_c, mask_c)
    bias = _parameter(bias_ptr, offs_c, mask_c)
    frame = (first + offs_t)[:, None].to(tl.int64)
    x_ptrs = x_ptr + b * stride_xb + frame * stride_xt + offs_c[None, :] * stride_xc
    y_ptrs = y_ptr + b * stride_yb + frame * stride_yt + offs_c[None, :] * stride_yc
    for start in range(first, tl.minimum(first + CHUNK, T), BLOCK_T):
        t = (start + offs_t)[:, None]
        x = tl.load(x_ptrs, mask=(t < length) & mask_c[None, :], other=0.0).to(tl.float32)
        y = activate((x - mean) * factor + bias, ACTIVATION, TO_HALF)
        y = tl.where(t < length, y, 0.0).to(y_ptr.dtype.element_ty)
        tl.store(y_ptrs, y, mask=(t < T) & mask_c[None, :])
        x_ptrs += BLOCK_T * stride_xt
        y_ptrs += BLOCK_T * stride_yt


@triton.jit(do_not_specialize=["T"])
def _normalize_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, lengths_ptr, sums_ptr, means_ptr,
    dx_ptr,
    T, C, stride_s, stride_gb, stride_gc, stride_gt, stride_xb, stride_xc, stride_xt,
    stride_db, stride_dc, stride_dt,
    ACTIVATION: tl.constexpr, TO_HALF: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_C channels of one chunk of one utterance. Without means_ptr its sums of the
    # gradient, and of the gradient times the normalized value; with it dx
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    offs_c, offs_t = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_T)
    mask_c, first = offs_c < C, chunk * CHUNK
    length = _load_length(lengths_ptr, b, T)
    mean = _parameter(mean_ptr + b * stride_s, offs_c, mask_c)
    rstd = _parameter(rstd_ptr + b * stride_s, offs_c, mask_c)
    factor = rstd * _parameter(weight_ptr, offs_c, mask_c)
    bias = _parameter(bias_ptr, offs_c, mask_c)
    frame = (first + offs_t)[:, None].to(tl.int64)
    grad_ptrs = grad_ptr + b * stride_gb + frame * stride_gt + offs_c[None, :] * stride_gc
    x_ptrs = x_ptr + b * stride_xb + frame * stride_xt + offs_c[None, :] * stride_xc
    if means_ptr is None:
        end = tl.minimum(first + CHUNK, length)
        sum_grad = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        sum_projection = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    else:
        end = tl.minimum(first + CHUNK, T)
        means_ptr += b * stride_s * 2
        mean_grad = _parameter(means_ptr, offs_c, mask_c) * rstd
        mean_projection = _parameter(means_ptr + C, offs_c, mask_c) * rstd * rstd
        dx_ptrs = dx_ptr + b * stride_db + frame * stride_dt + offs_c[None, :] * stride_dc
    for start in range(first, end, BLOCK_T):
        t = (start + offs_t)[:, None]
        mask = (t < length) & mask_c[None, :]
        # 0 where nothing is loaded
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        centered = x - mean
        if ACTIVATION is not None:
            grad *= activation_slope(centered * factor + bias, ACTIVATION, TO_HALF)
        if means_ptr is None:
            sum_grad += grad
            sum_projection += grad * centered
        else:
            dx = grad * factor - (mean_grad + centered * mean_projection)
            dx = tl.where(t < length, dx, 0.0).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptrs, dx, mask=(t < T) & mask_c[None, :])
            dx_ptrs += BLOCK_T * stride_dt
        grad_ptrs += BLOCK_T * stride_gt
        x_ptrs += BLOCK_T * stride_xt
    if means_ptr is None:
        sums_ptr += (b * tl.num_programs(0) + chunk) * 2 * C
        tl.store(sums_ptr + offs_c, tl.sum(sum_grad, 0), mask=mask_c)
        projection = tl.sum(sum_projection * rstd, 0)
        tl.store(sums_ptr + C + offs_c, projection, mask=mask_c)


def channel_tiles(channel_last: bool) -> dict[str, Any]:
    """Constants of a pass over [B, C, T]: a warp reads what is adjacent."""
    block_t, block_c = (32, 64) if channel_last else (64, 16)
    return {"CHUNK": CHUNK, "BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": 4}


def _adjacent(x: Tensor, channel_last: bool) -> Tensor:
    """x [B, C, T], copied if need be, with channels (or else frames) next to each other."""
    if channel_last:
        return x if x.stride(1) == 1 else x.mT.contiguous().mT
    return x if x.stride(2) == 1 else x.contiguous()


def channel_moments_triton(
    x: Tensor, lengths: Tensor | None, per_utterance: bool = False
) -> Tensor:
    """Means, sums of squared deviations and counts of chunks of x [B, C, T].

    Returns:
        [S, E, 2 C + 1] fp32, for ``merge_moments_triton``.
    """
    (B, C, T), channel_last = x.shape, is_channel_last(x)
    x, tiles, chunks = _adjacent(x, channel_last), channel_tiles(channel_last), -(-T // CHUNK)
    moments = torch.empty(B, chunks, 2 * C + 1, device=x.device, dtype=torch.float32)
    if moments.numel() and C:
        _statistics_kernel[(chunks, triton.cdiv(C, tiles["BLOCK_C"]), B)](
            x, lengths, moments,
            T, C, *x.stride(),
            **tiles,
        )  # fmt: skip
    return moments if per_utterance else moments.view(1, B * chunks, 2 * C + 1)


def merge_moments_triton(moments: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the moments [S, E, 2 C + 1] of parts: [S, 2 C + 1]; mean and rstd [S, C]."""
    S, E, pitch = moments.shape
    C, device = pitch // 2, moments.device
    merged = torch.empty(S, pitch, device=device, dtype=torch.float32)
    mean, rstd = (torch.empty(S, C, device=device, dtype=torch.float32) for _ in range(2))
    if S and C:
        _merge_kernel[(triton.cdiv(C, 32), S)](
            moments, merged, mean, rstd,
            E, C, eps,
            BLOCK_E=32, BLOCK_C=32, num_warps=4,
        )  # fmt: skip
    return merged, mean, rstd


def normalize_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lengths: Tensor | None,
    activation: str | None,
) -> Tensor:
    """``activation((x - mean) * rstd * weight + bias)``, 0 in padding; mean and rstd [S, C]."""
    (B, C, T), channel_last = x.shape, is_channel_last(x)
    y, tiles = empty_channels(x), channel_tiles(channel_last)
    if x.numel():
        x = _adjacent(x, channel_last)
        _normalize_kernel[(triton.cdiv(T, CHUNK), triton.cdiv(C, tiles["BLOCK_C"]), B)](
            x, weight.contiguous(), bias.contiguous(), mean, rstd, lengths, y,
            T, C, C if len(mean) == B else 0, *x.stride(), *y.stride(),
            ACTIVATION=activation, TO_HALF=x.itemsize == 2, **tiles,
        )  # fmt: skip
    return y


def normalize_backward_triton(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lengths: Tensor | None,
    activation: str | None,
    means: Tensor | None,
) -> Tensor:
    """One of the two passes of the gradient of ``normalize_triton``.

    Args:
        grad_y: [B, C, T].
        x: as in the forward, and so all up to ``activation``.
        means: [S, 2, C] fp32, means over the valid frames of the gradient of the normalized value,
            and of that times the normalized value. None in the first pass.

    Returns:
        dx, like x. In the first pass [B, E, 2, C] fp32, of each chunk the sums of the gradient
        before the activation, and of that times the normalized value.
    """
    (B, C, T), channel_last = x.shape, is_channel_last(x)
    tiles, chunks = channel_tiles(channel_last), triton.cdiv(T, CHUNK)
    dx = empty_channels(x)
    sums = torch.empty(B, chunks, 2, C, device=x.device, dtype=torch.float32)
    if x.numel():
        x, grad = _adjacent(x, channel_last), _adjacent(grad_y, channel_last)
        first_pass = means is None
        _normalize_bwd_kernel[(chunks, triton.cdiv(C, tiles["BLOCK_C"]), B)](
            grad, x, weight.contiguous(), bias.contiguous(), mean, rstd, lengths,
            sums if first_pass else None, means, None if first_pass else dx,
            T, C, C if len(mean) == B else 0, *grad.stride(), *x.stride(), *dx.stride(),
            ACTIVATION=activation, TO_HALF=x.itemsize == 2, **tiles,
        )  # fmt: skip
    return sums if means is None else dx
