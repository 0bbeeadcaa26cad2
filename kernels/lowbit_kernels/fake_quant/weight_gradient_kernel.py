"""Triton kernel for dW = dz^T x, whose last step is the gradient of the weight's quantizer.

Dimension key: M rows of the input (the reduction), N output features, K input features, P parts of
the sum over M, S scale groups a row.

The tile of dW stays in registers until the quantizer's mask is applied and the terms of the scale's
gradient are summed along each of its rows: the dense dW is written once and read by nobody. Least
bytes: dz and x read, the weight read, dW written; 2 M N K operations.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.fake_quant.dispatch import WeightGradientConfig
from lowbit_kernels.fake_quant.elementwise_kernel import (
    constants,
    fake_quantize_backward_triton,
    quantizer_gradient,
    scale_strides,
    sum_parts_triton,
    sum_scale_gradient,
)
from lowbit_kernels.fake_quant.quantizer import Quantizer
from lowbit_kernels.fake_quant.reference import has_sign_gradient

# tiles of dW that share columns of dz run together, so that both operands are read from L2
STRIP = 8


@triton.jit
def _halves(tile):
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _slices(tile):
    # slices of 32 columns, as a tuple, of 64 or 128
    if tile.shape[1] == 64:
        slices = _halves(tile)
    else:
        left, right = _halves(tile)
        slices = _halves(left) + _halves(right)
    return slices


@triton.jit
def _finish_slice(
    grad, start_k, offs_n, weight_ptr, scale, group_scale_ptr, dweight_ptr, N, K, num_groups,
    LOW: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr, IS_SIGN: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    # stores a slice of dW, and returns its rows' terms of the scale's gradient; its 32 columns lie
    # in one group, so a scale is inverted once a row
    offs_k = start_k + tl.arange(0, grad.shape[1])
    offsets = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if group_scale_ptr is not None:
        # rows and groups past the end read the last one, and are not written
        group = tl.minimum(start_k // GROUP_SIZE, num_groups - 1)
        group_ptrs = group_scale_ptr + tl.minimum(offs_n, N - 1) * num_groups + group
        multiplier = tl.load(group_ptrs).to(tl.float32)
        scale = multiplier * scale
    v = weight * tl.div_rn(1.0, scale)[:, None]
    grad, terms = quantizer_gradient(grad, v, LOW, HIGH, STEP, IS_SIGN)
    tl.store(dweight_ptr + offsets, grad.to(dweight_ptr.dtype.element_ty), mask=mask)
    # dW is 0 past the end, and so are its products
    sums = tl.sum(terms, 1)
    if group_scale_ptr is not None:
        sums *= multiplier
    return sums


@triton.jit(do_not_specialize=["M"])
def _weight_gradient_kernel(
    dz_ptr, x_ptr, weight_ptr, scale_ptr, group_scale_ptr, dweight_ptr, partial_ptr,
    M, N, K, rows_per_part, num_groups,
    stride_zm, stride_xm, stride_sn,
    LOW: tl.constexpr, HIGH: tl.constexpr, STEP: tl.constexpr, MIN_SCALE: tl.constexpr,
    IS_SIGN: tl.constexpr, GROUP_SIZE: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    strip = tl.program_id(0) // (STRIP * tiles_k)
    width = tl.minimum(tiles_n - strip * STRIP, STRIP)
    index = tl.program_id(0) % (STRIP * tiles_k)
    tile_k = index // width
    start_k = tile_k * BLOCK_K
    offs_n = (strip * STRIP + index % width) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < K

    start = tl.program_id(1) * rows_per_part
    end = tl.minimum(start + rows_per_part, M)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for m in range(start, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows, mask_m = offs_m.to(tl.int64), offs_m < end
        dz_ptrs = dz_ptr + rows[None, :] * stride_zm + offs_n[:, None]
        dz = tl.load(dz_ptrs, mask=mask_m[None, :] & mask_n[:, None], other=0.0)
        x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(dz, x, acc)

    if weight_ptr is None:
        dweight_ptr += tl.program_id(1).to(tl.int64) * N * K
        offsets = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
        mask = mask_n[:, None] & mask_k[None, :]
        tl.store(dweight_ptr + offsets, acc.to(dweight_ptr.dtype.element_ty), mask=mask)
    else:
        # slice by slice: the weight, the terms and the addresses of a whole tile would spill
        scale = tl.load(scale_ptr + tl.minimum(offs_n, N - 1) * stride_sn).to(tl.float32)
        scale = tl.maximum(scale, MIN_SCALE)
        sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
        slices = _slices(acc)
        for i in tl.static_range(BLOCK_K // 32):
            sums += _finish_slice(
                slices[i], start_k + i * 32, offs_n, weight_ptr, scale, group_scale_ptr,
                dweight_ptr, N, K, num_groups, LOW, HIGH, STEP, IS_SIGN, GROUP_SIZE,
            )  # fmt: skip
        tl.store(partial_ptr + offs_n * tiles_k + tile_k, sums, mask=mask_n)


def weight_gradient_triton(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    quantizer: Quantizer | None,
    config: WeightGradientConfig,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a weight and, with a quantizer, of its scale. All sums have a fixed order.

    Args:
        dz: [M, N], fp16 or bf16, its last stride 1.
        x: [M, K], like dz.
        weight: [N, K], contiguous; its dtype is that of the gradient.
        quantizer: ``"lsq"`` or ``"elastic"`` with a scale for all or one a row; None: dW itself.
        config: tile sizes.
    """
    (M, N), K, device = dz.shape, x.shape[1], dz.device
    tiles_n, tiles_k = triton.cdiv(N, config.block_n), triton.cdiv(K, config.block_k)
    steps = triton.cdiv(triton.cdiv(M, config.block_m), config.splits)
    is_split = config.splits > 1
    fused = None if is_split else quantizer
    dtype = torch.float32 if is_split else weight.dtype
    dweight = torch.empty(config.splits, N, K, dtype=dtype, device=device)
    scale = group_scale = partial = None
    quantizing: dict[str, float] = {"LOW": 0.0, "HIGH": 0.0, "STEP": 1, "MIN_SCALE": 0.0}
    if fused is not None and fused.scale is not None:
        scale, quantizing = fused.scale.contiguous(), constants(fused)
        group_scale = None if fused.group_scale is None else fused.group_scale.contiguous()
        partial = torch.empty(N, tiles_k, dtype=torch.float32, device=device)
    _weight_gradient_kernel[(tiles_n * tiles_k, config.splits)](
        dz, x, None if fused is None else weight, scale, group_scale, dweight, partial,
        M, N, K, steps * config.block_m, 1 if group_scale is None else group_scale.shape[1],
        dz.stride(0), x.stride(0), 0 if scale is None else scale_strides(scale)[0],
        IS_SIGN=fused is not None and has_sign_gradient(fused),
        GROUP_SIZE=1 if group_scale is None or fused is None else fused.group_size,
        STRIP=STRIP,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_M=config.block_m,
        num_warps=config.num_warps, num_stages=config.num_stages, **quantizing,
    )  # fmt: skip
    if not is_split:
        dscale = None if fused is None or partial is None else (
            sum_scale_gradient(partial, weight, fused)
        )  # fmt: skip
        return dweight[0], dscale
    if quantizer is None:
        return sum_parts_triton(dweight, weight.dtype), None
    return fake_quantize_backward_triton(dweight, weight, quantizer)
