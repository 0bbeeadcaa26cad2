"""Triton kernels of norm_quantize: a row stays in registers from the residual to its int8.

Dimension key: M rows, N features.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

# of the features: a longer row would not stay in registers
MAX_FEATURES = 8192
# of the backward, each with its own sums of dweight and dbias: two waves on the largest GPU
MAX_PROGRAMS = 256


@triton.jit
def _norm_quantize_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,
    h_ptr, y_ptr, q_ptr, scale_ptr, mean_ptr, rstd_ptr,
    N, eps,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    offsets = m * N + offs_n
    h = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # the sum goes on in the precision in which the next block will read it
        h = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offsets, h, mask=mask)
        h = h.to(tl.float32)

    mean = tl.sum(h) / N
    centered = tl.where(mask, h - mean, 0.0)
    # rounded correctly, unlike / and sqrt on a GPU: once a row it costs nothing
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centered * centered) / N + eps))
    tl.store(mean_ptr + m, mean)
    tl.store(rstd_ptr + m, rstd)
    weight = tl.load(weight_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    normalized = centered * rstd * weight + bias

    scale = tl.div_rn(tl.max(tl.abs(normalized)), 127.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    # the maximum skips NaN, a sum does not
    total = tl.sum(normalized)
    scale = tl.where(total == total, scale, total)
    tl.store(scale_ptr + m, scale)
    # 1.5 * 2^23 pushes the fraction out of fp32's mantissa: rounds to nearest, ties to even
    levels = (normalized / scale + 12582912.0) - 12582912.0
    tl.store(q_ptr + offsets, levels.to(tl.int8), mask=mask)
    if y_ptr is not None:
        tl.store(y_ptr + offsets, (levels * scale).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "NUM_PROGRAMS"])
def _norm_quantize_bwd_kernel(
    grad_y_ptr, grad_h_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr,
    dh_ptr, dweight_ptr, dbias_ptr,
    M, N, NUM_PROGRAMS,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for m in range(pid, M, NUM_PROGRAMS):
        offsets = tl.cast(m, tl.int64) * N + offs_n
        grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean, rstd = tl.load(mean_ptr + m), tl.load(rstd_ptr + m)
        normalized = tl.where(mask, (h - mean) * rstd, 0.0)
        dweight += grad * normalized
        dbias += grad
        grad *= weight
        projection = tl.sum(grad * normalized) / N
        dh = rstd * (grad - tl.sum(grad) / N - normalized * projection)
        if grad_h_ptr is not None:
            dh += tl.load(grad_h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dh_ptr + offsets, dh.to(dh_ptr.dtype.element_ty), mask=mask)
    offsets = pid.to(tl.int64) * N + offs_n
    tl.store(dweight_ptr + offsets, dweight, mask=mask)
    tl.store(dbias_ptr + offsets, dbias, mask=mask)


def default_config(num_features: int) -> tuple[int, int]:
    """BLOCK_N and num_warps for rows of N features."""
    block_n = max(128, 1 << (num_features - 1).bit_length())
    # 16 features a thread, of which the backward holds six fp32 tensors
    return block_n, min(16, max(1, block_n // 512))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def norm_quantize_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    return_dequantized: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel on x [..., N]. op.py has checked the inputs."""
    N, device = x.shape[-1], x.device
    if N > MAX_FEATURES:
        raise NotImplementedError(f"on a GPU, rows of up to {MAX_FEATURES} features, got {N}")
    statistic = (*x.shape[:-1], 1)
    h = None if residual is None else torch.empty(x.shape, device=device, dtype=x.dtype)
    y = torch.empty(x.shape, device=device, dtype=x.dtype) if return_dequantized else None
    q = torch.empty(x.shape, device=device, dtype=torch.int8)
    scale = torch.empty(statistic, device=device, dtype=torch.float32)
    mean = torch.empty(statistic, device=device, dtype=torch.float32)
    rstd = torch.empty(statistic, device=device, dtype=torch.float32)
    block_n, num_warps = default_config(N)
    if x.numel() > 0:
        _norm_quantize_fwd_kernel[(scale.numel(),)](
            _rows(x), None if residual is None else _rows(residual),
            weight.contiguous(), bias.contiguous(),
            h, y, q, scale, mean, rstd,
            N, eps,
            BLOCK_N=block_n, num_warps=num_warps,
        )  # fmt: skip
    absent = x.new_empty(0)
    return absent if h is None else h, absent if y is None else y, q, scale, mean, rstd


def norm_quantize_backward_triton(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on tensors of the forward. op.py has checked the inputs."""
    M, N = mean.numel(), h.shape[-1]
    dh = torch.empty(h.shape, device=h.device, dtype=h.dtype)
    if h.numel() == 0:
        return dh, torch.zeros_like(weight), torch.zeros_like(bias)
    num_programs = min(M, MAX_PROGRAMS)
    dweight = torch.empty(num_programs, N, device=h.device, dtype=torch.float32)
    dbias = torch.empty(num_programs, N, device=h.device, dtype=torch.float32)
    block_n, num_warps = default_config(N)
    _norm_quantize_bwd_kernel[(num_programs,)](
        _rows(grad_y), None if grad_h is None else _rows(grad_h), _rows(h),
        weight.contiguous(), mean, rstd,
        dh, dweight, dbias,
        M, N, num_programs,
        BLOCK_N=block_n, num_warps=num_warps,
    )  # fmt: skip
    return dh, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)
