"""Triton functions of a tile of a linear layer: its weights, decoded, and its end.

Dimension key: M rows of the input, N output features, N_out N / 2 with ``glu`` and N without; G
groups of them, side by side in memory.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from lowbit_kernels.matmul.decode_kernel import decode_asymmetric, decode_slice, side_by_side
from lowbit_kernels.matmul.epilogue_kernel import activate
from lowbit_kernels.matmul.quantize_kernel import max_or_nan, round_to_int8
from lowbit_kernels.matmul.statistics_kernel import store_statistics

MAX_ROWS_WRITTEN = tl.constexpr(32)


@triton.jit
def load_bytes(q_ptrs, start, row_bytes, EVEN_K: tl.constexpr):
    # q_ptrs [BLOCK_N, BLOCK_BYTES], of the first bytes of each row
    if EVEN_K:
        q = tl.load(q_ptrs + start)
    else:
        # a step may reach past the end of a row
        offs = start + tl.arange(0, q_ptrs.shape[1])
        q = tl.load(q_ptrs + start, mask=(offs < row_bytes)[None, :], other=0)
    return q


@triton.jit
def _decode(
    q, scale_ptr, group_scale_ptr, zero_point_ptr, group_rows, start, num_groups,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SLICE: tl.constexpr, DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    # the weights of one slice of q, those of K from start on
    if GROUP_SIZE > 0:
        # in L1 after the first of a row's groups
        group = group_rows + tl.minimum(start // GROUP_SIZE, num_groups - 1)
    # 8-bit weights are one slice
    SHIFT: tl.constexpr = 0 if BITS == 8 else SLICE * BITS
    if zero_point_ptr is not None:
        zero = tl.load(zero_point_ptr + group).to(tl.float32)
        step = tl.load(scale_ptr + group).to(tl.float32)
        w = decode_asymmetric(q, SHIFT, zero[:, None], step[:, None], BITS, DTYPE)
    elif GROUP_SIZE > 0:
        w = decode_slice(q, tl.load(group_scale_ptr + group)[:, None], BITS, SHIFT, DTYPE, PAIRS)
    else:
        w = decode_slice(q, None, BITS, SHIFT, DTYPE, PAIRS)
    return w


@triton.jit
def decode_run(
    q, q_ptrs, scale_ptr, group_scale_ptr, zero_point_ptr, group_rows, start, row_bytes,
    num_groups,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, SLICE: tl.constexpr, DTYPE: tl.constexpr,
    PAIRS: tl.constexpr, PER_DOT: tl.constexpr, BLOCK_BYTES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    # the weights that are multiplied at once, from start on: PER_DOT slices of the block q, or at
    # 8 bits bytes of their own
    if BITS == 8:
        q = load_bytes(q_ptrs, start, row_bytes, EVEN_K)
    w = _decode(
        q, scale_ptr, group_scale_ptr, zero_point_ptr, group_rows, start, num_groups,
        BITS, GROUP_SIZE, SLICE, DTYPE, PAIRS,
    )  # fmt: skip
    if PER_DOT == 2:
        start += BLOCK_BYTES
        if BITS == 8:
            q = load_bytes(q_ptrs, start, row_bytes, EVEN_K)
        w2 = _decode(
            q, scale_ptr, group_scale_ptr, zero_point_ptr, group_rows, start, num_groups,
            BITS, GROUP_SIZE, SLICE + 1, DTYPE, PAIRS,
        )  # fmt: skip
        w = side_by_side(w, w2)
    return w


@triton.jit
def scale_columns(w, norm_weight_ptr, start, K, EVEN_K: tl.constexpr):
    # integers times the scale of a norm of x, rounded to the dtype of x
    offs_k = start + tl.arange(0, w.shape[1])
    if EVEN_K:
        factor = tl.load(norm_weight_ptr + offs_k)
    else:
        factor = tl.load(norm_weight_ptr + offs_k, mask=offs_k < K, other=0.0)
    return w * factor[None, :]


@triton.jit
def tile_rows(start_n, N, N_out, BLOCK_N: tl.constexpr, IS_GLU: tl.constexpr):
    # rows of the weight that a tile takes, those past the end the last one; and their numbers, to
    # be held against the end
    index = tl.arange(0, BLOCK_N)
    if IS_GLU:
        # value and gate alternate every 8 rows: the matrix unit gives both to one thread
        index_n = start_n + index // 16 * 8 + index % 8
        offs_n = tl.minimum(index_n, N_out - 1) + index // 8 % 2 * N_out
    else:
        index_n = start_n + index
        offs_n = tl.minimum(index_n, N - 1)
    return offs_n, index_n


@triton.jit
def write_tile(
    acc, scale, bias, mean, rstd, column, shift, x_scale_ptr, residual_ptr, y_ptr, z_ptr,
    out_scale_ptr, stats_ptr, out_offset_ptr, largest_ptr,
    start_m, start_n, offs_n, mask_n, M, N, N_out, stride_rm,
    EPILOGUE: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    # a few rows at a time: those of a whole tile, with their addresses, would not fit in registers
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    if BLOCK_M > MAX_ROWS_WRITTEN:
        HALF: tl.constexpr = BLOCK_M // 2
        first, second = acc.reshape(BLOCK_N, 2, HALF).permute(0, 2, 1).split()
        write_tile(
            first, scale, bias, mean, rstd, column, shift, x_scale_ptr, residual_ptr, y_ptr, z_ptr,
            out_scale_ptr, stats_ptr, out_offset_ptr, largest_ptr,
            start_m, start_n, offs_n, mask_n, M, N, N_out, stride_rm,
            EPILOGUE, GROUPS, FIRST,
        )  # fmt: skip
        write_tile(
            second, scale, bias, mean, rstd, column, shift, x_scale_ptr, residual_ptr, y_ptr, z_ptr,
            out_scale_ptr, stats_ptr, out_offset_ptr, largest_ptr,
            start_m + HALF, start_n, offs_n, mask_n, M, N, N_out, stride_rm,
            EPILOGUE, GROUPS, FIRST + HALF,
        )  # fmt: skip
    else:
        offs_m = start_m + tl.arange(0, BLOCK_M)
        rows = tl.minimum(offs_m, M - 1)
        mask_m = (offs_m < M)[None, :]
        z = acc.to(tl.float32)
        if mean is not None:
            # LayerNorm of x. A gather passes a few rows on, where a split would pass all at once
            index = FIRST + tl.arange(0, BLOCK_M)
            z -= tl.gather(mean, index, 0)[None, :] * column[:, None]
            z = z * tl.gather(rstd, index, 0)[None, :] + shift[:, None]
        if scale is not None:
            z *= scale[:, None]
        if x_scale_ptr is not None:
            z *= tl.load(x_scale_ptr + rows)[None, :]
        if bias is not None:
            z += bias[:, None]
        if z_ptr is not None:
            z_ptrs = z_ptr + offs_m[None, :] * (N * GROUPS) + offs_n[:, None]
            tl.store(z_ptrs, z.to(z_ptr.dtype.element_ty), mask=mask_m & mask_n[:, None])
        BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if EPILOGUE == "glu" else BLOCK_N
        if EPILOGUE == "glu":
            pairs = z.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1)
            value, gate = pairs.split()
            y = (value * tl.sigmoid(gate)).reshape(BLOCK_OUT, BLOCK_M)
        else:
            y = activate(z, EPILOGUE, y_ptr.dtype.element_ty.primitive_bitwidth < 32)
        offs_out = start_n + tl.arange(0, BLOCK_OUT)
        mask = mask_m & (offs_out < N_out)[:, None]
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + rows[None, :] * stride_rm + offs_out[:, None]
            y += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        if out_offset_ptr is not None:
            y -= tl.load(out_offset_ptr + tl.minimum(offs_out, N_out - 1))[:, None]
        if largest_ptr is not None:
            # rounded after the maximum; features past the end repeat the last
            largest = tl.reduce(tl.abs(y), 0, max_or_nan).to(y_ptr.dtype.element_ty)
            largest_ptrs = largest_ptr + (start_n // BLOCK_OUT).to(tl.int64) * M + offs_m
            tl.store(largest_ptrs, largest.to(tl.float32), mask=offs_m < M)
        if out_scale_ptr is not None:
            y, _ = round_to_int8(y, tl.div_rn(1.0, tl.load(out_scale_ptr)), CLAMP=True)
        y_ptrs = y_ptr + offs_m[None, :] * (N_out * GROUPS) + offs_out[:, None]
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptrs, y, mask=mask)
        if stats_ptr is not None:
            store_statistics(y.to(tl.float32), stats_ptr, start_n, offs_m, M, N_out)
