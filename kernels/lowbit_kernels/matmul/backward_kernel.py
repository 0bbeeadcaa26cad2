"""Triton kernel for dx = dz @ W, the gradient of a low-bit linear layer's input.

Dimension key: M rows, N output features (the reduction here), K input features.

The weight is the right operand. One program owns one slice of BLOCK_BYTES bytes, that is
BLOCK_BYTES columns of dx in runs of 32, and reads the bytes of all slices: they are few.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.decode_kernel import decode_asymmetric, decode_levels


@triton.jit
def _per_column(values, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr):
    # [BLOCK_N, BLOCK_BYTES / 32] to [BLOCK_N, BLOCK_BYTES]: the 32 bytes of a block share a value
    RUNS: tl.constexpr = BLOCK_BYTES // 32
    wide = tl.broadcast_to(values[:, :, None], (BLOCK_N, RUNS, 32))
    return wide.reshape(BLOCK_N, BLOCK_BYTES)


@triton.jit(do_not_specialize=["M"])
def _linear_dx_kernel(
    dz_ptr, qweight_ptr, scale_ptr, group_scale_ptr, zero_point_ptr, dx_ptr,
    M, N, K, row_bytes, num_groups,
    stride_dm, stride_qn,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = 8 // BITS
    DTYPE: tl.constexpr = dz_ptr.dtype.element_ty
    tiles_k = tl.cdiv(row_bytes, BLOCK_BYTES) * SLICES
    tile_k = tl.program_id(0) % tiles_k
    u = tile_k % SLICES
    start_byte = tile_k // SLICES * BLOCK_BYTES
    offs_j = start_byte + tl.arange(0, BLOCK_BYTES)
    offs_k = offs_j // 32 * (32 * SLICES) + u * 32 + offs_j % 32
    offs_m = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, M - 1)
    if GROUP_SIZE > 0:
        blocks = start_byte // 32 + tl.arange(0, BLOCK_BYTES // 32)
        groups = (blocks * (32 * SLICES) + u * 32) // GROUP_SIZE
        groups = tl.minimum(groups, num_groups - 1)

    acc = tl.zeros((BLOCK_M, BLOCK_BYTES), dtype=tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # weights of rows past the end are those of the last row, so dz must be 0 there
        rows_n = tl.minimum(offs_n, N - 1)
        dz_ptrs = dz_ptr + rows[:, None] * stride_dm + offs_n[None, :]
        dz = tl.load(dz_ptrs, mask=(offs_n < N)[None, :], other=0.0)
        q_ptrs = qweight_ptr + rows_n.to(tl.int64)[:, None] * stride_qn + offs_j[None, :]
        q = tl.load(q_ptrs, mask=(offs_j < row_bytes)[None, :], other=0)
        if GROUP_SIZE > 0:
            group_offs = rows_n[:, None] * num_groups + groups[None, :]
        if zero_point_ptr is not None:
            zero = tl.load(zero_point_ptr + group_offs).to(tl.float32)
            step = tl.load(scale_ptr + group_offs).to(tl.float32)
            zero = _per_column(zero, BLOCK_N, BLOCK_BYTES)
            step = _per_column(step, BLOCK_N, BLOCK_BYTES)
            w = decode_asymmetric(q, u * BITS, zero, step, BITS, DTYPE)
        else:
            w = decode_levels(q, u * BITS, BITS, DTYPE).to(tl.float32)
            scale = tl.load(scale_ptr + rows_n)[:, None]
            if GROUP_SIZE > 0:
                group_scale = tl.load(group_scale_ptr + group_offs).to(tl.float32)
                scale = _per_column(group_scale * scale, BLOCK_N, BLOCK_BYTES)
            w = (w * scale).to(DTYPE)
        acc = tl.dot(dz, w, acc)

    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


def linear_dx_triton(dz: Tensor, weight: QuantizedWeight) -> Tensor:
    """dx [M, K] of dz [M, N], fp16 or bf16, its last stride 1. The sum over N has a fixed order."""
    (M, N), K, spec = dz.shape, weight.K, weight.spec
    dx = torch.empty(M, K, dtype=dz.dtype, device=dz.device)
    if M == 0:
        return dx
    is_small = M <= 32 and not spec.deterministic
    block_m = 32 if is_small else 128
    block_bytes = 64 if is_small else 128
    row_bytes = weight.qweight.shape[1]
    tiles_k = triton.cdiv(row_bytes, block_bytes) * (8 // spec.bits)
    _linear_dx_kernel[(tiles_k * triton.cdiv(M, block_m),)](
        dz, weight.qweight, weight.scale, weight.group_scale, weight.zero_point, dx,
        M, N, K, row_bytes, -(-K // spec.group) if spec.group else 0,
        dz.stride(0), weight.qweight.stride(0),
        BITS=spec.bits, GROUP_SIZE=spec.group,
        BLOCK_M=block_m, BLOCK_N=64, BLOCK_BYTES=block_bytes,
        num_warps=4 if is_small else 8, num_stages=3,
    )  # fmt: skip
    return dx
