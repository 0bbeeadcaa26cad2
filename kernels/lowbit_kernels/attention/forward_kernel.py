"""Triton kernel of flash_attention's forward: softmax over key tiles, kept in registers.

Read off sm_90's code and not measured: a step of 64 queries and 64 keys, D = 64 in bf16, takes 324
instructions a warp of four, and 538 with keys of offsets, whose band is one product of twice the
keys, and a run of each row taken through shared memory: 0.6 of plain attention's speed. 80 to 100
more each where keys are masked; at the edges of a window 560, inside it 336.

Dimension key: B batch, H heads, T frames, D head dimension; M queries and N keys of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.attention.config import (
    Kernel,
    TileConfig,
    default_config,
    input_precision,
    shared_bytes,
)
from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.attention.scores_kernel import (
    LOG2_E,
    PAD_TO,
    SCALE_BLOCK,
    add_features,
    kept_by_dropout,
    load_bias,
    load_frames,
    scores_of_offsets,
    start_of_step,
    store_frames,
    table_of,
    tile_and_head,
    utterance,
    visible_keys,
    visible_range,
    whole_range,
)
from lowbit_kernels.cpu import empty_heads
from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.quantize_kernel import round_to_int8


@triton.jit(do_not_specialize=["T", "window", "largest", "right"])
def _flash_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, rows_ptr, content_ptr, position_ptr, seed_ptr,
    block_scales_ptr, out_scale_ptr, out_ptr, lse_ptr,
    H, T, window, scale, dropout_p, largest, right,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ab, stride_ah, stride_aq, stride_ak,
    stride_rb, stride_rh, stride_rt, stride_ob, stride_oh, stride_ot,
    KIND: tl.constexpr, IS_PACKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    IS_RELATIVE: tl.constexpr = KIND == "relative"
    D_IN: tl.constexpr = (D + PAD_TO - 1) // PAD_TO * PAD_TO
    HAS_BIAS: tl.constexpr = KIND is not None and not IS_RELATIVE
    start_m, bh = tile_and_head(T, BLOCK_M)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    b, length, frames = utterance(lengths_ptr, b, T, IS_PACKED)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if KIND is not None:
        table_ptr = table_of(
            table_ptr, b, h, largest, stride_ab, stride_ah, stride_aq, stride_ak, KIND
        )
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if block_scales_ptr is not None:
        # of q's blocks, then of k's; q and k are int8
        block_scales_ptr += bh.to(tl.int64) * 2 * tl.cdiv(T, SCALE_BLOCK)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_frames(q_ptr, offs_m, stride_qt, length, D_IN, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    lo, hi = visible_range(start_m, length, window, BLOCK_M, BLOCK_N)
    if rows_ptr is not None:
        rows_ptr += b * stride_rb + h * stride_rh
        if IS_RELATIVE:
            rows = load_frames(rows_ptr, offs_m, stride_rt, length, D_IN, BLOCK_D)
        else:
            gate = tl.load(rows_ptr + offs_m * stride_rt, mask=offs_m < length, other=0.0)
    elif IS_RELATIVE:
        rows = q
        if content_ptr is not None:
            rows = add_features(q, position_ptr + h * D, D, BLOCK_D)
            q = add_features(q, content_ptr + h * D, D, BLOCK_D)
    # the powers are of 2; without a bias the scores are scaled in one instruction with their
    # difference from the largest
    to_log2 = scale * LOG2_E
    to_come = 1.0 if HAS_BIAS else to_log2
    if block_scales_ptr is not None:
        q_scales = tl.load(block_scales_ptr + offs_m // SCALE_BLOCK, mask=offs_m < T, other=0.0)
    # tiles of nothing but valid keys come first, without a mask: a quarter fewer instructions where
    # D is 64; loading a bias takes one, and some kernels have no registers for two loops
    IS_FP32: tl.constexpr = v_ptr.dtype.element_ty == tl.float32
    IS_LARGE: tl.constexpr = IS_FP32 or (IS_RELATIVE and BLOCK_D > 64)
    IS_MASKED: tl.constexpr = HAS_BIAS or IS_LARGE
    whole, whole_end = lo, lo
    if not IS_MASKED:
        whole, whole_end = whole_range(start_m, length, window, lo, hi, BLOCK_M, BLOCK_N)
    for part in tl.static_range(1 if IS_MASKED else 0, 2):
        steps = whole_end - whole if part == 0 else hi - lo - (whole_end - whole)
        for step in range(0, steps, BLOCK_N):
            start_n = start_of_step(step, part, lo, whole, whole_end)
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_frames(k_ptr, offs_n, stride_kt, length, D_IN, BLOCK_D)
            v = load_frames(v_ptr, offs_n, stride_vt, length, D_IN, BLOCK_D)
            offs_q, offs_k = offs_m[:, None], offs_n[None, :]
            mask = visible_keys(offs_q, offs_k, length, window)
            if HAS_BIAS:
                mask = mask & (offs_q < length)
            scores = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            if IS_RELATIVE:
                scores = scores_of_offsets(
                    rows, table_ptr, start_m, start_n, stride_aq, largest, D_IN, BLOCK_D, BLOCK_M,
                    False, INPUT_PRECISION, right,
                )  # fmt: skip
            if block_scales_ptr is None:
                scores = tl.dot(q, tl.trans(k), scores, input_precision=INPUT_PRECISION)
            else:
                blocks = tl.cdiv(T, SCALE_BLOCK) + start_n // SCALE_BLOCK
                both = q_scales * tl.load(block_scales_ptr + blocks)
                scores += tl.dot(q, tl.trans(k)).to(tl.float32) * both[:, None]
            if HAS_BIAS:
                bias = load_bias(
                    table_ptr, start_m, start_n, offs_q, offs_k, stride_aq, stride_ak, mask
                )
                bias = bias if rows_ptr is None else bias * gate.to(tl.float32)[:, None]
                scores = scores * to_log2 + bias
            if part == 1:
                scores = tl.where(mask, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            # a row that has seen no key yet: -inf less -inf would be NaN
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            probs = tl.exp2(scores * to_come - (shift * to_come)[:, None])
            rescale = tl.exp2((row_max - shift) * to_come)
            row_sum = row_sum * rescale + tl.sum(probs, 1)
            if seed_ptr is not None:
                keep = kept_by_dropout(seed, dropout_p, bh, offs_q, offs_k, T)
                probs = tl.where(keep, probs, 0.0)
            acc *= rescale[:, None]
            acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
            row_max = new_max

    is_empty = (row_sum == 0.0) | (offs_m >= length)
    denominator = tl.where(is_empty, 1.0, row_sum)
    lse = tl.where(is_empty, 0.0, row_max * to_come + tl.log2(denominator))
    if seed_ptr is not None:
        denominator *= 1.0 - dropout_p
    acc = tl.where(is_empty[:, None], 0.0, acc / denominator[:, None])
    tl.store(lse_ptr + bh.to(tl.int64) * T + offs_m, lse, mask=offs_m < T)
    out_ptr += b * stride_ob + h * stride_oh
    if out_scale_ptr is not None:
        # rounded to q's dtype first: what the next layer would make of the floating-point output
        inverse = tl.div_rn(1.0, tl.load(out_scale_ptr))
        acc, _ = round_to_int8(acc.to(v_ptr.dtype.element_ty).to(tl.float32), inverse, CLAMP=True)
    store_frames(out_ptr, offs_m, stride_ot, acc, frames, D, BLOCK_D)


_launch = Launcher(_flash_attention_fwd_kernel)


def rows(x: Tensor) -> Tensor:
    """The same values, head features adjacent and padded with zeros to a multiple of 16.

    The kernels load 16 bytes at a time, and would load odd rows a number at a time: a copy costs as
    much as attention itself at 250 frames, and a quarter of it at 1000; such loads five times more.
    """
    missing = -x.shape[-1] % PAD_TO.value
    if missing:
        return F.pad(x, (0, missing))
    return x if x.stride(-1) == 1 else x.contiguous()


def steps(x: Tensor, longest: int | None = None) -> tuple[int, ...]:
    """Strides from utterance to utterance, which of packed ones begin at a frame; heads; frames."""
    of_utterance, of_head, of_frame = x.stride()[:3]
    return of_utterance if longest is None else of_frame, of_head, of_frame


@cache
def tile(
    kernel: Kernel, head_dim: int, dtype: torch.dtype, kind: str | None, has_dropout: bool,
    device: torch.device, is_packed: bool | None, min_block_d: int = 0, **others: Any,
) -> tuple[TileConfig, Constants]:  # fmt: skip
    """The tile of a problem, see ``default_config``, and the constants of its kernel.

    ``is_packed`` is None for a kernel that does not know packed utterances.
    """
    config = default_config(kernel, head_dim, dtype, kind, has_dropout, shared_bytes(device))
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    values: dict[str, Any] = {"BLOCK": config.block_n} if kernel == "offsets" else blocks
    values |= {
        "KIND": kind, "D": head_dim,
        "BLOCK_D": max(min_block_d, config.block_d), "INPUT_PRECISION": input_precision(dtype),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if is_packed is not None:
        values["IS_PACKED"] = is_packed
    return config, Constants(values | others)


def scheme_arguments(
    scheme: Scheme | None, q: Tensor, longest: int | None = None
) -> tuple[tuple[Tensor | None, Tensor | None], int, tuple[int, ...]]:
    """Table and rows as the kernels read them; offset 0's place in the table; strides of both."""
    B, H, T, _ = q.shape
    if scheme is None:
        return (None, None), 0, (0,) * 7
    table, of_rows = scheme.table, scheme.rows
    if scheme.kind == "dense":
        return (table, None), 0, (*table.expand(B, H, T, T).stride(), 0, 0, 0)
    if scheme.kind == "relative":
        table = rows(table)
    largest = table.shape[1] // 2 if scheme.left is None else scheme.left
    stride_h, stride_o = table.stride()[:2]
    stride_h *= table.shape[0] > 1
    # a key further right is an offset further right, a query an offset further left
    of_offset = (stride_o, 0) if scheme.kind == "relative" else (-stride_o, stride_o)
    if of_rows is None:
        return (table, None), largest, (0, stride_h, *of_offset, 0, 0, 0)
    of_rows = rows(of_rows) if scheme.kind == "relative" else of_rows
    return (table, of_rows), largest, (0, stride_h, *of_offset, *steps(of_rows, longest))


