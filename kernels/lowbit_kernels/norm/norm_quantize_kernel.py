"""Triton kernels of norm_quantize: a row stays in registers from the residual to its int8.

Dimension key: M rows, with ``lengths`` seen as [B, T]; N features.

Floors and estimates for an H200, from data sheet and compiled code, not measured, for 16-bit
inputs. Forward: 3 bytes a value (7 with a residual), 0.145 (0.34) cycles of a multiprocessor at
full memory bandwidth, in which it issues 18.5 (43) instructions a value; the kernel has 14 (16),
and 300 a thread of 24 to 32 values. Backward: 6 bytes (8), 37 (49) instructions; it has 28 (30)
where a program sees one group of rows, the sums of the parameters' gradients included. With GELU
and a 16-bit result, 512 features: 34 of 25 instructions, backward 41 of 37. Two norms in a pass: 5
bytes (6 to 16 bits), 31 (37) instructions; it has 27 (25), and a launch and a read of every row
less than two passes.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.matmul.epilogue_kernel import activate, activation_slope
from lowbit_kernels.matmul.quantize_kernel import int8_scale, max_or_nan, round_to_int8
from lowbit_kernels.norm.levels import empty_levels, level_pitch

# of the features: a longer row would not stay in registers
MAX_FEATURES = 8192
# of the backward, each with its own sums of dweight and dbias: two waves on the largest GPU
MAX_PROGRAMS = 256


@triton.jit
def _valid_rows(row, lengths_ptr, M, T):
    valid = row < M
    if lengths_ptr is not None:
        valid &= row % T < tl.load(lengths_ptr + row // T, mask=valid, other=0)
    return valid


@triton.jit
def _moments(rows, eps, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # mean and 1 / deviation [BLOCK_M] of rows, a tuple of tiles [BLOCK_M, BLOCK_N]
    total = rows[0]
    for start in tl.static_range(BLOCK_N, N, BLOCK_N):
        total += rows[start // BLOCK_N]
    mean = tl.sum(total, 1) / N
    squares = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in tl.static_range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        centered = tl.where(offs_n < N, rows[start // BLOCK_N] - mean[:, None], 0.0)
        squares += centered * centered
    # rounded correctly, unlike / and sqrt on a GPU: once a row it costs nothing
    return mean, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 1) / N + eps))


@triton.jit
def _affine(h, mean, rstd, weight_ptr, bias_ptr, offs, N: tl.constexpr):
    weight = tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    return (h - mean[:, None]) * rstd[:, None] * weight + bias


@triton.jit(do_not_specialize=["M", "T"])
def _norm_quantize_fwd_kernel(
    x_ptr, residual_ptr, first_weight_ptr, first_bias_ptr, weight_ptr, bias_ptr, lengths_ptr,
    static_scale_ptr, offset_ptr, h_ptr, y_ptr, q_ptr, scale_ptr, mean_ptr, rstd_ptr,
    M, T, first_eps, eps,
    stride_xm, stride_rm, stride_qm,
    N: tl.constexpr, ACTIVATION: tl.constexpr, TO_HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_M rows, BLOCK_N columns at a time, all of which stay in registers
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m, mask_m, valid = row.to(tl.int64), row < M, _valid_rows(row, lengths_ptr, M, T)
    rows = ()
    for start in tl.static_range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        mask = valid[:, None] & (offs_n < N)
        h = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n, mask=mask, other=0.0)
        h = h.to(tl.float32)
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + offs_m[:, None] * stride_rm + offs_n
            h += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
            # the sum goes on in the precision in which the next block will read it
            h = h.to(h_ptr.dtype.element_ty)
            mask = mask_m[:, None] & (offs_n < N)
            tl.store(h_ptr + offs_m[:, None] * N + offs_n, h, mask=mask)
            h = h.to(tl.float32)
        rows = rows + (h,)  # noqa: RUF005

    # tiles of features as large as those of x, or they would pass through shared memory
    no_rows = tl.zeros((BLOCK_M, 1), dtype=tl.int32)
    if first_weight_ptr is not None:
        mean, rstd = _moments(rows, first_eps, N, BLOCK_M, BLOCK_N)
        normalized = ()
        for start in tl.static_range(0, N, BLOCK_N):
            offs = start + tl.arange(0, BLOCK_N)[None, :] + no_rows
            h = _affine(
                rows[start // BLOCK_N], mean, rstd, first_weight_ptr, first_bias_ptr, offs, N
            )
            h = h.to(h_ptr.dtype.element_ty)
            mask = mask_m[:, None] & (offs < N)
            tl.store(h_ptr + offs_m[:, None] * N + offs, h, mask=mask)
            normalized = normalized + (h.to(tl.float32),)  # noqa: RUF005
        rows = normalized
    mean, rstd = _moments(rows, eps, N, BLOCK_M, BLOCK_N)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)

    largest = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    normalized = ()
    for start in tl.static_range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        offs = offs_n + no_rows
        y = _affine(rows[start // BLOCK_N], mean, rstd, weight_ptr, bias_ptr, offs, N)
        y = activate(y, ACTIVATION, TO_HALF)
        if offset_ptr is not None:
            y -= tl.load(offset_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
        if lengths_ptr is not None:
            y = tl.where(valid[:, None], y, 0.0)
        if y_ptr is not None:
            # scale and integers are those of what the next layer will read
            y = y.to(y_ptr.dtype.element_ty)
            mask = mask_m[:, None] & (offs_n < N)
            tl.store(y_ptr + offs_m[:, None] * N + offs_n, y, mask=mask)
            y = y.to(tl.float32)
        if static_scale_ptr is None:
            largest = max_or_nan(largest, tl.abs(y))
        normalized = normalized + (y,)  # noqa: RUF005
    if static_scale_ptr is not None:
        scale = tl.load(static_scale_ptr) + tl.zeros((BLOCK_M,), dtype=tl.float32)
    else:
        scale = int8_scale(tl.reduce(largest, 1, max_or_nan))
    tl.store(scale_ptr + offs_m, scale, mask=mask_m)

    if q_ptr is not None:
        inverse = tl.div_rn(1.0, scale)[:, None]
        for start in tl.static_range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)[None, :]
            mask = mask_m[:, None] & (offs_n < N)
            y = normalized[start // BLOCK_N]
            q, _ = round_to_int8(y, inverse, static_scale_ptr is not None)
            tl.store(q_ptr + offs_m[:, None] * stride_qm + offs_n, q, mask=mask)


@triton.jit(do_not_specialize=["M", "T", "NUM_PROGRAMS"])
def _norm_quantize_bwd_kernel(
    grad_y_ptr, grad_h_ptr, h_ptr, weight_ptr, bias_ptr, lengths_ptr, mean_ptr, rstd_ptr,
    dh_ptr, dweight_ptr, dbias_ptr,
    M, T, NUM_PROGRAMS,
    stride_ym, stride_gm, stride_hm,
    N: tl.constexpr, ACTIVATION: tl.constexpr, TO_HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # one program: every NUM_PROGRAMS-th group of BLOCK_M rows, and their sums for the parameters
    pid = tl.program_id(0)
    no_rows = tl.zeros((BLOCK_M, 1), dtype=tl.int32)
    dweight, dbias = (), ()
    for _ in tl.static_range(0, N, BLOCK_N):
        zeros = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        dweight, dbias = dweight + (zeros,), dbias + (zeros,)  # noqa: RUF005
    for start_m in range(pid * BLOCK_M, M, NUM_PROGRAMS * BLOCK_M):
        row = start_m + tl.arange(0, BLOCK_M)
        offs_m, mask_m, valid = row.to(tl.int64), row < M, _valid_rows(row, lengths_ptr, M, T)
        mean = tl.load(mean_ptr + offs_m, mask=valid, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=valid, other=0.0)[:, None]
        grads, rows, sums_w, sums_b = (), (), (), ()
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        projection = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in tl.static_range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)[None, :]
            mask = valid[:, None] & (offs_n < N)
            grad_ptrs = grad_y_ptr + offs_m[:, None] * stride_ym + offs_n
            grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
            h = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_n, mask=mask, other=0.0)
            normalized = (h.to(tl.float32) - mean) * rstd
            weight = tl.load(weight_ptr + offs_n + no_rows, mask=mask, other=0.0).to(tl.float32)
            if ACTIVATION is not None:
                bias = tl.load(bias_ptr + offs_n + no_rows, mask=mask, other=0.0).to(tl.float32)
                grad *= activation_slope(normalized * weight + bias, ACTIVATION, TO_HALF)
            # grad is 0 where nothing was loaded
            sums_w = sums_w + (dweight[start // BLOCK_N] + grad * normalized,)  # noqa: RUF005
            sums_b = sums_b + (dbias[start // BLOCK_N] + grad,)  # noqa: RUF005
            grad *= weight
            total += grad
            projection += grad * normalized
            grads, rows = grads + (grad,), rows + (normalized,)  # noqa: RUF005
        dweight, dbias = sums_w, sums_b
        mean_grad = (tl.sum(total, 1) / N)[:, None]
        mean_projection = (tl.sum(projection, 1) / N)[:, None]
        for start in tl.static_range(0, N, BLOCK_N):
            offs_n = start + tl.arange(0, BLOCK_N)[None, :]
            mask = mask_m[:, None] & (offs_n < N)
            dh = rstd * (
                grads[start // BLOCK_N] - mean_grad - rows[start // BLOCK_N] * mean_projection
            )
            if grad_h_ptr is not None:
                grad_ptrs = grad_h_ptr + offs_m[:, None] * stride_gm + offs_n
                grad_mask = valid[:, None] & (offs_n < N)
                dh += tl.load(grad_ptrs, mask=grad_mask, other=0.0).to(tl.float32)
            dh_ptrs = dh_ptr + offs_m[:, None] * N + offs_n
            tl.store(dh_ptrs, dh.to(dh_ptr.dtype.element_ty), mask=mask)
    for start in tl.static_range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        offsets = pid.to(tl.int64) * N + offs_n
        tl.store(dweight_ptr + offsets, tl.sum(dweight[start // BLOCK_N], 0), mask=offs_n < N)
        tl.store(dbias_ptr + offsets, tl.sum(dbias[start // BLOCK_N], 0), mask=offs_n < N)


def row_tiles(num_features: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and num_warps of a pass over rows of N features.

    A thread loads 8 adjacent values at most four times. Rows of up to 1024 features have a warp
    each, so that their sums need no shared memory; of up to 512, a warp has two, which share what
    is the same for all rows (a fifth of the instructions of LayerNorm and GELU).
    """
    block_n = max(256, triton.next_power_of_2(triton.cdiv(num_features, 4)))
    num_warps = max(4, block_n // 256)
    rows_a_warp = 2 if num_features <= 512 else 1
    return num_warps * 256 // block_n * rows_a_warp, block_n, num_warps


def backward_tiles(num_features: int) -> tuple[int, int, int]:
    """The same of the backward, which holds four fp32 numbers for each of its values."""
    block_n = max(256, triton.next_power_of_2(triton.cdiv(num_features, 2)))
    num_warps = max(8, block_n // 256)
    return num_warps * 256 // block_n, block_n, num_warps


def as_rows(x: Tensor) -> Tensor:
    """x [..., N] as [M, N], features adjacent."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def norm_quantize_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    return_y: bool,
    lengths: Tensor | None = None,
    activation: str | None = None,
    static_scale: Tensor | None = None,
    quantize: bool = True,
    first_weight: Tensor | None = None,
    first_bias: Tensor | None = None,
    first_eps: float = 0.0,
    *,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernel on x [..., N] ([B, T, N] with lengths). op.py has checked the inputs.

    Without ``quantize`` q is empty, and ``scale`` is what each row's
    own would be: the largest of an utterance's rows is the utterance's. ``offset`` [N] is
    subtracted from the activated values.
    """
    N, device = x.shape[-1], x.device
    check_row_length(N)
    statistic = (*x.shape[:-1], 1)
    h = None
    if residual is not None or first_weight is not None:
        h = torch.empty(x.shape, device=device, dtype=x.dtype)
    y = torch.empty(x.shape, device=device, dtype=x.dtype) if return_y else None
    q = empty_levels(x.shape, device) if quantize else None
    scale = torch.empty(statistic, device=device, dtype=torch.float32)
    mean = torch.empty(statistic, device=device, dtype=torch.float32)
    rstd = torch.empty(statistic, device=device, dtype=torch.float32)
    block_m, block_n, num_warps = row_tiles(N)
    M = scale.numel()
    if M:
        rows, added = as_rows(x), None if residual is None else as_rows(residual)
        _norm_quantize_fwd_kernel[(triton.cdiv(M, block_m),)](
            rows, added, first_weight, first_bias, weight.contiguous(), bias.contiguous(), lengths,
            static_scale, offset, h, y, q, scale, mean, rstd,
            M, x.shape[-2] if x.dim() > 1 else 1, first_eps, eps,
            rows.stride(0), 0 if added is None else added.stride(0), level_pitch(N),
            N=N, ACTIVATION=activation, TO_HALF=x.itemsize == 2,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
        )  # fmt: skip
    absent = x.new_empty(0)
    q = x.new_empty(0, dtype=torch.int8) if q is None else q
    return absent if h is None else h, absent if y is None else y, q, scale, mean, rstd


def check_row_length(num_features: int) -> None:
    """Refuse rows that would not stay in registers.

    Raises:
        NotImplementedError: naming the most features served and those received.
    """
    if num_features > MAX_FEATURES:
        raise NotImplementedError(
            f"on a GPU, rows of up to {MAX_FEATURES} features, got {num_features}"
        )


def norm_quantize_backward_triton(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lengths: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on tensors of the forward. op.py has checked the inputs."""
    M, N = mean.numel(), h.shape[-1]
    dh = torch.empty(h.shape, device=h.device, dtype=h.dtype)
    if h.numel() == 0:
        return dh, torch.zeros_like(weight), torch.zeros_like(bias)
    block_m, block_n, num_warps = backward_tiles(N)
    num_programs = min(triton.cdiv(M, block_m), MAX_PROGRAMS)
    dweight = torch.empty(num_programs, N, device=h.device, dtype=torch.float32)
    dbias = torch.empty(num_programs, N, device=h.device, dtype=torch.float32)
    grad, added, rows = as_rows(grad_y), None if grad_h is None else as_rows(grad_h), as_rows(h)
    _norm_quantize_bwd_kernel[(num_programs,)](
        grad, added, rows, weight.contiguous(), bias.contiguous(), lengths, mean, rstd,
        dh, dweight, dbias,
        M, h.shape[-2] if h.dim() > 1 else 1, num_programs,
        grad.stride(0), 0 if added is None else added.stride(0), rows.stride(0),
        N=N, ACTIVATION=activation, TO_HALF=h.itemsize == 2,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
    )  # fmt: skip
    return dh, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)
