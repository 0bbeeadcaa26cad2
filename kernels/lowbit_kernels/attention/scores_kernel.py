"""What the forward and the backward kernels share: which scores count, and their tiles.

A position scheme is one of three kinds, and has a table and numbers of its own for each query:
``"dense"``, a bias [B, H, T, T]; ``"offset"``, a bias [H, 2 R + 1] of the offset from query to key,
times a gate [B, H, T]; ``"relative"``, keys [H, 2 R + 1, D] of the offsets and the queries
[B, H, T, D] that score them. Tables of offsets are read from their middle, offset 0.

The last kind is computed a band at a time: the keys of a tile are at as many offsets as it has
queries and keys together, of which row r sees a run that begins r offsets further left.

Dimension key: B batch, H heads, T frames, D head dimension; M queries and N keys of a tile; R
largest offset of a table.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from lowbit_kernels.attention.int8_reference import BLOCK_FRAMES
from lowbit_kernels.attention.low_bit_reference import MIN_STEP

LOG2_E = tl.constexpr(1.4426950408889634)
# inputs have so many features, or a multiple, and zeros past D: whole loads of 16 bytes
PAD_TO = tl.constexpr(16)
LN_2 = tl.constexpr(0.6931471805599453)
_MIN_STEP = tl.constexpr(MIN_STEP)
# frames of int8 queries or keys that share a scale; a tile has as many keys, or a divisor
SCALE_BLOCK = tl.constexpr(BLOCK_FRAMES)


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
def utterance(lengths_ptr, b, T, IS_PACKED: tl.constexpr):
    # where it begins, in its tensors' first strides; its valid frames, and those it has rows for;
    # packed ones begin at a frame, the strides of frames being the first ones, too
    if IS_PACKED:
        begin = tl.load(lengths_ptr + b).to(tl.int64)
        frames = tl.load(lengths_ptr + b + 1).to(tl.int64) - begin
        frames = tl.minimum(tl.maximum(frames, 0), T).to(tl.int32)
        length = frames
    else:
        begin, frames = b, T
        length = load_length(lengths_ptr, b, T)
    return begin, length, frames


@triton.jit
def table_of(ptr, b, h, largest, stride_b, stride_h, stride_q, stride_k, KIND: tl.constexpr):
    # the position scheme's table of a head, that of offsets from its middle on
    ptr += b * stride_b + h * stride_h
    if KIND == "offset":
        ptr += tl.cast(largest, tl.int64) * stride_k
    elif KIND == "relative":
        ptr += tl.cast(largest, tl.int64) * stride_q
    return ptr


@triton.jit
def load_frames(ptr, offs_t, stride_t, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # [BLOCK_T, BLOCK_D], 0 before the first frame, beyond the length and beyond D
    offs_d = tl.arange(0, BLOCK_D)
    mask = ((offs_t >= 0) & (offs_t < length))[:, None]
    if BLOCK_D > D:
        mask = mask & (offs_d[None, :] < D)
    ptrs = ptr + offs_t[:, None].to(tl.int64) * stride_t + offs_d[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def add_features(tile, ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    # D numbers to each row, rounded as PyTorch rounds a sum of tensors of the tile's dtype
    offs_d = tl.arange(0, BLOCK_D)
    added = tl.load(ptr + offs_d, mask=offs_d < D, other=0.0).to(tile.dtype)
    return (tile.to(tl.float32) + added.to(tl.float32)[None, :]).to(tile.dtype)


@triton.jit
def load_offsets(ptr, start, stride_o, largest, D: tl.constexpr, BLOCK_D: tl.constexpr,
                 COUNT: tl.constexpr, right=None):  # fmt: skip
    # the keys [COUNT, BLOCK_D] of offsets from start on, 0 where the table has none or, with the
    # largest offset to the right given, those of its ends
    offs_o, offs_d = start + tl.arange(0, COUNT), tl.arange(0, BLOCK_D)
    if right is not None:
        offs_o = tl.minimum(tl.maximum(offs_o, -largest), right)
        mask = (offs_o <= right)[:, None]
    else:
        mask = (tl.abs(offs_o) <= largest)[:, None]
    if BLOCK_D > D:
        mask = mask & (offs_d[None, :] < D)
    ptrs = ptr + offs_o[:, None].to(tl.int64) * stride_o + offs_d[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def take_flat(x, index, COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    # through shared memory: along an axis of a tile it would be a shuffle and a select a number
    taken = tl.gather(tl.reshape(x, [COUNT]), tl.reshape(index, [ROWS * COLS]), 0)
    return tl.reshape(taken, [ROWS, COLS])


@triton.jit
def scores_of_offsets(
    rows, table_ptr, start_q, start_k, stride_o, largest, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, IS_TRANSPOSED: tl.constexpr, INPUT_PRECISION: tl.constexpr, right=None,
):  # fmt: skip
    # rows times a band, the keys of 2 BLOCK offsets, by key: [query, key] or transposed
    start, line = start_k - start_q - BLOCK, tl.arange(0, BLOCK)
    keys = load_offsets(table_ptr, start, stride_o, largest, D, BLOCK_D, 2 * BLOCK, right)
    if IS_TRANSPOSED:
        band = tl.dot(keys, tl.trans(rows), input_precision=INPUT_PRECISION)
        index = (BLOCK + line[:, None] - line[None, :]) * BLOCK + line[None, :]
    else:
        band = tl.dot(rows, tl.trans(keys), input_precision=INPUT_PRECISION)
        index = line[:, None] * (2 * BLOCK) + (BLOCK + line[None, :] - line[:, None])
    return take_flat(band, index, 2 * BLOCK * BLOCK, BLOCK, BLOCK)


@triton.jit
def offsets_of_keys(tile, BLOCK: tl.constexpr):
    # back: the first BLOCK offsets and the second, 0 at those of no key
    row, offset = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    index = row * BLOCK + ((offset + row) & (BLOCK - 1))
    band = take_flat(tile, index, BLOCK * BLOCK, BLOCK, BLOCK)
    is_first = offset + row >= BLOCK
    return tl.where(is_first, band, 0), tl.where(is_first, 0, band)


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
def whole_range(start, length, window, lo, hi, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # of [lo, hi), the steps of which every frame of [start, start + BLOCK) sees every frame
    first, end = lo, tl.minimum(length // STEP * STEP, hi)
    if window is not None:
        first = tl.maximum(tl.cdiv(start + BLOCK - 1 - window, STEP) * STEP, lo)
        end = tl.minimum((start + window + 1) // STEP * STEP, end)
    return first, tl.maximum(first, end)


@triton.jit
def start_of_step(step, part: tl.constexpr, lo, whole, whole_end):
    # part 0 are the whole steps, part 1 those before and after them
    start = whole + step if part == 0 else lo + step
    if part == 1:
        start += tl.where(start >= whole, whole_end - whole, 0)
    return start


@triton.jit
def visible_keys(offs_q, offs_k, length, window):
    # of queries that may lie beyond the length
    mask = offs_k < length
    if window is not None:
        mask = mask & (tl.abs(offs_q - offs_k) <= window)
    return mask


@triton.jit
def visible(offs_q, offs_k, length, window):
    return visible_keys(offs_q, offs_k, length, window) & (offs_q < length)


@triton.jit
def score_ptrs(ptr, start_q, start_k, offs_q, offs_k, stride_q, stride_k):
    # 64 bits for the tile, 32 inside it: a tile of 64-bit offsets would not fit the registers
    ptr += tl.cast(start_q, tl.int64) * stride_q
    ptr += tl.cast(start_k, tl.int64) * stride_k
    return ptr + ((offs_q - start_q) * stride_q + (offs_k - start_k) * stride_k)


@triton.jit
def load_bias(ptr, start_q, start_k, offs_q, offs_k, stride_q, stride_k, mask):
    # in units of log2, which exp2 takes back
    ptrs = score_ptrs(ptr, start_q, start_k, offs_q, offs_k, stride_q, stride_k)
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def kept_by_dropout(seed, dropout_p, bh, offs_q, offs_k, T):
    # a function of the position alone, so that every kernel draws the same mask
    random, _, _, _ = tl.philox(seed, offs_q * T + offs_k, bh, 0, 0)
    return tl.uint_to_uniform_float(random) >= dropout_p


@triton.jit
def load_step(step_ptr):
    return tl.maximum(tl.load(step_ptr).to(tl.float32), _MIN_STEP)


@triton.jit
def round_probs(probs, inverse, HIGH: tl.constexpr):
    # the nearest of the levels 0 to HIGH, half to even: 1.5 * 2 ** 23 leaves no bits for a fraction
    return (tl.minimum(probs * inverse, HIGH) + 12582912.0) - 12582912.0
