"""Triton kernel for the gradient of a table of offsets: of their keys, or of their bias.

One program owns a chunk of offsets in one head of one utterance and goes over the queries: a tile's
scores lie between two chunks of keys, of which each row has a run, rotated back to its offsets. The
tables of all utterances are added in PyTorch, so the same bits come out every time.

Dimension key: B batch, H heads, T frames, D head dimension, R largest offset of the table.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.attention.forward_kernel import tile
from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.attention.scores_kernel import (
    LOG2_E,
    PAD_TO,
    kept_by_dropout,
    load_frames,
    load_offsets,
    load_step,
    store_frames,
    table_of,
    take_flat,
    utterance,
)
from lowbit_kernels.matmul.launch import Launcher


@triton.jit
def _of_offsets(
    rows, frames_ptr, start, stride_t, length,
    D_IN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    # rows times the frames from start + row on: [row, offset - first offset]
    line = tl.arange(0, BLOCK)
    offs_t = start + tl.arange(0, 2 * BLOCK)
    frames = load_frames(frames_ptr, offs_t, stride_t, length, D_IN, BLOCK_D)
    band = tl.dot(rows, tl.trans(frames), input_precision=INPUT_PRECISION)
    index = line[:, None] * (2 * BLOCK) + (line[None, :] + line[:, None])
    return take_flat(band, index, 2 * BLOCK * BLOCK, BLOCK, BLOCK)


@triton.jit(do_not_specialize=["T", "window", "largest"])
def _flash_attention_bwd_offsets_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, rows_ptr, seed_ptr, step_ptr, grad_ptr, lse_ptr,
    delta_ptr,
    dtable_ptr,
    H, T, window, scale, dropout_p, largest,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ab, stride_ah, stride_aq, stride_ak,
    stride_rb, stride_rh, stride_rt, stride_gb, stride_gh, stride_gt,
    KIND: tl.constexpr, IS_PACKED: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    IS_RELATIVE: tl.constexpr = KIND == "relative"
    D_IN: tl.constexpr = (D + PAD_TO - 1) // PAD_TO * PAD_TO
    num_offsets = 2 * largest + 1
    num_chunks = tl.cdiv(num_offsets, BLOCK)
    chunk, bh = tl.program_id(0) % num_chunks, tl.program_id(0) // num_chunks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    row = bh.to(tl.int64) * T
    b, length, _ = utterance(lengths_ptr, b, T, IS_PACKED)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    grad_ptr += b * stride_gb + h * stride_gh
    table_ptr = table_of(table_ptr, b, h, largest, stride_ab, stride_ah, stride_aq, stride_ak, KIND)
    if rows_ptr is not None:
        rows_ptr += b * stride_rb + h * stride_rh
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if step_ptr is not None:
        step = load_step(step_ptr)
        inverse = tl.div_rn(1.0, step)

    line = tl.arange(0, BLOCK)
    first = chunk * BLOCK - largest
    offsets = first + line
    if IS_RELATIVE:
        keys = load_offsets(table_ptr, first, stride_aq, largest, D_IN, BLOCK_D, BLOCK)
        dtable = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    else:
        bias = tl.load(table_ptr + offsets * stride_ak, mask=offsets <= largest, other=0.0)
        bias = bias.to(tl.float32) * LOG2_E
        dtable = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    # the queries of which a key at one of the offsets is a valid frame
    lo = tl.maximum(0, 1 - first - BLOCK) // BLOCK * BLOCK
    hi = tl.minimum(length, length - first)
    if window is not None:
        hi = tl.where((first > window) | (first + BLOCK <= -window), 0, hi)
    for start_m in range(lo, hi, BLOCK):
        offs_m = start_m + line
        q = load_frames(q_ptr, offs_m, stride_qt, length, D_IN, BLOCK_D)
        grad = load_frames(grad_ptr, offs_m, stride_gt, length, D_IN, BLOCK_D)
        lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < length, other=0.0)
        delta = tl.load(delta_ptr + row + offs_m, mask=offs_m < length, other=0.0)
        offs_q, offs_k = offs_m[:, None], offs_m[:, None] + offsets[None, :]
        # a query beyond the length adds 0, since its gradient is
        mask = (offs_k >= 0) & (offs_k < length)
        if window is not None:
            mask = mask & (tl.abs(offsets) <= window)[None, :]
        start = start_m + first
        scores = _of_offsets(
            q, k_ptr, start, stride_kt, length, D_IN, BLOCK_D, BLOCK, INPUT_PRECISION
        )
        if IS_RELATIVE:
            rows = load_frames(rows_ptr, offs_m, stride_rt, length, D_IN, BLOCK_D)
            scores = tl.dot(rows, tl.trans(keys), scores, input_precision=INPUT_PRECISION)
        scores *= scale * LOG2_E
        if not IS_RELATIVE:
            gate = (offs_m < length).to(tl.float32)
            if rows_ptr is not None:
                gate = tl.load(rows_ptr + offs_m * stride_rt, mask=offs_m < length, other=0.0)
                gate = gate.to(tl.float32)
            scores += bias[None, :] * gate[:, None]
        probs = tl.where(mask, tl.exp2(scores - lse[:, None]), 0.0)
        grad_probs = _of_offsets(
            grad, v_ptr, start, stride_vt, length, D_IN, BLOCK_D, BLOCK, INPUT_PRECISION
        )
        if seed_ptr is not None:
            keep = kept_by_dropout(seed, dropout_p, bh, offs_q, offs_k, T)
            grad_probs = tl.where(keep, grad_probs / (1.0 - dropout_p), 0.0)
        if step_ptr is not None:
            # what was cut off has no gradient
            grad_probs = tl.where(probs * inverse <= HIGH, grad_probs, 0.0)
        grad_scores = probs * (grad_probs - delta[:, None])
        if IS_RELATIVE:
            dtable = tl.dot(
                tl.trans(grad_scores).to(rows.dtype), rows, dtable, input_precision=INPUT_PRECISION
            )
        else:
            dtable += grad_scores * gate[:, None]

    part = bh.to(tl.int64) * num_offsets
    if IS_RELATIVE:
        # the chunk's first row of the table is first + largest
        dtable_ptr += part * D
        store_frames(dtable_ptr, first + largest + line, D, dtable * scale, num_offsets, D, BLOCK_D)
    else:
        sums = tl.sum(dtable, 0)
        tl.store(dtable_ptr + part + largest + offsets, sums, mask=offsets <= largest)


_launch = Launcher(_flash_attention_bwd_offsets_kernel)


def offsets_gradient_triton(
    batch: int,
    tensors: tuple[Tensor | None, ...],
    scheme: Scheme,
    options: tuple[Any, ...],
    strides: tuple[int, ...],
    problem: tuple[Any, ...],
    high: int,
) -> Tensor:
    """The gradient of a scheme's table, fp32, of the table's shape.

    Args:
        batch: B.
        tensors: q, k, v, lengths, table, rows, seed, step, the output's gradient, lse and delta, as
            the other kernels of the backward take them.
        scheme: of kind ``"offset"`` or ``"relative"``.
        options: of those kernels, from H on.
        strides: of those kernels, those of their results left out.
        problem: D, dtype, kind, whether there is dropout, device, whether utterances are packed.
        high: the highest level of low-bit probabilities, or 0.
    """
    (D, _, kind, *_), H = problem, options[0]
    num_offsets = scheme.table.shape[1]
    config, constants = tile("offsets", *problem, HIGH=high)
    per_offset = (D,) if kind == "relative" else ()
    parts = torch.empty(
        batch, H, num_offsets, *per_offset, device=scheme.table.device, dtype=torch.float32
    )
    grid = (triton.cdiv(num_offsets, config.block_n) * batch * H, 1)
    _launch(grid, (*tensors, parts, *options, *strides), constants)
    total = parts.sum(0)
    return total.sum(0, keepdim=True) if scheme.table.shape[0] < H else total