def flash_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scheme: Scheme | None,
    seed: Tensor | None,
    window: int | None,
    scale: float,
    dropout_p: float,
    out_scale: Tensor | None = None,
    block_scales: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on q, k, v [B, H, T, D]. op.py has checked the inputs.

    ``longest``: of packed utterances, T then; q, k and v are [1, H, total, D], and ``lengths`` are
    the frames at which they begin, and the end [B + 1].

    ``block_scales``: of q and k in int8, [B, H, 2, ceil(T / SCALE_BLOCK)] fp32.

    Returns:
        out: [B, H, T, D], int8 by ``out_scale`` [] fp32 if that is given.
        lse: [B, H, T], fp32, the softmax's denominator as the backward takes it: its logarithm to
            the base 2, which is rounded once; the natural one would be rounded three times.
    """
    B, H, T, D = q.shape
    if longest is not None and lengths is not None:
        B, T = lengths.shape[0] - 1, longest
    out = empty_heads(v, None if out_scale is None else torch.int8)
    lse = torch.empty(B, H, T, device=q.device, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    q, k, v = rows(q), rows(k), rows(v)
    kind = None if scheme is None else scheme.kind
    # int8 products add 32 numbers at a time
    config, constants = tile(
        "forward", D, v.dtype, kind, seed is not None, q.device, longest is not None,
        0 if block_scales is None else 32,
    )  # fmt: skip
    tensors, largest, strides = scheme_arguments(scheme, q, longest)
    biases: tuple[Tensor | None, ...] = (None, None)
    right = None
    if scheme is not None and scheme.biases is not None:
        biases = tuple(bias.contiguous() for bias in scheme.biases)
    if scheme is not None and scheme.left is not None:
        right = scheme.table.shape[1] - 1 - scheme.left
    _launch(
        (triton.cdiv(T, config.block_m) * B * H, 1),
        (q, k, v, lengths, *tensors, *biases, seed, block_scales, out_scale, out, lse,
         H, T, None if window is None else min(window, T), scale, dropout_p, largest, right,
         *steps(q, longest), *steps(k, longest), *steps(v, longest), *strides,
         *steps(out, longest)),
        constants,
    )  # fmt: skip
    return out, lse
