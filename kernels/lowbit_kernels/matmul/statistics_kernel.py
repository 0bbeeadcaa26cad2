"""Triton functions for LayerNorm across two matmuls: a row's statistics, found and put together.

Dimension key: M rows, N features of the rows, T tiles of ``STATS_WIDTH`` features.

A tile's statistics are its sum and the sum of its squared deviations from its own mean. They are
merged without cancellation (Chan, Golub, LeVeque, 1983), by each program that reads the rows: one
more load of 8 bytes a tile and row is less than a launch that would merge them once.

Compiled for sm_90, not measured: of a 128 x 256 tile, whose matrix operations take about 16,400
cycles at K = 1024, finding the statistics adds 1230 instructions a thread (2,500 issue cycles), and
merging and applying those of 1024 features 710 (1,400; with Triton 3.6 2,600). The norm's scale is
49 instructions in each of 16 steps, which then issue for 468 of the 1024 cycles that their matrix
operations take. A LayerNorm of its own reads and writes every row, and is a launch.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from lowbit_kernels.matmul.reference import STATS_WIDTH

_WIDTH = tl.constexpr(STATS_WIDTH)


@triton.jit
def store_statistics(y, stats_ptr, start_n, offs_m, M, N):
    # y [BLOCK_N, BLOCK_M] fp32, of the features from start_n on
    BLOCK_N: tl.constexpr = y.shape[0]
    BLOCK_M: tl.constexpr = y.shape[1]
    TILES: tl.constexpr = BLOCK_N // _WIDTH
    tile = tl.arange(0, TILES)
    left = N - start_n - tile * _WIDTH
    count = tl.minimum(tl.maximum(left, 1), _WIDTH).to(tl.float32)
    inside = tl.arange(0, _WIDTH)[None, :, None] < left[:, None, None]
    y = tl.where(inside, y.reshape(TILES, _WIDTH, BLOCK_M), 0.0)
    total = tl.sum(y, 1)
    centered = tl.where(inside, y - (total / count[:, None])[:, None, :], 0.0)
    ptrs = stats_ptr + (start_n // _WIDTH + tile)[:, None] * (2 * M) + offs_m[None, :]
    mask = (left > 0)[:, None] & (offs_m < M)[None, :]
    tl.store(ptrs, total, mask=mask)
    tl.store(ptrs + M, tl.sum(centered * centered, 1), mask=mask)


@triton.jit
def merge_statistics(stats_ptr, rows, M, N, EPS: tl.constexpr, TILES: tl.constexpr):
    # mean and 1 / deviation of rows; TILES: T, rounded up to a power of two
    tile, num_tiles = tl.arange(0, TILES)[:, None], tl.cdiv(N, _WIDTH)
    is_last, last = tile == num_tiles - 1, (N - (num_tiles - 1) * _WIDTH) * 1.0
    ptrs = stats_ptr + tile * (2 * M) + rows[None, :]
    mask = (tile < num_tiles) & (rows < M)[None, :]
    total = tl.load(ptrs, mask=mask, other=0.0)
    squares = tl.load(ptrs + M, mask=mask, other=0.0)
    mean = tl.sum(total, 0) / N
    # only the last count needs a division
    shift = total * tl.where(is_last, 1.0 / last, 1.0 / _WIDTH) - mean[None, :]
    count = tl.where(tile < num_tiles, tl.where(is_last, last, 1.0 * _WIDTH), 0.0)
    variance = tl.sum(squares + count * shift * shift, 0) / N
    return mean, tl.rsqrt(variance + EPS)
