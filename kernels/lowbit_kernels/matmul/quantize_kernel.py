"""Triton kernel that quantizes the rows of a matmul's input to int8 or fp8 (e4m3).

Dimension key: M rows, seen as [B, T]; K input features.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.reference import INPUT_DTYPES, INPUT_MAX, INT8_MAX, MIN_INPUT_SCALE

_INT8_MAX = tl.constexpr(float(INT8_MAX))
_FP8_MAX = tl.constexpr(float(INPUT_MAX["fp8"]))
_MIN_SCALE = tl.constexpr(MIN_INPUT_SCALE)
# features that a program of 4 warps holds: 32 a thread
MAX_BLOCK = 4096


@triton.jit
def max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def int8_scale(largest, LIMIT: tl.constexpr = _INT8_MAX):
    # bit by bit reference.py::int8_scale; a row that is not finite becomes NaN as a whole
    scale = tl.maximum(tl.div_rn(largest, LIMIT), _MIN_SCALE)
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def round_to_int8(x, inverse, CLAMP: tl.constexpr):
    # x * inverse, rounded half to even, as int8 and as fp32. A row's own scale needs no CLAMP. The
    # product is written as a sum with 0, which no compiler fuses with the sum below
    scaled = tl.fma(x, inverse, 0.0)
    if CLAMP:
        scaled = tl.minimum(tl.maximum(scaled, -_INT8_MAX), _INT8_MAX)
    # 1.5 * 2 ** 23 leaves no bits for a fraction, and the integer in the lowest byte
    shifted = scaled + 12582912.0
    return shifted.to(tl.int32, bitcast=True).to(tl.int8), shifted - 12582912.0


@triton.jit
def to_fp8(x, INTERPRETED: tl.constexpr):
    # x in [-448, 448] or NaN as e4m3, rounded half to even
    if INTERPRETED:
        # the interpreter's cast drops carries into the exponent, and NaN: it gets what needs no
        # rounding. unit leaves no bits below the three after the leading one, or below 2 ** -9
        x = x.to(tl.float32)
        exponent = tl.maximum(x.to(tl.int32, bitcast=True) >> 23 & 255, 121)
        unit = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
        rounded = tl.where(x == x, x + unit - unit, 0.0).to(tl.float8e4nv)
        code = tl.where(x == x, rounded.to(tl.uint8, bitcast=True), 0x7F).to(tl.uint8)
        y = code.to(tl.float8e4nv, bitcast=True)
    else:
        y = x.to(tl.float8e4nv)
    return y


@triton.jit
def _magnitudes(x):
    # a maximum passes over a NaN, not over infinity
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _round(x, inverse, IS_FP8: tl.constexpr, CLAMP: tl.constexpr, INTERPRETED: tl.constexpr):
    if IS_FP8:
        scaled = tl.clamp(x * inverse, -_FP8_MAX, _FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
        q = to_fp8(scaled, INTERPRETED)
    else:
        q, _ = round_to_int8(x, inverse, CLAMP)
    return q


@triton.jit(do_not_specialize=["T"])
def _quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr,
    K, T,
    stride_xb, stride_xt, stride_qm,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    # one program: one row, which is read once if one block holds it (IS_WHOLE)
    IS_FP8: tl.constexpr = q_ptr.dtype.element_ty.is_fp8()
    LIMIT: tl.constexpr = _FP8_MAX if IS_FP8 else _INT8_MAX
    m = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + m // T * stride_xb + m % T * stride_xt
    q_row = q_ptr + m * stride_qm
    offs = tl.arange(0, BLOCK)
    if IS_WHOLE:
        x = tl.load(x_row + offs, mask=offs < K, other=0.0).to(tl.float32)
        largest = _magnitudes(x)
    elif not HAS_SCALE:
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, K, BLOCK):
            x = tl.load(x_row + start + offs, mask=start + offs < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, _magnitudes(x))
    if HAS_SCALE:
        scale = tl.load(scale_ptr + m)
    else:
        scale = int8_scale(tl.max(largest), LIMIT)
        tl.store(scale_ptr + m, scale)
    inverse = tl.div_rn(1.0, scale)
    if IS_WHOLE:
        q = _round(x, inverse, IS_FP8, HAS_SCALE, INTERPRETED)
        tl.store(q_row + offs, q, mask=offs < K)
    else:
        for start in range(0, K, BLOCK):
            x = tl.load(x_row + start + offs, mask=start + offs < K, other=0.0).to(tl.float32)
            q = _round(x, inverse, IS_FP8, HAS_SCALE, INTERPRETED)
            tl.store(q_row + start + offs, q, mask=start + offs < K)


def quantize_rows_triton(
    x_btk: Tensor, x_scale: Tensor | None, inputs: str = "int8"
) -> tuple[Tensor, Tensor]:
    """Quantize rows to int8 or fp8.

    Args:
        x_btk: [B, T, K], floating point, its last stride 1.
        x_scale: [B * T] fp32. None: each row's own, from its largest magnitude.
        inputs: ``"int8"`` or ``"fp8"``.

    Returns:
        q: [B, T, K], bit by bit that of ``reference.quantize_rows``, rows 32 bytes aligned.
        x_scale: [B * T] fp32; NaN where a row's own would not be finite.
    """
    B, T, K = x_btk.shape
    pitch = -(-K // 32) * 32
    q = torch.empty(B, T, pitch, dtype=INPUT_DTYPES[inputs], device=x_btk.device)
    scale = torch.empty(B * T, device=x_btk.device) if x_scale is None else x_scale
    if B * T:
        stride_b = x_btk.stride(0) if B > 1 else 0
        _launch(
            (B * T, 1),
            (x_btk, q, scale, K, T, stride_b, x_btk.stride(1), pitch),
            _constants(K, x_scale is not None),
        )
    return q[..., :K], scale


_launch = Launcher(_quantize_rows_kernel)


@functools.cache
def _constants(K: int, has_scale: bool) -> Constants:
    return Constants(
        {
            "HAS_SCALE": has_scale,
            "BLOCK": min(MAX_BLOCK, triton.next_power_of_2(K)),
            "IS_WHOLE": K <= MAX_BLOCK,
            "INTERPRETED": not isinstance(_quantize_rows_kernel, triton.JITFunction),
        }
    )
