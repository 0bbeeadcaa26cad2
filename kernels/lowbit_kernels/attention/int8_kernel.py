"""Triton kernel that rounds queries, and keys less their mean, to int8.

A program owns a block of frames in one head of one utterance, and takes the mean of the keys by
itself, 32 KB from the cache for 64 features in 16 bits, where a sum of their own would be a launch
more. One read and half a write of q and k otherwise: a few microseconds, predicted to pay only at
thousands of frames, where half of the products run at twice the rate.

Dimension key: B batch, H heads, T frames, D head dimension.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.attention.forward_kernel import rows
from lowbit_kernels.attention.int8_reference import BLOCK_FRAMES, MIN_SCALE, NUM_MEAN_FRAMES
from lowbit_kernels.attention.scores_kernel import (
    PAD_TO,
    load_frames,
    load_length,
    store_frames,
)
from lowbit_kernels.cpu import empty_heads
from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.quantize_kernel import round_to_int8

_MIN_SCALE, MEAN_FRAMES = tl.constexpr(MIN_SCALE), tl.constexpr(NUM_MEAN_FRAMES)


@triton.jit
def _round_block(
    x, out_ptr, scale_ptr, offs_t, stride_t, T, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    scale = tl.maximum(tl.div_rn(tl.max(tl.max(tl.abs(x), 1), 0), 127.0), _MIN_SCALE)
    tl.store(scale_ptr, scale)
    q, _ = round_to_int8(x, tl.div_rn(1.0, scale), CLAMP=False)
    store_frames(out_ptr, offs_t, stride_t, q, T, D, BLOCK_D)


@triton.jit(do_not_specialize=["T"])
def _quantize_heads_kernel(
    q_ptr, k_ptr, lengths_ptr, q_out_ptr, k_out_ptr, scales_ptr,
    H, T, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_ob, stride_oh, stride_ot,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK)
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    length = load_length(lengths_ptr, b, T)
    D_IN: tl.constexpr = (D + PAD_TO - 1) // PAD_TO * PAD_TO
    offs_t = block * BLOCK + tl.arange(0, BLOCK)
    offset = b * stride_ob + h * stride_oh
    scales_ptr += bh.to(tl.int64) * 2 * blocks + block
    q_ptr += b * stride_qb + h * stride_qh
    q = load_frames(q_ptr, offs_t, stride_qt, length, D_IN, BLOCK_D).to(tl.float32)
    _round_block(q, q_out_ptr + offset, scales_ptr, offs_t, stride_ot, T, D, BLOCK_D)

    k_ptr += b * stride_kb + h * stride_kh
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    count = tl.minimum(length, MEAN_FRAMES)
    for start in range(0, count, BLOCK):
        frames = (start + tl.arange(0, BLOCK)) * length // count
        k = load_frames(k_ptr, frames, stride_kt, length, D_IN, BLOCK_D)
        total += tl.sum(k.to(tl.float32), 0)
    mean = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32))
    own = load_frames(k_ptr, offs_t, stride_kt, length, D_IN, BLOCK_D).to(tl.float32)
    own = tl.where((offs_t < length)[:, None], own - mean[None, :], 0.0)
    scales_ptr += blocks
    _round_block(own, k_out_ptr + offset, scales_ptr, offs_t, stride_ot, T, D, BLOCK_D)


_launch = Launcher(_quantize_heads_kernel)


@cache
def _constants(head_dim: int) -> Constants:
    block_d = triton.next_power_of_2(head_dim)
    return Constants({
        "D": head_dim, "BLOCK_D": block_d, "BLOCK": BLOCK_FRAMES,
        "num_warps": max(4, block_d // 16),
    })  # fmt: skip


def quantize_heads_triton(
    q: Tensor, k: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``quantize_heads_reference``, on q and k [B, H, T, D]."""
    B, H, T, D = q.shape
    q_out, k_out = empty_heads(q, torch.int8), empty_heads(k, torch.int8)
    blocks = triton.cdiv(T, BLOCK_FRAMES)
    scales = torch.empty(B, H, 2, blocks, device=q.device, dtype=torch.float32)
    q, k = rows(q), rows(k)
    args = (
        q, k, lengths, q_out, k_out, scales,
        H, T, *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3],
    )  # fmt: skip
    _launch((blocks * B * H,), args, _constants(D))
    return q_out, k_out, scales
