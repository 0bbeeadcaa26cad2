"""Triton kernels around the matmul: sum of split-K parts, activation and its gradient.

Dimension key: M rows, N features before the activation, N_out after it (N / 2 with ``glu``),
S parts of a sum over K.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.matmul.dispatch import stats_tiles_padded
from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.quantize_kernel import round_to_int8
from lowbit_kernels.matmul.reference import STATS_WIDTH, InputNorm
from lowbit_kernels.matmul.statistics_kernel import merge_statistics, store_statistics


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
def _normal_tail16(a):
    # 1 - cdf(a) of a Gaussian as exp2 of a polynomial, fitted in fp64 to a 16-bit GELU: relative
    # error 8e-5 where fp16 holds the product, 1.3e-3 up to a = 6, 0.33 up to 13.2
    p = 1.46456114e-05 * a - 0.000485763652
    p = p * a + 0.00650849100
    p = p * a - 0.0494795404
    p = p * a - 0.463166118
    p = p * a - 1.14940834
    p = p * a - 1.00011539
    return tl.exp2(p)


@triton.jit
def _sigmoid_tail16(u):
    # sigmoid(-u) for u >= 0; 1 / (1 + e) is a polynomial, relative error 5e-5: no division
    e = tl.exp2(-1.4426950408889634 * u)
    p = -0.104484372 * e + 0.417937815
    p = p * e - 0.770573139
    p = p * e + 0.953420937
    p = p * e - 0.996275783
    p = p * e + 0.999948978
    return p * e


@triton.jit
def _activate16(z, EPILOGUE: tl.constexpr):
    # max(z, 0) - |z| * tail(|z|); the bounds keep infinity * 0 away and let a NaN pass
    y = tl.where(z < 0.0, 0.0, z)
    if EPILOGUE == "gelu":
        a = tl.minimum(tl.abs(z), 13.2)
        y -= a * _normal_tail16(a)
    elif EPILOGUE == "gelu_tanh":
        a = tl.minimum(tl.abs(z), 13.2)
        y -= a * _sigmoid_tail16(a * (1.5957691216057308 + 0.07135481282 * a * a))
    else:
        a = tl.minimum(tl.abs(z), 128.0)
        y -= a * _sigmoid_tail16(a)
    return y


@triton.jit
def activate(z, EPILOGUE: tl.constexpr, TO_HALF: tl.constexpr):
    # z fp32; glu needs two halves and is not here. TO_HALF: the result is rounded to 16 bits, which
    # a third of the instructions are exact enough for
    if EPILOGUE is None:
        pass
    elif EPILOGUE == "relu":
        # written so that a NaN stays one
        z = tl.where(z < 0.0, 0.0, z)
    elif TO_HALF:
        z = _activate16(z, EPILOGUE)
    elif EPILOGUE == "gelu":
        tail = _normal_tail(z)
        z *= tl.where(z > 0.0, 1.0 - tail, tail)
    elif EPILOGUE == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u)
        z *= tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        z *= tl.sigmoid(z)
    return z


@triton.jit
def _activation_slope16(z, EPILOGUE: tl.constexpr):
    # slope(z) + slope(-z) = 1 for all of them
    a = tl.abs(z)
    if EPILOGUE == "gelu":
        # cdf(-a) - a * density(a), its only zero taken out; beyond the fit it goes to 0
        p = -1.27268368e-06 * a + 5.31636178e-05
        p = p * a - 0.000891374599
        p = p * a + 0.00792546757
        p = p * a - 0.0424068682
        p = p * a - 0.571734130
        p = p * a - 0.379433483
        p = p * a - 0.588613987
        r = (0.7517915246935645 - a) * tl.exp2(p)
    elif EPILOGUE == "gelu_tanh":
        a = tl.minimum(a, 13.2)
        cubic = 0.07135481282 * a * a
        t = _sigmoid_tail16(a * (1.5957691216057308 + cubic))
        r = t * (1.0 - (1.0 - t) * a * (1.5957691216057308 + 3.0 * cubic))
    else:
        a = tl.minimum(a, 128.0)
        t = _sigmoid_tail16(a)
        r = t * (1.0 - (1.0 - t) * a)
    return tl.where(z > 0.0, 1.0 - r, r)


@triton.jit
def activation_slope(z, EPILOGUE: tl.constexpr, TO_HALF: tl.constexpr):
    if EPILOGUE == "relu":
        slope = tl.where(z > 0.0, 1.0, 0.0)
    elif TO_HALF:
        slope = _activation_slope16(z, EPILOGUE)
    elif EPILOGUE == "gelu":
        tail = _normal_tail(z)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        slope = tl.where(z > 0.0, 1.0 - tail, tail) + z * density
    elif EPILOGUE == "gelu_tanh":
        u = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        s = tl.sigmoid(u)
        # 1 - s would cancel, and its factors are large
        slope = s + z * s * tl.sigmoid(-u) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        s = tl.sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    return slope


@triton.jit
def _sum_parts(parts_ptr, offs, size, num_parts):
    total = tl.load(parts_ptr + offs)
    for part in range(1, num_parts):
        total += tl.load(parts_ptr + part * size + offs)
    return total.to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _finish_kernel(
    parts_ptr, scale_ptr, x_scale_ptr, x_stats_ptr, columns_ptr, bias_ptr, residual_ptr,
    y_ptr, z_ptr, out_scale_ptr, stats_ptr,
    M, N, K, N_out, num_parts,
    stride_rm,
    EPILOGUE: tl.constexpr, EPS: tl.constexpr, STATS_TILES: tl.constexpr, BLOCK: tl.constexpr,
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
    if x_stats_ptr is not None:
        row = m + tl.arange(0, 1)
        mean, rstd = merge_statistics(x_stats_ptr, row, M, K, EPS, STATS_TILES)
        z -= mean * tl.load(columns_ptr + cols)
        z = z * rstd + tl.load(columns_ptr + N + cols)
    if scale_ptr is not None:
        z *= tl.load(scale_ptr + cols) * row_scale
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols).to(tl.float32)
    if z_ptr is not None:
        tl.store(z_ptr + m * N + cols, z.to(z_ptr.dtype.element_ty), mask=mask)
    if EPILOGUE == "glu":
        cols_g = cols + N_out
        gate = _sum_parts(parts_ptr, m * N + cols_g, size, num_parts)
        if x_stats_ptr is not None:
            gate -= mean * tl.load(columns_ptr + cols_g)
            gate = gate * rstd + tl.load(columns_ptr + N + cols_g)
        if scale_ptr is not None:
            gate *= tl.load(scale_ptr + cols_g) * row_scale
        if bias_ptr is not None:
            gate += tl.load(bias_ptr + cols_g).to(tl.float32)
        if z_ptr is not None:
            tl.store(z_ptr + m * N + cols_g, gate.to(z_ptr.dtype.element_ty), mask=mask)
        y = z * tl.sigmoid(gate)
    else:
        y = activate(z, EPILOGUE, y_ptr.dtype.element_ty.primitive_bitwidth < 32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + m * stride_rm + cols).to(tl.float32)
    if out_scale_ptr is not None:
        y, _ = round_to_int8(y, tl.div_rn(1.0, tl.load(out_scale_ptr)), CLAMP=True)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m * N_out + offs_n, y, mask=mask)
    if stats_ptr is not None:
        start_n, row = tl.program_id(1) * BLOCK, m + tl.arange(0, 1)
        store_statistics(y.to(tl.float32)[:, None], stats_ptr, start_n, row, M, N_out)


def finish_triton(
    parts: Tensor,
    scale: Tensor | None,
    x_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    dtype: torch.dtype,
    preactivation: Tensor | None = None,
    out_scale: Tensor | None = None,
    norm: InputNorm | None = None,
    stats: Tensor | None = None,
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
        out_scale: [] fp32, the static scale of an int8 result; ``dtype`` is int8 then.
        norm: of the product's left operand; the right one has its scale already.
        stats: [T, 2, M] fp32, to be filled with ``row_statistics`` of the result.
    """
    S, M, N = parts.shape
    N_out = N // 2 if epilogue == "glu" else N
    y = torch.empty(M, N_out, dtype=dtype, device=parts.device)
    x_stats, columns, K, eps = None, None, 0, None
    if norm is not None:
        x_stats, columns, K, eps = norm.stats, norm.columns, len(norm.weight), norm.eps
    block, constants = _finish_constants(N_out, epilogue, K, eps)
    _launch_finish(
        (M, -(-N_out // block)),
        (
            parts, scale, x_scale, x_stats, columns, bias, residual,
            y, preactivation, out_scale, stats,
            M, N, K, N_out, S, 0 if residual is None else residual.stride(0),
        ),
        constants,
    )  # fmt: skip
    return y


_launch_finish = Launcher(_finish_kernel)


@functools.cache
def _finish_constants(
    N_out: int, epilogue: str | None, K: int, eps: float | None
) -> tuple[int, Constants]:
    block = min(1024, max(STATS_WIDTH, triton.next_power_of_2(N_out)))
    tiles = stats_tiles_padded(K)
    values = {"EPILOGUE": epilogue, "EPS": eps, "STATS_TILES": tiles, "BLOCK": block}
    return block, Constants(values)


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
            dz = dy * activation_slope(z, EPILOGUE, dz_ptr.dtype.element_ty.primitive_bitwidth < 32)
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
