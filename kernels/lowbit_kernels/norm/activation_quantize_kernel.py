"""Triton kernel of activation_quantize: a row stays in registers from its input to its int8.

Dimension key: M rows, N features of the output; the input has 2 N with ``glu``.

Floor and estimate for an H200, from data sheet and compiled code, not measured: 16-bit inputs cost
3 bytes a value (5 with ``glu``), 0.145 cycles of a multiprocessor at full memory bandwidth, in
which it issues 18.5 instructions a value. With GELU the kernel has 15.5, and 225 a thread of 24 to
32 values, of which the slow paths of two divisions are rarely run.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.matmul.epilogue_kernel import activate, epilogue_backward_triton
from lowbit_kernels.matmul.quantize_kernel import int8_scale, max_or_nan, round_to_int8
from lowbit_kernels.norm.levels import empty_levels, level_pitch
from lowbit_kernels.norm.norm_quantize_kernel import as_rows, check_row_length, row_tiles


@triton.jit(do_not_specialize=["M"])
def _activation_quantize_kernel(
    x_ptr, static_scale_ptr, y_ptr, q_ptr, scale_ptr,
    M,
    stride_xm, stride_qm,
    N: tl.constexpr, ACTIVATION: tl.constexpr, TO_HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_M rows, BLOCK_N columns at a time, all of which stay in registers
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_ptr += offs_m[:, None] * stride_xm
    activated = ()
    for start in tl.static_range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        mask = mask_m[:, None] & (offs_n < N)
        y = tl.load(x_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION == "glu":
            gate = tl.load(x_ptr + N + offs_n, mask=mask, other=0.0).to(tl.float32)
            y *= tl.sigmoid(gate)
        else:
            y = activate(y, ACTIVATION, TO_HALF)
        activated = activated + (y,)  # noqa: RUF005
    if static_scale_ptr is not None:
        scale = tl.load(static_scale_ptr) + tl.zeros((BLOCK_M,), dtype=tl.float32)
    else:
        largest = tl.abs(activated[0])
        for start in tl.static_range(BLOCK_N, N, BLOCK_N):
            largest = max_or_nan(largest, tl.abs(activated[start // BLOCK_N]))
        scale = int8_scale(tl.reduce(largest, 1, max_or_nan))
    tl.store(scale_ptr + offs_m, scale, mask=mask_m)

    inverse = tl.div_rn(1.0, scale)[:, None]
    for start in tl.static_range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        mask = mask_m[:, None] & (offs_n < N)
        q, level = round_to_int8(activated[start // BLOCK_N], inverse, static_scale_ptr is not None)
        tl.store(q_ptr + offs_m[:, None] * stride_qm + offs_n, q, mask=mask)
        if y_ptr is not None:
            y = (level * scale[:, None]).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + offs_m[:, None] * N + offs_n, y, mask=mask)


def activation_quantize_triton(
    x: Tensor, activation: str, static_scale: Tensor | None, return_dequantized: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on x [..., N] ([..., 2 N] with glu). op.py has checked the inputs."""
    batch, width = x.shape[:-1], x.shape[-1]
    N = width // 2 if activation == "glu" else width
    check_row_length(N)
    block_m, block_n, num_warps = row_tiles(N)
    shape = (*batch, N)
    y = torch.empty(shape if return_dequantized else 0, device=x.device, dtype=x.dtype)
    q = empty_levels(shape, x.device)
    scale = torch.empty((*batch, 1), device=x.device, dtype=torch.float32)
    M = scale.numel()
    if M:
        rows = as_rows(x)
        _activation_quantize_kernel[(triton.cdiv(M, block_m),)](
            rows, static_scale, y if return_dequantized else None, q, scale,
            M,
            rows.stride(0), level_pitch(N),
            N=N, ACTIVATION=activation, TO_HALF=x.itemsize == 2,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps,
        )  # fmt: skip
    return y, q, scale


def activation_quantize_backward_triton(grad_y: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x; that of a matmul's epilogue without its bias."""
    if x.numel() == 0:
        return torch.empty(x.shape, device=x.device, dtype=x.dtype)
    grad, z = as_rows(grad_y), as_rows(x).contiguous()
    dx, _ = epilogue_backward_triton(grad, z, activation, needs_bias_grad=False)
    out: Tensor = torch.ops.aten._unsafe_view(dx, x.shape)
    return out
