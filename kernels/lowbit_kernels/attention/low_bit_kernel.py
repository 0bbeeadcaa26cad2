"""Triton kernels of attention with low-bit probabilities.

What is rounded is the softmax's quotient, so its denominator comes first: each kernel goes over the
keys twice. The backward needs a pass more than ``flash_attention``'s, since the sum of a row that
the softmax's gradient takes off is no product of the output with its gradient here.

Forward, of [16, 12, 500, 64] in bf16: 3 products, 18.4 GFLOP, and 25 MB of q, k, v and output.
Materialized, two products, and the probabilities, 96 MB, written and read for scores, softmax,
quotient, rounding, clamping and scaling: about 1.1 GB. At an H200's 4.8 TB/s and a third of its
990 TFLOP/s, predicted and not measured: 60 microseconds against 240.

Dimension key: B batch, H heads, T frames, D head dimension; M queries and N keys of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.attention.backward_kernel import Gradients, flash_attention_backward_triton
from lowbit_kernels.attention.forward_kernel import rows as padded
from lowbit_kernels.attention.forward_kernel import scheme_arguments, tile
from lowbit_kernels.attention.low_bit_reference import gradient_factor
from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.attention.scores_kernel import (
    LOG2_E,
    PAD_TO,
    kept_by_dropout,
    load_bias,
    load_frames,
    load_length,
    load_step,
    round_probs,
    scores_of_offsets,
    store_frames,
    table_of,
    tile_and_head,
    visible,
    visible_range,
)
from lowbit_kernels.cpu import empty_heads
from lowbit_kernels.matmul.launch import Launcher


@triton.jit
def _load_rows(
    rows_ptr, q, offs_m, stride_rt, length, KIND: tl.constexpr, D_IN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # the queries that score offsets, or the gates; q where there are none, which is not read then
    rows = q
    if rows_ptr is not None:
        if KIND == "relative":
            rows = load_frames(rows_ptr, offs_m, stride_rt, length, D_IN, BLOCK_D)
        else:
            rows = tl.load(rows_ptr + offs_m * stride_rt, mask=offs_m < length, other=0.0)
    return rows


@triton.jit
def _masked_scores(
    q, k, rows, rows_ptr, table_ptr, start_m, start_n, offs_m, offs_n, length, window, to_log2,
    largest, stride_aq, stride_ak,
    KIND: tl.constexpr, D_IN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    # in units of log2; -inf at keys that are not seen
    offs_q, offs_k = offs_m[:, None], offs_n[None, :]
    mask = visible(offs_q, offs_k, length, window)
    scores = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if KIND == "relative":
        scores = scores_of_offsets(
            rows, table_ptr, start_m, start_n, stride_aq, largest, D_IN, BLOCK_D, BLOCK_M, False,
            INPUT_PRECISION,
        )  # fmt: skip
    scores = tl.dot(q, tl.trans(k), scores, input_precision=INPUT_PRECISION) * to_log2
    if KIND is not None and KIND != "relative":
        bias = load_bias(table_ptr, start_m, start_n, offs_q, offs_k, stride_aq, stride_ak, mask)
        scores += bias if rows_ptr is None else bias * rows.to(tl.float32)[:, None]
    return tl.where(mask, scores, float("-inf"))


@triton.jit(do_not_specialize=["T", "window", "largest"])
def _low_bit_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, rows_ptr, seed_ptr, step_ptr, out_ptr, lse_ptr,
    H, T, window, scale, dropout_p, largest,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ab, stride_ah, stride_aq, stride_ak,
    stride_rb, stride_rh, stride_rt, stride_ob, stride_oh, stride_ot,
    KIND: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    D_IN: tl.constexpr = (D + PAD_TO - 1) // PAD_TO * PAD_TO
    start_m, bh = tile_and_head(T, BLOCK_M)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    length = load_length(lengths_ptr, b, T)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if KIND is not None:
        table_ptr = table_of(
            table_ptr, b, h, largest, stride_ab, stride_ah, stride_aq, stride_ak, KIND
        )
    if rows_ptr is not None:
        rows_ptr += b * stride_rb + h * stride_rh
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_frames(q_ptr, offs_m, stride_qt, length, D_IN, BLOCK_D)
    rows = _load_rows(rows_ptr, q, offs_m, stride_rt, length, KIND, D_IN, BLOCK_D)
    lo, hi = visible_range(start_m, length, window, BLOCK_M, BLOCK_N)
    to_log2 = scale * LOG2_E
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_frames(k_ptr, offs_n, stride_kt, length, D_IN, BLOCK_D)
        scores = _masked_scores(
            q, k, rows, rows_ptr, table_ptr, start_m, start_n, offs_m, offs_n, length, window,
            to_log2, largest, stride_aq, stride_ak, KIND, D_IN, BLOCK_D, BLOCK_M, BLOCK_N,
            INPUT_PRECISION,
        )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # a row that has seen no key yet: -inf less -inf would be NaN
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum *= tl.exp2(row_max - shift)
        row_sum += tl.sum(tl.exp2(scores - shift[:, None]), 1)
        row_max = new_max
    is_empty = (row_sum == 0.0) | (offs_m >= length)
    lse = tl.where(is_empty, 0.0, row_max + tl.log2(tl.where(is_empty, 1.0, row_sum)))
    tl.store(lse_ptr + bh.to(tl.int64) * T + offs_m, lse, mask=offs_m < T)

    step = load_step(step_ptr)
    inverse = tl.div_rn(1.0, step)
    if q_ptr.dtype.element_ty == tl.float32:
        # again, since its copy in registers, which fp32 products have, overflows them in two loops
        q = load_frames(q_ptr, offs_m, stride_qt, length, D_IN, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_frames(k_ptr, offs_n, stride_kt, length, D_IN, BLOCK_D)
        v = load_frames(v_ptr, offs_n, stride_vt, length, D_IN, BLOCK_D)
        scores = _masked_scores(
            q, k, rows, rows_ptr, table_ptr, start_m, start_n, offs_m, offs_n, length, window,
            to_log2, largest, stride_aq, stride_ak, KIND, D_IN, BLOCK_D, BLOCK_M, BLOCK_N,
            INPUT_PRECISION,
        )  # fmt: skip
        # levels of at most 8 bits are exact in 16
        levels = round_probs(tl.exp2(scores - lse[:, None]), inverse, HIGH)
        if seed_ptr is not None:
            keep = kept_by_dropout(seed, dropout_p, bh, offs_m[:, None], offs_n[None, :], T)
            levels = tl.where(keep, levels, 0.0)
        acc = tl.dot(levels.to(v.dtype), v, acc, input_precision=INPUT_PRECISION)
    if seed_ptr is not None:
        step /= 1.0 - dropout_p
    out_ptr += b * stride_ob + h * stride_oh
    store_frames(out_ptr, offs_m, stride_ot, acc * step, T, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "window", "largest"])
def _low_bit_attention_delta_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, rows_ptr, seed_ptr, step_ptr, grad_ptr, lse_ptr,
    delta_ptr, dstep_ptr,
    H, T, window, scale, dropout_p, largest,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ab, stride_ah, stride_aq, stride_ak,
    stride_rb, stride_rh, stride_rt, stride_gb, stride_gh, stride_gt,
    KIND: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    # each row's sum of the probabilities times their gradient, and its part of the step's gradient
    D_IN: tl.constexpr = (D + PAD_TO - 1) // PAD_TO * PAD_TO
    start_m, bh = tile_and_head(T, BLOCK_M)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    row = bh.to(tl.int64) * T
    length = load_length(lengths_ptr, b, T)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    grad_ptr += b * stride_gb + h * stride_gh
    if KIND is not None:
        table_ptr = table_of(
            table_ptr, b, h, largest, stride_ab, stride_ah, stride_aq, stride_ak, KIND
        )
    if rows_ptr is not None:
        rows_ptr += b * stride_rb + h * stride_rh
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_frames(q_ptr, offs_m, stride_qt, length, D_IN, BLOCK_D)
    grad = load_frames(grad_ptr, offs_m, stride_gt, length, D_IN, BLOCK_D)
    rows = _load_rows(rows_ptr, q, offs_m, stride_rt, length, KIND, D_IN, BLOCK_D)
    lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < length, other=0.0)
    inverse = tl.div_rn(1.0, load_step(step_ptr))
    lo, hi = visible_range(start_m, length, window, BLOCK_M, BLOCK_N)
    delta = tl.zeros((BLOCK_M,), dtype=tl.float32)
    dstep = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_frames(k_ptr, offs_n, stride_kt, length, D_IN, BLOCK_D)
        v = load_frames(v_ptr, offs_n, stride_vt, length, D_IN, BLOCK_D)
        scores = _masked_scores(
            q, k, rows, rows_ptr, table_ptr, start_m, start_n, offs_m, offs_n, length, window,
            scale * LOG2_E, largest, stride_aq, stride_ak, KIND, D_IN, BLOCK_D, BLOCK_M, BLOCK_N,
            INPUT_PRECISION,
        )  # fmt: skip
        probs = tl.exp2(scores - lse[:, None])
        grad_probs = tl.dot(grad, tl.trans(v), input_precision=INPUT_PRECISION)
        if seed_ptr is not None:
            keep = kept_by_dropout(seed, dropout_p, bh, offs_m[:, None], offs_n[None, :], T)
            grad_probs = tl.where(keep, grad_probs / (1.0 - dropout_p), 0.0)
        ratio = probs * inverse
        levels = round_probs(probs, inverse, HIGH)
        inside = ratio <= HIGH
        dstep += tl.sum(grad_probs * tl.where(inside, levels - ratio, levels), 1)
        delta += tl.sum(tl.where(inside, probs * grad_probs, 0.0), 1)
    tl.store(delta_ptr + row + offs_m, delta, mask=offs_m < T)
    tl.store(dstep_ptr + row + offs_m, dstep, mask=offs_m < T)


_launch = Launcher(_low_bit_attention_fwd_kernel)
_launch_delta = Launcher(_low_bit_attention_delta_kernel)


def low_bit_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scheme: Scheme | None,
    seed: Tensor | None, window: int | None, scale: float, dropout_p: float, step: Tensor,
    high: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward on q, k, v [B, H, T, D]. low_bit_op.py has checked the inputs.

    Returns:
        out: [B, H, T, D].
        lse: [B, H, T], fp32, as ``flash_attention_triton`` returns it.
    """
    B, H, T, D = q.shape
    out = empty_heads(q)
    lse = torch.empty(B, H, T, device=q.device, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    heads = padded(q), padded(k), padded(v)
    kind = None if scheme is None else scheme.kind
    config, constants = tile(
        "low_bit", D, q.dtype, kind, seed is not None, q.device, None, HIGH=high
    )
    tensors, largest, strides = scheme_arguments(scheme, q)
    args = (
        *heads, lengths, *tensors, seed, step, out, lse,
        H, T, None if window is None else min(window, T), scale, dropout_p, largest,
        *(stride for x in heads for stride in x.stride()[:3]), *strides, *out.stride()[:3],
    )  # fmt: skip
    _launch((triton.cdiv(T, config.block_m) * B * H,), args, constants)
    return out, lse


def low_bit_attention_backward_triton(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, lengths: Tensor | None,
    scheme: Scheme | None, seed: Tensor | None, window: int | None, scale: float, dropout_p: float,
    step: Tensor, high: int, needs_table: bool,
) -> tuple[Gradients, Tensor]:  # fmt: skip
    """Launch the kernels on tensors of the forward. low_bit_op.py has checked the inputs.

    Returns:
        What ``flash_attention_backward_triton`` returns, and the gradient of the step, fp32 [].
    """
    B, H, T, D = q.shape
    kind = None if scheme is None else scheme.kind
    delta = torch.empty(B, H, T, device=q.device, dtype=torch.float32)
    parts = torch.empty_like(delta)
    if q.numel() > 0:
        heads = padded(q), padded(k), padded(v)
        grad = padded(grad_out)
        config, constants = tile(
            "low_bit_delta", D, q.dtype, kind, seed is not None, q.device, None, HIGH=high
        )
        tensors, largest, strides = scheme_arguments(scheme, q)
        args = (
            *heads, lengths, *tensors, seed, step, grad, lse, delta, parts,
            H, T, None if window is None else min(window, T), scale, dropout_p, largest,
            *(stride for x in heads for stride in x.stride()[:3]), *strides, *grad.stride()[:3],
        )  # fmt: skip
        _launch_delta((triton.cdiv(T, config.block_m) * B * H,), args, constants)
    gradients = flash_attention_backward_triton(
        grad_out, q, k, v, None, lse, lengths, scheme, seed, window, scale, dropout_p, needs_table,
        (step, high, delta),
    )  # fmt: skip
    return gradients, parts.sum() * gradient_factor(q, high)
