"""Triton kernels that fake-quantize a matrix and take its gradient: one pass each.

Dimension key: M rows, K columns, S scale groups a row. A tile is [BLOCK_M, CHUNKS, CHUNK]: CHUNK
columns share a scale, so that it is loaded, and inverted, once for all of them.

Bytes, at least: forward one read and one write of an element; backward two reads (the gradient,
once a part, and x) and one write. Arithmetic, about 10 operations an element, hides behind them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.fake_quant.quantizer import Quantizer
from lowbit_kernels.fake_quant.reference import (
    gradient_factor,
    has_sign_gradient,
    min_scale,
)

# columns of a tile, and its elements: 16 a thread of 4 warps
BLOCK_K, TILE = 256, 2048
# columns of a row that one program keeps in registers
BLOCK_ROW = 4096


@triton.jit
def round_to_levels(v, LOW: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr):
    # 1.5 * 2 ** 23: the sum has no bits left for a fraction, and rounds half to even
    level = tl.minimum(tl.maximum(v, LOW), HIGH)
    if STEP == 1:
        level = (level + 12582912.0) - 12582912.0
    else:
        level = (((level - LOW) * 0.5 + 12582912.0) - 12582912.0) * 2.0 + LOW
    # a maximum passes over a NaN
    return tl.where(v == v, level, v)


@triton.jit
def quantizer_gradient(
    grad, v, LOW: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr, IS_SIGN: tl.constexpr
):
    # gradient of x, and grad * slope; see Quantizer for the formulas
    inside = (v >= LOW) & (v <= HIGH)
    slope = round_to_levels(v, LOW, HIGH, STEP)
    if not IS_SIGN:
        slope = tl.where(inside, slope - v, slope)
    return tl.where(inside, grad, 0.0), grad * slope


@triton.jit(do_not_specialize=["M"])
def _fake_quantize_kernel(
    x_ptr, scale_ptr, group_scale_ptr, center_ptr, y_ptr,
    M, K, num_chunks, num_groups,
    stride_sm, stride_sg, stride_cm,
    LOW: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr, MIN_SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunks = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    offs_k = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    # rows and groups past the end read the last one, and are not written
    rows = tl.minimum(offs_m, M - 1)
    groups = tl.minimum(chunks * CHUNK // GROUP_SIZE if GROUP_SIZE > 0 else chunks, num_groups - 1)
    scale_ptrs = scale_ptr + rows[:, None] * stride_sm + groups[None, :] * stride_sg
    scale = tl.maximum(tl.load(scale_ptrs).to(tl.float32), MIN_SCALE)[:, :, None]
    offsets = offs_m[:, None, None] * K + offs_k[None, :, :]
    mask = (offs_m < M)[:, None, None] & (offs_k < K)[None, :, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if center_ptr is not None:
        x -= tl.load(center_ptr + rows * stride_cm).to(tl.float32)[:, None, None]
    if group_scale_ptr is not None:
        group_ptrs = group_scale_ptr + rows[:, None] * num_groups + groups[None, :]
        multiplier = tl.load(group_ptrs).to(tl.float32)[:, :, None]
        level = round_to_levels(x * tl.div_rn(1.0, multiplier * scale), LOW, HIGH, STEP)
        y = level * multiplier * scale
    else:
        y = round_to_levels(x * tl.div_rn(1.0, scale), LOW, HIGH, STEP) * scale
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _fake_quantize_bwd_kernel(
    grad_ptr, x_ptr, scale_ptr, group_scale_ptr, dx_ptr, partial_ptr,
    M, K, num_parts, num_chunks, num_groups,
    stride_sm, stride_sg,
    LOW: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr, MIN_SCALE: tl.constexpr,
    IS_SIGN: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # the gradient is a sum of parts, taken in order; without x it is only summed
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunks = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    offs_k = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    offsets = offs_m[:, None, None] * K + offs_k[None, :, :]
    mask = (offs_m < M)[:, None, None] & (offs_k < K)[None, :, :]
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    size = M.to(tl.int64) * K
    for part in range(1, num_parts):
        grad += tl.load(grad_ptr + part * size + offsets, mask=mask, other=0.0).to(tl.float32)
    if x_ptr is not None:
        rows = tl.minimum(offs_m, M - 1)
        groups = tl.minimum(
            chunks * CHUNK // GROUP_SIZE if GROUP_SIZE > 0 else chunks, num_groups - 1
        )
        scale_ptrs = scale_ptr + rows[:, None] * stride_sm + groups[None, :] * stride_sg
        step = tl.maximum(tl.load(scale_ptrs).to(tl.float32), MIN_SCALE)
        if group_scale_ptr is not None:
            group_ptrs = group_scale_ptr + rows[:, None] * num_groups + groups[None, :]
            multiplier = tl.load(group_ptrs).to(tl.float32)
            step *= multiplier
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        v = x * tl.div_rn(1.0, step)[:, :, None]
        # the gradient is 0 past the end, and so are its products
        grad, terms = quantizer_gradient(grad, v, LOW, HIGH, STEP, IS_SIGN)
        sums = tl.sum(terms, 2)
        if group_scale_ptr is not None:
            sums *= multiplier
        mask_p = (offs_m < M)[:, None] & (chunks < num_chunks)[None, :]
        tl.store(partial_ptr + offs_m[:, None] * num_chunks + chunks[None, :], sums, mask=mask_p)
    tl.store(dx_ptr + offsets, grad.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fake_quantize_rows_kernel(
    x_ptr, y_ptr,
    K,
    LOW: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr, MIN_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: one row, whose scale is its own; a row longer than BLOCK is read again
    row = tl.program_id(0).to(tl.int64) * K
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + offs, mask=offs < K, other=0.0).to(tl.float32)
    # a maximum passes over a NaN; an infinite scale makes the whole row NaN
    largest = tl.where(x == x, tl.abs(x), float("inf"))
    for start in range(BLOCK, K, BLOCK):
        more = tl.load(x_ptr + row + start + offs, mask=start + offs < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.where(more == more, tl.abs(more), float("inf")))
    scale = tl.maximum(tl.div_rn(tl.max(largest), HIGH), MIN_SCALE)
    inverse = tl.div_rn(1.0, scale)
    y = round_to_levels(x * inverse, LOW, HIGH, STEP) * scale
    tl.store(y_ptr + row + offs, y.to(y_ptr.dtype.element_ty), mask=offs < K)
    for start in range(BLOCK, K, BLOCK):
        more = tl.load(x_ptr + row + start + offs, mask=start + offs < K, other=0.0).to(tl.float32)
        y = round_to_levels(more * inverse, LOW, HIGH, STEP) * scale
        tl.store(y_ptr + row + start + offs, y.to(y_ptr.dtype.element_ty), mask=start + offs < K)


def constants(quantizer: Quantizer) -> dict[str, float]:
    """LOW, HIGH, STEP and MIN_SCALE of the kernels."""
    levels = quantizer.levels
    return {
        "LOW": float(levels.low),
        "HIGH": float(levels.high),
        "STEP": levels.step,
        "MIN_SCALE": min_scale(quantizer),
    }


def scale_strides(scale: Tensor) -> tuple[int, int]:
    """Strides of rows and groups of a contiguous scale [1 or M, 1 or S]: 0 where one is shared."""
    rows, groups = scale.shape
    return (groups if rows > 1 else 0), (1 if groups > 1 else 0)


def _tiles(K: int, quantizer: Quantizer | None) -> tuple[int, int, dict[str, int]]:
    """Groups and chunks of a row, and the constants GROUP_SIZE, BLOCK_M, CHUNKS and CHUNK."""
    size = 0 if quantizer is None else quantizer.group_size
    block_k = min(BLOCK_K, max(32, triton.next_power_of_2(K)))
    chunk = min(size or block_k, block_k)
    groups = triton.cdiv(K, size) if size else 1
    chunks = groups * size // chunk if size else triton.cdiv(K, chunk)
    sizes = {"BLOCK_M": TILE // block_k, "CHUNKS": block_k // chunk, "CHUNK": chunk}
    return groups, chunks, {"GROUP_SIZE": size, **sizes}


def _grid(M: int, num_chunks: int, tiles: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(M, tiles["BLOCK_M"]), triton.cdiv(num_chunks, tiles["CHUNKS"])


def fake_quantize_triton(x: Tensor, quantizer: Quantizer, dtype: torch.dtype) -> Tensor:
    """x [M, K], contiguous, quantized and dequantized; see ``as_matrices`` for the quantizer."""
    M, K = x.shape
    y = torch.empty(M, K, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return y
    scale, group_scale, center = quantizer.scale, quantizer.group_scale, quantizer.center
    if scale is None:
        block = min(BLOCK_ROW, max(32, triton.next_power_of_2(K)))
        _fake_quantize_rows_kernel[(M,)](
            x, y, K, BLOCK=block, num_warps=max(1, min(8, block // 512)), **constants(quantizer)
        )
        return y
    groups, chunks, tiles = _tiles(K, quantizer)
    scale = scale.contiguous()
    _fake_quantize_kernel[_grid(M, chunks, tiles)](
        x, scale,
        None if group_scale is None else group_scale.contiguous(),
        None if center is None else center.contiguous(),
        y,
        M, K, chunks, groups,
        *scale_strides(scale), 0 if center is None or center.numel() == 1 else 1,
        **constants(quantizer), **tiles,
    )  # fmt: skip
    return y


def fake_quantize_backward_triton(
    grad: Tensor, x: Tensor, quantizer: Quantizer
) -> tuple[Tensor, Tensor]:
    """Gradients of x [M, K], in its dtype, and of the scale, like it.

    Args:
        grad: [P, M, K], contiguous, P parts whose sum is the gradient of the result.
        x: [M, K], contiguous.
        quantizer: with a scale, ``"lsq"`` or ``"elastic"``.
    """
    scale, group_scale = quantizer.scale, quantizer.group_scale
    assert scale is not None, "op.py asks for it"
    M, K = x.shape
    groups, chunks, tiles = _tiles(K, quantizer)
    dx = torch.empty(M, K, dtype=x.dtype, device=x.device)
    partial = torch.empty(M, chunks, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros_like(scale)
    _fake_quantize_bwd_kernel[_grid(M, chunks, tiles)](
        grad, x, scale.contiguous(),
        None if group_scale is None else group_scale.contiguous(),
        dx, partial,
        M, K, grad.shape[0], chunks, groups,
        *scale_strides(scale),
        IS_SIGN=has_sign_gradient(quantizer), **constants(quantizer), **tiles,
    )  # fmt: skip
    return dx, sum_scale_gradient(partial, x, quantizer)


def sum_scale_gradient(partial: Tensor, x: Tensor, quantizer: Quantizer) -> Tensor:
    """The second stage: the gradient of the scale from sums over parts of rows [M, chunks]."""
    scale = quantizer.scale
    assert scale is not None, "op.py asks for it"
    per_scale = partial.view(1, -1) if scale.numel() == 1 else partial.view(scale.numel(), -1)
    dscale = per_scale.sum(1)
    return (dscale * gradient_factor(x, quantizer)).to(scale.dtype).view(scale.shape)


def sum_parts_triton(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum [M, K] of parts [P, M, K], contiguous, in order."""
    P, M, K = parts.shape
    y = torch.empty(M, K, dtype=dtype, device=parts.device)
    groups, chunks, tiles = _tiles(K, None)
    _fake_quantize_bwd_kernel[_grid(M, chunks, tiles)](
        parts, None, None, None, y, None,
        M, K, P, chunks, groups,
        0, 0,
        LOW=0.0, HIGH=0.0, STEP=1, MIN_SCALE=0.0, IS_SIGN=False, **tiles,
    )  # fmt: skip
    return y
