"""Gradient of a convolution's input on the matrix units, as a gather over taps.

Dimension key: B batch, C input channels, N output channels, T input frames, T_out output frames.

Input frame t is read by output frame (t + left - tap * DILATION) / STRIDE wherever that is whole. A
program owns frames of one phase t % STRIDE, so that every tap it visits is whole for all of them.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.decode_kernel import decode_asymmetric, decode_levels

BLOCK_T, BLOCK_N, BLOCK_C = 64, 32, 64


# a new length must not compile again
@triton.jit(do_not_specialize=["T", "T_out", "tiles_t", "left"])
def _implicit_gemm_conv1d_dx_kernel(
    dz_ptr, qweight_ptr, scale_ptr, group_scale_ptr, zero_point_ptr, lengths_ptr, dx_ptr,
    T, T_out, N, C, N_group, num_scales, tiles_t,
    stride_db, stride_dt, stride_qn, left,
    C_GROUP: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    TAP_STEP: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = 8 // BITS
    DTYPE: tl.constexpr = dz_ptr.dtype.element_ty
    TILES_C: tl.constexpr = (C_GROUP + BLOCK_C - 1) // BLOCK_C
    group = tl.program_id(1)
    batch = tl.program_id(0) // TILES_C // STRIDE // tiles_t
    start_i = tl.program_id(0) // TILES_C // STRIDE % tiles_t * BLOCK_T
    phase = tl.program_id(0) // TILES_C % STRIDE
    index_c = tl.program_id(0) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_c = tl.minimum(index_c, C_GROUP - 1)
    offs_i = start_i + tl.arange(0, BLOCK_T)
    dz_ptr += batch.to(tl.int64) * stride_db + group * N_group

    # the first tap that meets this phase; the others follow every TAP_STEP, or there is none
    first_tap = TAPS
    for i in tl.static_range(TAP_STEP):
        first_tap = tl.where((phase + left - i * DILATION) % STRIDE == 0, i, first_tap)
    tiles_n = tl.cdiv(N_group, BLOCK_N)
    acc = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    # one loop over taps and channels, so that the loads of the next step run ahead
    for step in range(0, tl.cdiv(tl.maximum(TAPS - first_tap, 0), TAP_STEP) * tiles_n):
        tap = first_tap + step // tiles_n * TAP_STEP
        index_n = step % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        frame = offs_i + (phase + left - tap * DILATION) // STRIDE
        # weights of channels past the end are those of the last one, so dz must be 0 there
        mask = ((frame >= 0) & (frame < T_out))[:, None] & (index_n < N_group)[None, :]
        dz_ptrs = dz_ptr + frame.to(tl.int64)[:, None] * stride_dt + index_n[None, :]
        dz = tl.load(dz_ptrs, mask=mask, other=0.0)

        offs_n = (group * N_group + tl.minimum(index_n, N_group - 1))[:, None]
        offs_k = (tap * C_GROUP + offs_c)[None, :]
        offs_byte = offs_k // (32 * SLICES) * 32 + offs_k % 32
        shift = (offs_k % (32 * SLICES) // 32 * BITS).to(tl.uint8)
        q = tl.load(qweight_ptr + offs_n.to(tl.int64) * stride_qn + offs_byte)
        if GROUP_SIZE > 0:
            offs_s = offs_n * num_scales + offs_k // GROUP_SIZE
        if zero_point_ptr is not None:
            zero = tl.load(zero_point_ptr + offs_s).to(tl.float32)
            scale = tl.load(scale_ptr + offs_s).to(tl.float32)
            w = decode_asymmetric(q, shift, zero, scale, BITS, DTYPE)
        else:
            w = decode_levels(q, shift, BITS, DTYPE).to(tl.float32)
            if GROUP_SIZE > 0:
                w = w * tl.load(group_scale_ptr + offs_s).to(tl.float32)
            w = (w * tl.load(scale_ptr + offs_n)).to(DTYPE)
        acc = tl.dot(dz, w, acc)

    t = phase + offs_i * STRIDE
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + batch).to(tl.int32)
        acc = tl.where((t < length)[:, None], acc, 0.0)
    rows = (batch.to(tl.int64) * T + t) * C + group * C_GROUP
    mask = (t < T)[:, None] & (index_c < C_GROUP)[None, :]
    dx_ptrs = dx_ptr + rows[:, None] + index_c[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


def implicit_gemm_conv1d_dx_triton(
    dz: Tensor, weight: QuantizedWeight, lengths: Tensor | None, geometry: Geometry, dx: Tensor
) -> None:
    """Fill dx [B, T, C], contiguous, from dz [B, T_out, N], fp16 or bf16, channels adjacent."""
    (B, T, C), N, spec, groups = dx.shape, weight.N, weight.spec, geometry.groups
    if dx.numel() == 0:
        return
    assert dz.stride(2) == 1 or dz.shape[2] == 1, "the caller passes channel-last tensors"
    tiles_t = triton.cdiv(triton.cdiv(T, geometry.stride), BLOCK_T)
    tiles = tiles_t * geometry.stride * triton.cdiv(C // groups, BLOCK_C)
    _implicit_gemm_conv1d_dx_kernel[(B * tiles, groups)](
        dz, weight.qweight, weight.scale, weight.group_scale, weight.zero_point, lengths, dx,
        T, dz.shape[1], N, C, N // groups,
        -(-weight.K // spec.group) if spec.group else 0, tiles_t,
        dz.stride(0), dz.stride(1), weight.qweight.stride(0), geometry.left,
        C_GROUP=C // groups, TAPS=geometry.kernel_size, STRIDE=geometry.stride,
        DILATION=geometry.dilation,
        TAP_STEP=geometry.stride // math.gcd(geometry.stride, geometry.dilation),
        BITS=spec.bits, GROUP_SIZE=spec.group,
        BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C,
        num_warps=4, num_stages=3,
    )  # fmt: skip
