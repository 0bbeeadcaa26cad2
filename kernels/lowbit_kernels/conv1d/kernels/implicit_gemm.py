"""Grouped and dilated convolution on the matrix units, the weight dequantized in registers.

Dimension key: B batch, C input channels, N output channels, T frames read, T_out frames written,
K = taps * C / groups values an output channel.

The tile is that of y.T, the weight its left operand, as in ``matmul/kernel.py``; the right operand
[K, T_out] is never stored: each slice of 32 values of K is gathered from x [B, T, C] by its tap and
channel, with padding, dilation and padded frames masked in the load.
"""

import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.decode_kernel import decode_asymmetric, decode_levels
from lowbit_kernels.matmul.epilogue_kernel import activate

BLOCK_N = 64
# a step unpacks 32 bytes a row, so the fewer the bits the longer its run of x: at most 32 KB
BLOCK_T = {8: 64, 4: 64, 2: 64, 1: 32}


# a new length must not compile again
@triton.jit(do_not_specialize=["T", "T_out", "tiles_t", "left"])
def _implicit_gemm_conv1d_kernel(
    x_ptr, qweight_ptr, scale_ptr, group_scale_ptr, zero_point_ptr, input_scale_ptr,
    bias_ptr, residual_ptr, lengths_ptr, y_ptr, z_ptr,
    T, T_out, N, K, N_group, num_scales, tiles_t,
    stride_xb, stride_xt, stride_qn, left,
    C_GROUP: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N_group, BLOCK_N)
    group = tl.program_id(1)
    batch = tl.program_id(0) // tiles_n // tiles_t
    start_t = tl.program_id(0) // tiles_n % tiles_t * BLOCK_T
    start_n = tl.program_id(0) % tiles_n * BLOCK_N

    # rows past the end read the last one, and are not written
    index_n = start_n + tl.arange(0, BLOCK_N)
    offs_n = group * N_group + tl.minimum(index_n, N_group - 1)
    offs_j = tl.arange(0, 32)
    offs_t = tl.arange(0, BLOCK_T)
    q_ptrs = qweight_ptr + offs_n.to(tl.int64)[:, None] * stride_qn + offs_j[None, :]
    scale_rows = offs_n * num_scales
    limit = T
    if lengths_ptr is not None:
        limit = tl.minimum(T, tl.load(lengths_ptr + batch).to(tl.int32))
    # frames are counted from the tile's first one, which keeps offsets inside 32 bits
    first = start_t * STRIDE - left
    x_ptr += batch.to(tl.int64) * stride_xb + first.to(tl.int64) * stride_xt + group * C_GROUP

    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SUM: tl.constexpr = tl.int32 if input_scale_ptr is not None else tl.float32
    SLICES: tl.constexpr = 8 // BITS
    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=SUM)
    for block in range(0, tl.cdiv(K, 32 * SLICES)):
        q = tl.load(q_ptrs + block * 32)
        for u in tl.static_range(SLICES):
            start = (block * SLICES + u) * 32
            offs_k = start + offs_j
            if C_GROUP % 32 == 0:  # a slice lies in one tap
                frame = (start // C_GROUP * DILATION + offs_t * STRIDE)[None, :]
                channel = (start % C_GROUP + offs_j)[:, None]
            else:
                frame = (offs_k // C_GROUP * DILATION)[:, None] + (offs_t * STRIDE)[None, :]
                channel = (offs_k % C_GROUP)[:, None]
            # the weight's padding decodes to anything, so x must be 0 there
            mask = (offs_k < K)[:, None] & (first + frame >= 0) & (first + frame < limit)
            x = tl.load(x_ptr + frame * stride_xt + channel, mask=mask, other=0)
            if zero_point_ptr is not None:
                offs_s = scale_rows + tl.minimum(start // GROUP_SIZE, num_scales - 1)
                zero = tl.load(zero_point_ptr + offs_s).to(tl.float32)
                step = tl.load(scale_ptr + offs_s).to(tl.float32)
                w = decode_asymmetric(q, u * BITS, zero[:, None], step[:, None], BITS, DTYPE)
            else:
                w = decode_levels(q, u * BITS, BITS, DTYPE)
                if GROUP_SIZE > 0:
                    offs_s = scale_rows + tl.minimum(start // GROUP_SIZE, num_scales - 1)
                    w = w * tl.load(group_scale_ptr + offs_s).to(DTYPE)[:, None]
            acc = tl.dot(w, x, acc, out_dtype=SUM)

    z = acc.to(tl.float32)
    if zero_point_ptr is None:
        scale = tl.load(scale_ptr + offs_n)
        if input_scale_ptr is not None:
            scale = scale * tl.load(input_scale_ptr + batch)
        z *= scale[:, None]
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_n).to(tl.float32)[:, None]
    mask = (index_n < N_group)[:, None] & (start_t + offs_t < T_out)[None, :]
    tile = (batch.to(tl.int64) * T_out + start_t) * N
    offs = (offs_t * N)[None, :] + offs_n[:, None]
    if z_ptr is not None:
        tl.store(z_ptr + tile + offs, z.to(z_ptr.dtype.element_ty), mask=mask)
    y = activate(z, EPILOGUE, y_ptr.dtype.element_ty.primitive_bitwidth < 32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + tile + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + tile + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def implicit_gemm_conv1d_triton(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    geometry: Geometry,
    epilogue: str | None,
    y: Tensor,
    z: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> None:
    """Convolve x into y and, if given, the pre-activation z.

    Args:
        x: [B, T, C], fp16 or bf16, channels adjacent; int8 with ``input_scale``.
        weight: [N, K], packed.
        bias: [N].
        residual: [B, T_out, N], contiguous.
        lengths: [B], valid frames of x.
        geometry: where the taps read.
        epilogue: as in ``low_bit_conv1d``, without ``glu``.
        y: [B, T_out, N], contiguous, to be filled.
        z: like y.
        input_scale: [B] fp32, the scale of each utterance of an int8 x.
    """
    assert epilogue != "glu", "the caller gates afterwards"
    (B, T_out, N), spec, groups = y.shape, weight.spec, geometry.groups
    if y.numel() == 0:
        return
    assert x.stride(2) == 1 or x.shape[2] == 1, "the caller passes channel-last tensors"
    block_t = BLOCK_T[spec.bits]
    tiles_t = triton.cdiv(T_out, block_t)
    _implicit_gemm_conv1d_kernel[(B * tiles_t * triton.cdiv(N // groups, BLOCK_N), groups)](
        x, weight.qweight, weight.scale, weight.group_scale, weight.zero_point, input_scale,
        bias, residual, lengths, y, z,
        x.shape[1], T_out, N, weight.K, N // groups,
        -(-weight.K // spec.group) if spec.group else 0, tiles_t,
        x.stride(0), x.stride(1), weight.qweight.stride(0), geometry.left,
        C_GROUP=x.shape[2] // groups, STRIDE=geometry.stride, DILATION=geometry.dilation,
        BITS=spec.bits, GROUP_SIZE=spec.group, EPILOGUE=epilogue,
        BLOCK_N=BLOCK_N, BLOCK_T=block_t,
        num_warps=4, num_stages=3,
    )  # fmt: skip
