"""Triton kernels of flash_attention's backward: no atomics, so the same bits every time.

One program owns a tile of queries (dq, a dense bias's gradient and those of gates or of queries
that score offsets), or of keys (dk and dv); ``offsets_kernel.py`` differentiates tables of offsets.

Read off sm_90's code and not measured: a step of 128 frames and 64, D = 64 in bf16, takes 295
instructions a warp of eight for dq, 368 where keys are masked, and 361 for dk and dv, which need no
mask but a window's: 168 more.

Dimension key: B batch, H heads, T frames, D head dimension; M queries and N keys of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.attention.forward_kernel import rows, scheme_arguments, steps, tile
from lowbit_kernels.attention.offsets_kernel import offsets_gradient_triton
from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.attention.scores_kernel import (
    LN_2,
    LOG2_E,
    PAD_TO,
    kept_by_dropout,
    load_bias,
    load_frames,
    load_offsets,
    load_step,
    offsets_of_keys,
    round_probs,
    score_ptrs,
    scores_of_offsets,
    start_of_step,
    store_frames,
    table_of,
    tile_and_head,
    utterance,
    visible,
    visible_keys,
    visible_range,
    whole_range,
)
from lowbit_kernels.cpu import empty_gates, empty_heads
from lowbit_kernels.matmul.launch import Constants, Launcher


@triton.jit(do_not_specialize=["T"])
def _flash_attention_bwd_delta_kernel(
    out_ptr, grad_ptr, lengths_ptr, delta_ptr,
    H, T, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    IS_PACKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    start_m, bh = tile_and_head(T, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    b, length, _ = utterance(lengths_ptr, b, T, IS_PACKED)
    out_ptr += b * stride_ob + h * stride_oh
    grad_ptr += b * stride_gb + h * stride_gh
    out = load_frames(out_ptr, offs_m, stride_ot, length, D, BLOCK_D).to(tl.float32)
    grad = load_frames(grad_ptr, offs_m, stride_gt, length, D, BLOCK_D).to(tl.float32)
    tl.store(delta_ptr + bh.to(tl.int64) * T + offs_m, tl.sum(out * grad, 1), mask=offs_m < T)


@triton.jit(do_not_specialize=["T", "window", "largest"])
def _flash_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, rows_ptr, seed_ptr, step_ptr, grad_ptr, lse_ptr,
    delta_ptr,
    dq_ptr, dtable_ptr, drows_ptr,
    H, T, window, scale, dropout_p, largest,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ab, stride_ah, stride_aq, stride_ak,
    stride_rb, stride_rh, stride_rt, stride_gb, stride_gh, stride_gt,
    stride_ob, stride_oh, stride_ot,
    KIND: tl.constexpr, IS_PACKED: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    IS_RELATIVE: tl.constexpr = KIND == "relative"
    HAS_BIAS: tl.constexpr = KIND is not None and not IS_RELATIVE
    D_IN: tl.constexpr = (D + PAD_TO - 1) // PAD_TO * PAD_TO
    start_m, bh = tile_and_head(T, BLOCK_M)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    row = bh.to(tl.int64) * T
    b, length, frames = utterance(lengths_ptr, b, T, IS_PACKED)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    grad_ptr += b * stride_gb + h * stride_gh
    if KIND is not None:
        table_ptr = table_of(
            table_ptr, b, h, largest, stride_ab, stride_ah, stride_aq, stride_ak, KIND
        )
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if step_ptr is not None:
        step = load_step(step_ptr)
        inverse = tl.div_rn(1.0, step)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_frames(q_ptr, offs_m, stride_qt, length, D_IN, BLOCK_D)
    grad = load_frames(grad_ptr, offs_m, stride_gt, length, D_IN, BLOCK_D)
    lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < length, other=0.0)
    delta = tl.load(delta_ptr + row + offs_m, mask=offs_m < length, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    lo, hi = visible_range(start_m, length, window, BLOCK_M, BLOCK_N)
    if rows_ptr is not None:
        rows_ptr += b * stride_rb + h * stride_rh
        if IS_RELATIVE:
            rows = load_frames(rows_ptr, offs_m, stride_rt, length, D_IN, BLOCK_D)
            drows = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        else:
            gate = tl.load(rows_ptr + offs_m * stride_rt, mask=offs_m < length, other=0.0)
            gate = gate.to(tl.float32)
            dgate = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # whole tiles come first, without a mask; loading a bias takes one, and other kernels have no
    # registers for two loops
    IS_MASKED: tl.constexpr = KIND is not None or q_ptr.dtype.element_ty == tl.float32
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
            # a query beyond the length adds 0, since its gradient is
            mask = visible_keys(offs_q, offs_k, length, window)
            if HAS_BIAS:
                mask = mask & (offs_q < length)
            scores = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            if IS_RELATIVE:
                scores = scores_of_offsets(
                    rows, table_ptr, start_m, start_n, stride_aq, largest, D_IN, BLOCK_D, BLOCK_M,
                    False, INPUT_PRECISION,
                )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), scores, input_precision=INPUT_PRECISION)
            scores *= scale * LOG2_E
            if HAS_BIAS:
                bias = load_bias(
                    table_ptr, start_m, start_n, offs_q, offs_k, stride_aq, stride_ak, mask
                )
                scores += bias if rows_ptr is None else bias * gate[:, None]
            probs = tl.exp2(scores - lse[:, None])
            if part == 1:
                probs = tl.where(mask, probs, 0.0)
            grad_probs = tl.dot(grad, tl.trans(v), input_precision=INPUT_PRECISION)
            if seed_ptr is not None:
                keep = kept_by_dropout(seed, dropout_p, bh, offs_q, offs_k, T)
                grad_probs = tl.where(keep, grad_probs / (1.0 - dropout_p), 0.0)
            if step_ptr is not None:
                # what was cut off has no gradient
                grad_probs = tl.where(probs * inverse <= HIGH, grad_probs, 0.0)
            grad_scores = probs * (grad_probs - delta[:, None])
            if dtable_ptr is not None:
                ptrs = score_ptrs(dtable_ptr + row * T, start_m, start_n, offs_q, offs_k, T, 1)
                tl.store(ptrs, grad_scores, mask=mask)
            dq = tl.dot(grad_scores.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)
            if IS_RELATIVE:
                first, second = offsets_of_keys(grad_scores.to(rows.dtype), BLOCK_M)
                start = start_n - start_m
                keys = load_offsets(table_ptr, start, stride_aq, largest, D_IN, BLOCK_D, BLOCK_M)
                drows = tl.dot(second, keys, drows, input_precision=INPUT_PRECISION)
                start -= BLOCK_M
                keys = load_offsets(table_ptr, start, stride_aq, largest, D_IN, BLOCK_D, BLOCK_M)
                drows = tl.dot(first, keys, drows, input_precision=INPUT_PRECISION)
            elif rows_ptr is not None:
                dgate += tl.sum(grad_scores * bias, 1)

    dq_ptr += b * stride_ob + h * stride_oh
    store_frames(dq_ptr, offs_m, stride_ot, dq * scale, frames, D, BLOCK_D)
    if IS_RELATIVE:
        drows_ptr += b * stride_ob + h * stride_oh
        store_frames(drows_ptr, offs_m, stride_ot, drows * scale, frames, D, BLOCK_D)
    elif rows_ptr is not None:
        if IS_PACKED:  # [1, H, total], in memory order [total, H]
            drows_ptr += b * H + h
            tl.store(drows_ptr + offs_m * H, dgate * LN_2, mask=offs_m < frames)
        else:
            tl.store(drows_ptr + row + offs_m, dgate * LN_2, mask=offs_m < frames)


@triton.jit(do_not_specialize=["T", "window", "largest"])
def _flash_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, rows_ptr, seed_ptr, step_ptr, grad_ptr, lse_ptr,
    delta_ptr,
    dk_ptr, dv_ptr,
    H, T, window, scale, dropout_p, largest,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ab, stride_ah, stride_aq, stride_ak,
    stride_rb, stride_rh, stride_rt, stride_gb, stride_gh, stride_gt,
    stride_ob, stride_oh, stride_ot,
    KIND: tl.constexpr, IS_PACKED: tl.constexpr, D: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    IS_RELATIVE: tl.constexpr = KIND == "relative"
    HAS_BIAS: tl.constexpr = KIND is not None and not IS_RELATIVE
    D_IN: tl.constexpr = (D + PAD_TO - 1) // PAD_TO * PAD_TO
    start_n, bh = tile_and_head(T, BLOCK_N)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    row = bh.to(tl.int64) * T
    b, length, frames = utterance(lengths_ptr, b, T, IS_PACKED)
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
    if step_ptr is not None:
        step = load_step(step_ptr)
        inverse = tl.div_rn(1.0, step)

    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_frames(k_ptr, offs_n, stride_kt, length, D_IN, BLOCK_D)
    v = load_frames(v_ptr, offs_n, stride_vt, length, D_IN, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    lo, hi = visible_range(start_n, length, window, BLOCK_N, BLOCK_M)
    for start_m in range(lo, hi, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = load_frames(q_ptr, offs_m, stride_qt, length, D_IN, BLOCK_D)
        grad = load_frames(grad_ptr, offs_m, stride_gt, length, D_IN, BLOCK_D)
        # everything is transposed, [BLOCK_N, BLOCK_M], so that no product transposes a result
        offs_q, offs_k = offs_m[None, :], offs_n[:, None]
        scores = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        if IS_RELATIVE:
            rows = load_frames(rows_ptr, offs_m, stride_rt, length, D_IN, BLOCK_D)
            scores = scores_of_offsets(
                rows, table_ptr, start_m, start_n, stride_aq, largest, D_IN, BLOCK_D, BLOCK_M,
                True, INPUT_PRECISION,
            )  # fmt: skip
        scores = tl.dot(k, tl.trans(q), scores, input_precision=INPUT_PRECISION)
        scores *= scale * LOG2_E
        if HAS_BIAS:
            mask = visible(offs_q, offs_k, length, window)
            bias = load_bias(
                table_ptr, start_m, start_n, offs_q, offs_k, stride_aq, stride_ak, mask
            )
            if rows_ptr is not None:
                gate = tl.load(rows_ptr + offs_m * stride_rt, mask=offs_m < length, other=0.0)
                bias *= gate.to(tl.float32)[None, :]
            scores += bias
        lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < length, other=0.0)
        probs = tl.exp2(scores - lse[None, :])
        # a query beyond the length adds 0, since its gradient is; a key there is not stored
        if window is not None:
            probs = tl.where(tl.abs(offs_q - offs_k) <= window, probs, 0.0)
        grad_probs = tl.dot(v, tl.trans(grad), input_precision=INPUT_PRECISION)
        dropped = probs
        if step_ptr is not None:
            dropped = round_probs(probs, inverse, HIGH) * step
        if seed_ptr is not None:
            keep = kept_by_dropout(seed, dropout_p, bh, offs_q, offs_k, T)
            dropped = tl.where(keep, dropped / (1.0 - dropout_p), 0.0)
            grad_probs = tl.where(keep, grad_probs / (1.0 - dropout_p), 0.0)
        dv = tl.dot(dropped.to(grad.dtype), grad, dv, input_precision=INPUT_PRECISION)
        delta = tl.load(delta_ptr + row + offs_m, mask=offs_m < length, other=0.0)
        if step_ptr is not None:
            # what was cut off has no gradient
            grad_probs = tl.where(probs * inverse <= HIGH, grad_probs, 0.0)
        grad_scores = probs * (grad_probs - delta[None, :])
        dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)

    dk_ptr += b * stride_ob + h * stride_oh
    dv_ptr += b * stride_ob + h * stride_oh
    valid = (offs_n < length)[:, None]
    dk, dv = tl.where(valid, dk * scale, 0.0), tl.where(valid, dv, 0.0)
    store_frames(dk_ptr, offs_n, stride_ot, dk, frames, D, BLOCK_D)
    store_frames(dv_ptr, offs_n, stride_ot, dv, frames, D, BLOCK_D)


_launch_delta = Launcher(_flash_attention_bwd_delta_kernel)
_launch_dq = Launcher(_flash_attention_bwd_dq_kernel)
_launch_dkdv = Launcher(_flash_attention_bwd_dkdv_kernel)
DELTA_ROWS = 64

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@cache
def _delta_constants(head_dim: int, is_packed: bool) -> Constants:
    block_d = max(16, triton.next_power_of_2(head_dim))
    return Constants({"IS_PACKED": is_packed, "D": head_dim, "BLOCK_D": block_d,
                      "BLOCK_M": DELTA_ROWS, "num_warps": 4})  # fmt: skip


def _row_sums(out: Tensor, grad_out: Tensor, starts: Tensor | None, lse: Tensor) -> Tensor:
    """The output times its gradient, summed over the features, like lse: [B, H, T]."""
    (B, H, T), delta = lse.shape, torch.empty_like(lse)
    longest = None if starts is None else T
    _launch_delta(
        (triton.cdiv(T, DELTA_ROWS) * B * H, 1),
        (out, grad_out, starts, delta, H, T, *steps(out, longest), *steps(grad_out, longest)),
        _delta_constants(out.shape[-1], starts is not None),
    )
    return delta


def flash_attention_backward_triton(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor,
    lengths: Tensor | None,
    scheme: Scheme | None,
    seed: Tensor | None,
    window: int | None,
    scale: float,
    dropout_p: float,
    needs_table: bool,
    low_bit: tuple[Tensor, int, Tensor] | None = None,
    longest: int | None = None,
) -> Gradients:
    """Launch the kernels on tensors of the forward. op.py has checked the inputs.

    ``low_bit``: where probabilities were rounded, instead of out, the distance of their levels, the
    highest one, and each row's sum of the probabilities times their gradient [B, H, T].
    ``longest``: of packed utterances, see ``flash_attention_triton``.

    Returns:
        The gradients of q, k, v, and of the scheme's table and rows: [0] where there are none, or
        the table's is not needed.
    """
    D, (B, H, T) = q.shape[-1], lse.shape
    dq, dk, dv = empty_heads(q), empty_heads(q), empty_heads(q)
    kind = None if scheme is None else scheme.kind
    has_rows = scheme is not None and scheme.rows is not None
    dtable, drows = q.new_empty(0), q.new_empty(0)
    if has_rows:
        is_relative, is_packed = kind == "relative", longest is not None
        drows = empty_heads(q) if is_relative else empty_gates(q, torch.float32, is_packed)
    needs_dense = kind == "dense" and needs_table
    if needs_dense:
        # zeros: tiles that no query sees are not visited
        dtable = lse.new_zeros(B, H, T, T)
    if q.numel() > 0:
        q, k, v, grad_out = rows(q), rows(k), rows(v), rows(grad_out)
        problem = (D, q.dtype, kind, seed is not None, q.device, longest is not None)
        if low_bit is None:
            assert out is not None, "the forward's"
            delta = _row_sums(out, grad_out, None if longest is None else lengths, lse)
            step, high = None, 0
        else:
            step, high, delta = low_bit
        of_scheme, largest, strides = scheme_arguments(scheme, q, longest)
        tensors = (q, k, v, lengths, *of_scheme, seed, step, grad_out, lse, delta)
        options = (H, T, None if window is None else min(window, T), scale, dropout_p, largest)
        strides = (
            *steps(q, longest), *steps(k, longest), *steps(v, longest), *strides,
            *steps(grad_out, longest),
        )  # fmt: skip
        config, constants = tile("backward_dq", *problem, HIGH=high)
        _launch_dq(
            (triton.cdiv(T, config.block_m) * B * H, 1),
            (*tensors, dq, dtable if needs_dense else None, drows if has_rows else None,
             *options, *strides, *steps(dq, longest)),
            constants,
        )  # fmt: skip
        config, constants = tile("backward_dkdv", *problem, HIGH=high)
        _launch_dkdv(
            (triton.cdiv(T, config.block_n) * B * H, 1),
            (*tensors, dk, dv, *options, *strides, *steps(dk, longest)),
            constants,
        )
        if scheme is not None and needs_table and not needs_dense:
            dtable = offsets_gradient_triton(B, tensors, scheme, options, strides, problem, high)
    elif scheme is not None and needs_table:
        dtable = lse.new_zeros(scheme.table.shape)
    if scheme is not None and scheme.rows is not None:
        drows = drows.to(scheme.rows.dtype)
    if scheme is not None and needs_table:
        dtable = dtable.sum_to_size(scheme.table.shape).to(scheme.table.dtype)
    return dq, dk, dv, dtable, drows
