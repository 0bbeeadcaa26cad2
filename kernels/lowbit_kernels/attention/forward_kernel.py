"""Triton kernel of flash_attention's forward: softmax over key tiles, kept in registers.

Dimension key: B batch, H heads, T frames, D head dimension; M queries and N keys of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.attention.config import default_config, input_precision, shared_bytes
from lowbit_kernels.attention.scores_kernel import (
    LN_2,
    LOG2_E,
    add_bias,
    kept_by_dropout,
    load_frames,
    load_length,
    store_frames,
    tile_and_head,
    visible,
    visible_range,
)


@triton.jit(do_not_specialize=["T", "window"])
def _flash_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, bias_ptr, seed_ptr, out_ptr, lse_ptr,
    H, T, window, scale, dropout_p,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ab, stride_ah, stride_aq, stride_ak,
    stride_ob, stride_oh, stride_ot,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    start_m, bh = tile_and_head(T, BLOCK_M)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    length = load_length(lengths_ptr, b, T)
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    if bias_ptr is not None:
        bias_ptr += b * stride_ab + h * stride_ah
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = load_frames(q_ptr, offs_m, stride_qt, length, D, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    lo, hi = visible_range(start_m, length, window, BLOCK_M, BLOCK_N)
    for start_n in range(lo, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_frames(k_ptr, offs_n, stride_kt, length, D, BLOCK_D)
        v = load_frames(v_ptr, offs_n, stride_vt, length, D, BLOCK_D)
        offs_q, offs_k = offs_m[:, None], offs_n[None, :]
        mask = visible(offs_q, offs_k, length, window)
        scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * (scale * LOG2_E)
        scores = add_bias(
            scores, bias_ptr, start_m, start_n, offs_q, offs_k, stride_aq, stride_ak, mask
        )
        scores = tl.where(mask, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # a row that has seen no key yet: -inf less -inf would be NaN
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        probs = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        if seed_ptr is not None:
            keep = kept_by_dropout(seed, dropout_p, bh, offs_q, offs_k, T)
            probs = tl.where(keep, probs, 0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision=INPUT_PRECISION)
        row_max = new_max

    is_empty = row_sum == 0.0
    denominator = tl.where(is_empty, 1.0, row_sum)
    lse = tl.where(is_empty, 0.0, row_max * LN_2 + tl.log(denominator))
    if seed_ptr is not None:
        denominator *= 1.0 - dropout_p
    acc = acc / denominator[:, None]
    tl.store(lse_ptr + bh.to(tl.int64) * T + offs_m, lse, mask=offs_m < T)
    out_ptr += b * stride_ob + h * stride_oh
    store_frames(out_ptr, offs_m, stride_ot, acc, T, D, BLOCK_D)


def empty_heads(q: Tensor) -> Tensor:
    """Uninitialized [B, H, T, D] in memory order [B, T, H, D], as the op's fake has it."""
    _, H, T, D = q.shape
    strides = (T * H * D, D, H * D, 1)
    return torch.empty_strided(q.shape, strides, dtype=q.dtype, device=q.device)


def rows(x: Tensor) -> Tensor:
    """The same values with adjacent head features, which the kernels rely on."""
    return x if x.stride(-1) == 1 else x.contiguous()


def bias_strides(bias: Tensor | None, q: Tensor) -> tuple[int, ...]:
    """Strides of the bias over [B, H, T, T], 0 where it is broadcast."""
    B, H, T, _ = q.shape
    return (0, 0, 0, 0) if bias is None else bias.expand(B, H, T, T).stride()


def flash_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    window: int | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel on q, k, v [B, H, T, D]. op.py has checked the inputs."""
    B, H, T, D = q.shape
    out = empty_heads(q)
    lse = torch.empty(B, H, T, device=q.device, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    q, k, v = rows(q), rows(k), rows(v)
    extra_terms = bias is not None or seed is not None
    config = default_config("forward", D, q.dtype, extra_terms, shared_bytes(q.device))
    _flash_attention_fwd_kernel[(triton.cdiv(T, config.block_m) * B * H,)](
        q, k, v, lengths, bias, seed, out, lse,
        H, T, None if window is None else min(window, T), scale, dropout_p,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides(bias, q),
        *out.stride()[:3],
        D=D, BLOCK_D=config.block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        INPUT_PRECISION=input_precision(q.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse
