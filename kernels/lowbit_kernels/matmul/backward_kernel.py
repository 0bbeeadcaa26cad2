"""Triton kernel for dx = dz @ W, the gradient of a low-bit linear layer's input.

Dimension key: M rows, N output features (the reduction here), K input features.

The weight is the right operand. One program owns all slices of BLOCK_BYTES bytes of every row, that
is their 8 / BITS times as many columns of dx, in runs of 32.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.decode_kernel import decode_asymmetric, decode_slice, side_by_side
from lowbit_kernels.matmul.dispatch import choose_dx_config
from lowbit_kernels.matmul.gpu import pairs_of


@triton.jit
def _per_column(values, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr):
    # [BLOCK_N, BLOCK_BYTES / 32] to [BLOCK_N, BLOCK_BYTES]: the 32 bytes of a block share a value
    RUNS: tl.constexpr = BLOCK_BYTES // 32
    wide = tl.broadcast_to(values[:, :, None], (BLOCK_N, RUNS, 32))
    return wide.reshape(BLOCK_N, BLOCK_BYTES)


@triton.jit
def _decode_slices(
    q, scale_ptr, group_scale_ptr, zero_point_ptr, scale, rows, blocks, num_groups,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    # weights of COUNT slices of q [BLOCK_N, BLOCK_BYTES], one beside the other
    if COUNT > 1:
        HALF: tl.constexpr = COUNT // 2
        first = _decode_slices(
            q, scale_ptr, group_scale_ptr, zero_point_ptr, scale, rows, blocks, num_groups,
            FIRST, HALF, BITS, GROUP_SIZE, DTYPE, PAIRS,
        )  # fmt: skip
        second = _decode_slices(
            q, scale_ptr, group_scale_ptr, zero_point_ptr, scale, rows, blocks, num_groups,
            FIRST + HALF, HALF, BITS, GROUP_SIZE, DTYPE, PAIRS,
        )  # fmt: skip
        w = side_by_side(first, second)
    else:
        BLOCK_N: tl.constexpr = q.shape[0]
        BLOCK_BYTES: tl.constexpr = q.shape[1]
        SHIFT: tl.constexpr = FIRST * BITS
        if GROUP_SIZE > 0:
            groups = (blocks * (256 // BITS) + FIRST * 32) // GROUP_SIZE
            offs_g = rows[:, None] * num_groups + tl.minimum(groups, num_groups - 1)[None, :]
        if zero_point_ptr is not None:
            zero = tl.load(zero_point_ptr + offs_g).to(tl.float32)
            step = tl.load(scale_ptr + offs_g).to(tl.float32)
            zero = _per_column(zero, BLOCK_N, BLOCK_BYTES)
            step = _per_column(step, BLOCK_N, BLOCK_BYTES)
            w = decode_asymmetric(q, SHIFT, zero, step, BITS, DTYPE)
        else:
            if GROUP_SIZE > 0:
                m = _per_column(tl.load(group_scale_ptr + offs_g), BLOCK_N, BLOCK_BYTES)
                w = decode_slice(q, m, BITS, SHIFT, DTYPE, PAIRS)
            else:
                w = decode_slice(q, None, BITS, SHIFT, DTYPE, PAIRS)
            # in fp32, as the scale may be too small for fp16
            w = (w.to(tl.float32) * scale[:, None]).to(DTYPE)
    return w


@triton.jit(do_not_specialize=["M"])
def _linear_dx_kernel(
    dz_ptr, qweight_ptr, scale_ptr, group_scale_ptr, zero_point_ptr, dx_ptr,
    M, N, K, row_bytes, num_groups,
    stride_dm, stride_qn,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = 8 // BITS
    BLOCK_K: tl.constexpr = SLICES * BLOCK_BYTES
    DTYPE: tl.constexpr = dz_ptr.dtype.element_ty
    tiles_k = tl.cdiv(row_bytes, BLOCK_BYTES)
    start_byte = tl.program_id(0) % tiles_k * BLOCK_BYTES
    offs_j = start_byte + tl.arange(0, BLOCK_BYTES)
    blocks = start_byte // 32 + tl.arange(0, BLOCK_BYTES // 32)
    offs_m = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, M - 1)

    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # weights of rows past the end are those of the last row, so dz must be 0 there
        rows_n = tl.minimum(offs_n, N - 1)
        dz_ptrs = dz_ptr + rows[:, None] * stride_dm + offs_n[None, :]
        dz = tl.load(dz_ptrs, mask=(offs_n < N)[None, :], other=0.0)
        q_ptrs = qweight_ptr + rows_n.to(tl.int64)[:, None] * stride_qn + offs_j[None, :]
        q = tl.load(q_ptrs, mask=(offs_j < row_bytes)[None, :], other=0)
        scale = tl.load(scale_ptr + rows_n) if zero_point_ptr is None else None
        w = _decode_slices(
            q, scale_ptr, group_scale_ptr, zero_point_ptr, scale, rows_n, blocks, num_groups,
            0, SLICES, BITS, GROUP_SIZE, DTYPE, PAIRS,
        )  # fmt: skip
        acc = tl.dot(dz, w, acc)

    # column c of the tile is byte c % BLOCK_BYTES of slice c // BLOCK_BYTES
    column = tl.arange(0, BLOCK_K)
    byte = start_byte + column % BLOCK_BYTES
    offs_k = byte // 32 * (32 * SLICES) + column // BLOCK_BYTES * 32 + byte % 32
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


def linear_dx_triton(dz: Tensor, weight: QuantizedWeight) -> Tensor:
    """dx [M, K] of dz [M, N], fp16 or bf16, its last stride 1. The sum over N has a fixed order."""
    (M, N), K, spec = dz.shape, weight.K, weight.spec
    dx = torch.empty(M, K, dtype=dz.dtype, device=dz.device)
    if M == 0:
        return dx
    config = choose_dx_config(M, spec.bits, spec.symmetric, spec.deterministic)
    row_bytes = weight.qweight.shape[1]
    tiles_k = triton.cdiv(row_bytes, config.block_bytes)
    _linear_dx_kernel[(tiles_k * triton.cdiv(M, config.block_m),)](
        dz, weight.qweight, weight.scale, weight.group_scale, weight.zero_point, dx,
        M, N, K, row_bytes, -(-K // spec.group) if spec.group else 0,
        dz.stride(0), weight.qweight.stride(0),
        BITS=spec.bits, GROUP_SIZE=spec.group,
        # the weight goes through shared memory, in words for any matrix unit
        PAIRS=2 if pairs_of(dz.device, _linear_dx_kernel)[1] else 0,
        BLOCK_M=config.block_m, BLOCK_N=64, BLOCK_BYTES=config.block_bytes,
        num_warps=config.num_warps, num_stages=3,
    )  # fmt: skip
    return dx
