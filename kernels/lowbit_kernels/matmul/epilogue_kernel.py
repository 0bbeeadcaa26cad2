"""Triton kernels around the matmul: sum of split-K parts, activation and its gradient.

Dimension key: M rows, N features before the activation, N_out after it (N / 2 with ``glu``),
S parts of a sum over K.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _normal_tail(z):
    # 1 - cdf(|z|) of a Gaussian, z fp32. erfc(a) = t * exp(polynomial(t) - a * a) with
    # t = 1 / (1 + a / 2): a Chebyshev fit in float64 for a up to 14, relative error 7e-8. Without
    # branches it takes half the registers of tl.erf, and 1 + erf would cancel for negative z
    a = tl.abs(z) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * a)
    p = 0.165509898 * t - 0.791463095
    p = p * t + 1.4132031
    p = p * t - 1.03165751
    p = p * t + 0.191462302
    p = p * t - 0.139631483
    p = p * t + 0.0811646088
    p = p * t + 0.377223408
    p = p * t + 0.999686355
    p = p * t - 1.26549752
    return 0.5 * t * tl.exp(p - a * a)


@triton.jit
def activate(z, EPILOGUE: tl.constexpr):
    # z fp32; glu needs two halves and is not here
    if EPILOGUE == "gelu":
        tail = _normal_tail(z)
        z *= tl.where(z > 0.0, 1.0 - tail, tail)
    elif EPILOGUE == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u)
        z *= tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif EPILOGUE == "silu":
        z *= tl.sigmoid(z)
    elif EPILOGUE == "relu":
        # written so that a NaN stays one
        z = tl.where(z < 0.0, 0.0, z)
    return z


@triton.jit
def activation_slope(z, EPILOGUE: tl.constexpr):
    if EPILOGUE == "gelu":
        tail = _normal_tail(z)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        slope = tl.where(z > 0.0, 1.0 - tail, tail) + z * density
    elif EPILOGUE == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        slope = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif EPILOGUE == "silu":
        s = tl.sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    else:
        slope = tl.where(z > 0.0, 1.0, 0.0)
    return slope


@triton.jit
def _sum_parts(parts_ptr, offs, size, num_parts):
    total = tl.load(parts_ptr + offs)
    for part in range(1, num_parts):
        total += tl.load(parts_ptr + part * size + offs)
    return total.to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _finish_kernel(
    parts_ptr, scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, y_ptr, z_ptr,
    M, N, N_out, num_parts,
    stride_rm,
    EPILOGUE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK columns of one row
    m = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N_out
    # columns past the end read the last one, and are not written
    cols = tl.minimum(offs_n, N_out - 1)
    size = M.to(tl.int64) * N
    row_scale = tl.load(x_scale_ptr + m) if x_scale_ptr is not None else 1.0
    z = _sum_parts(parts_ptr, m * N + cols, size, num_parts)
    if scale_ptr is not None:
        z *= tl.load(scale_ptr + cols) * row_scale
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + m * N + cols, z.to(z_ptr.dtype.element_ty), mask=mask)
    if EPILOGUE == "glu":
        cols_g = cols + N_out
        gate = _sum_parts(parts_ptr, m * N + cols_g, size, num_parts)
        if scale_ptr is not None:
            gate *= tl.load(scale_ptr + cols_g) * row_scale
        if bias_ptr is not None:
            gate += tl.load(bias_ptr + cols_g).to(tl.float32)
        if z_ptr is not None:
            tl.store(z_ptr + m * N + cols_g, gate.to(z_ptr.dtype.element_ty), mask=mask)
        y = z * tl.sigmoid(gate)
    else:
        y = activate(z, EPILOGUE)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + m * stride_rm + cols).to(tl.float32)
    tl.store(y_ptr + m * N_out + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask)


def finish_triton(
    parts: Tensor,
    scale: Tensor | None,
    x_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    dtype: torch.dtype,
    preactivation: Tensor | None = None,
) -> Tensor:
    """``epilogue(parts.sum(0) * scale + bias) + residual``, [M, N_out], summed in order.

    Args:
        parts: [S, M, N], contiguous, floating point or int32.
        scale: [N] fp32.
        x_scale: [M] fp32.
        bias: [N].
        residual: [M, N_out], its last stride 1.
        epilogue: as in ``low_bit_linear``.
        dtype: of the result.
        preactivation: [M, N], to be filled with what the activation sees.
    """
    S, M, N = parts.shape
    N_out = N // 2 if epilogue == "glu" else N
    y = torch.empty(M, N_out, dtype=dtype, device=parts.device)
    block = min(1024, triton.next_power_of_2(N_out))
    _finish_kernel[(M, triton.cdiv(N_out, block))](
        parts, scale, x_scale, bias, residual, y, preactivation,
        M, N, N_out, S,
        0 if residual is None else residual.stride(0),
        EPILOGUE=epilogue, BLOCK=block,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["M"])
def _epilogue_backward_kernel(
    dy_ptr, z_ptr, dz_ptr, partial_ptr,
    M, N, N_out,
    stride_ym,
    EPILOGUE: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # one program: ROWS rows of BLOCK_N columns; its part of the bias gradient goes to partial_ptr
    pid_m = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N_out
    db = tl.zeros((BLOCK_N,), dtype=tl.float32)
    db_gate = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        offs_m = pid_m * ROWS + start + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        offs_z = offs_m[:, None] * N + offs_n[None, :]
        z = tl.load(z_ptr + offs_z, mask=mask, other=0.0).to(tl.float32)
        if EPILOGUE == "glu":
            gate = tl.load(z_ptr + offs_z + N_out, mask=mask, other=0.0).to(tl.float32)
            s = tl.sigmoid(gate)
            dz = dy * s
            dgate = dz * z * (1.0 - s)
            tl.store(dz_ptr + offs_z + N_out, dgate.to(dz_ptr.dtype.element_ty), mask=mask)
            db_gate += tl.sum(dgate, 0)
        else:
            dz = dy * activation_slope(z, EPILOGUE)
        tl.store(dz_ptr + offs_z, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        db += tl.sum(dz, 0)
    if partial_ptr is not None:
        tl.store(partial_ptr + pid_m * N + offs_n, db, mask=mask_n)
        if EPILOGUE == "glu":
            tl.store(partial_ptr + pid_m * N + N_out + offs_n, db_gate, mask=mask_n)


def epilogue_backward_triton(
    dy: Tensor, z: Tensor | None, epilogue: str | None, needs_bias_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of the pre-activation [M, N], and its sum over rows [N] (or [0]).

    Args:
        dy: [M, N_out], its last stride 1.
        z: [M, N], contiguous; None without an epilogue.
        epilogue: as in ``low_bit_linear``.
        needs_bias_grad: whether the sum is wanted. It is taken in fixed order.
    """
    (M, N_out), empty = dy.shape, dy.new_empty(0)
    if epilogue is None:
        return dy, dy.sum(0) if needs_bias_grad else empty
    assert z is not None, "linear_train saves it"
    N = z.shape[1]
    dz = torch.empty(M, N, dtype=dy.dtype, device=dy.device)
    rows, block_m, block_n = 64, 16, 64
    programs = triton.cdiv(M, rows)
    partial = torch.empty(programs, N, device=dy.device) if needs_bias_grad else None
    _epilogue_backward_kernel[(programs, triton.cdiv(N_out, block_n))](
        dy, z, dz, partial,
        M, N, N_out,
        dy.stride(0),
        EPILOGUE=epilogue, ROWS=rows, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return dz, empty if partial is None else partial.sum(0).to(dy.dtype)
