"""What the forward and the backward kernels share: which scores count, and their tiles.

Dimension key: B batch, H heads, T frames, D head dimension; M queries and N keys of a tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_and_head(T, BLOCK: tl.constexpr):
    # one axis, since the others end at 65,535; the tiles of a head are neighbors and share its keys
    num_tiles = tl.cdiv(T, BLOCK)
    return tl.program_id(0) % num_tiles * BLOCK, tl.program_id(0) // num_tiles


@triton.jit
def load_length(lengths_ptr, b, T):
    if lengths_ptr is None:
        length = T
    else:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), T).to(tl.int32)
    return length


@triton.jit
def load_frames(ptr, offs_t, stride_t, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # [BLOCK_T, BLOCK_D], 0 beyond the length and beyond D
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_t[:, None] < length
    if BLOCK_D > D:
        mask = mask & (offs_d[None, :] < D)
    ptrs = ptr + offs_t[:, None].to(tl.int64) * stride_t + offs_d[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_frames(ptr, offs_t, stride_t, tile, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_t[:, None] < T
    if BLOCK_D > D:
        mask = mask & (offs_d[None, :] < D)
    ptrs = ptr + offs_t[:, None].to(tl.int64) * stride_t + offs_d[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible_range(start, length, window, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # of the frames seen from [start, start + BLOCK): the first, on a multiple of STEP, and the end
    lo = 0
    hi = length
    if window is not None:
        lo = tl.maximum(start - window, 0) // STEP * STEP
        hi = tl.minimum(start + BLOCK + window, length)
    hi = tl.where(start < length, hi, 0)
    return lo, hi


@triton.jit
def visible(offs_q, offs_k, length, window):
    mask = (offs_q < length) & (offs_k < length)
    if window is not None:
        mask = mask & (tl.abs(offs_q - offs_k) <= window)
    return mask


@triton.jit
def score_ptrs(ptr, start_q, start_k, offs_q, offs_k, stride_q, stride_k):
    # 64 bits for the tile, 32 inside it: a tile of 64-bit offsets would not fit the registers
    ptr += tl.cast(start_q, tl.int64) * stride_q
    ptr += tl.cast(start_k, tl.int64) * stride_k
    return ptr + ((offs_q - start_q) * stride_q + (offs_k - start_k) * stride_k)


@triton.jit
def add_bias(scores, bias_ptr, start_q, start_k, offs_q, offs_k, stride_q, stride_k, mask):
    # scores are in units of log2, which exp2 takes back
    if bias_ptr is not None:
        ptrs = score_ptrs(bias_ptr, start_q, start_k, offs_q, offs_k, stride_q, stride_k)
        scores += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    return scores


@triton.jit
def kept_by_dropout(seed, dropout_p, bh, offs_q, offs_k, T):
    # a function of the position alone, so that every kernel draws the same mask
    random, _, _, _ = tl.philox(seed, offs_q * T + offs_k, bh, 0, 0)
    return tl.uint_to_uniform_float(random) >= dropout_p
