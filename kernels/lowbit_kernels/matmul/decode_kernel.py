"""Triton functions that turn packed bytes into levels and scaled weights, in registers.

The format is described in ``formats/packing.py`` and ``formats/weight.py``: a byte holds 8 / BITS
codes, slice u in bits [u * BITS, (u + 1) * BITS).

Dimension key: N output features, K input features, G weights a group scale.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.decode_asm import (
    half_asm,
    half_bias,
    half_constraints,
    int8_asm,
    level_bias,
    level_step,
)
from lowbit_kernels.matmul.quantize_kernel import to_fp8


@triton.jit
def decode_levels(q, shift, BITS: tl.constexpr, DTYPE: tl.constexpr):
    # q uint8, any shape; shift is the slice times BITS; DTYPE int8, fp16 or bf16
    if BITS == 8:
        levels = q.to(tl.int8, bitcast=True).to(DTYPE)
    elif DTYPE.is_int():
        code = ((q >> shift) & (2**BITS - 1)).to(tl.int8)
        levels = code - 8 if BITS == 4 else 2 * code - (2**BITS - 1)
    else:
        # the bits of 1024 + v in fp16, of 128 + v in bf16, are those of 1024 or 128 with v in the
        # lowest ones: a bitwise or and a subtraction take the place of an integer conversion
        ONE: tl.constexpr = 0x6400 if DTYPE.is_fp16() else 0x4300
        BASE: tl.constexpr = 1024.0 if DTYPE.is_fp16() else 128.0
        code = (q >> shift).to(tl.uint16) & (2**BITS - 1)
        if BITS == 4:
            levels = (code | ONE).to(DTYPE, bitcast=True) - (BASE + 8)
        else:
            levels = (2 * code | ONE).to(DTYPE, bitcast=True) - (BASE + 2**BITS - 1)
        levels = levels.to(DTYPE)
    return levels


@triton.jit
def decode_slice(
    q, m, BITS: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr
):
    # q uint8 [N, J], m uint8 [N, 1 or J] the group scale or None -> level * m, [N, J] of DTYPE.
    # PAIRS: pairs of bytes a register holds, 0 without inline assembly
    if DTYPE.is_fp8():
        # integers up to 128 are exact in fp16; the matrix unit wants them by four, like int8
        w = decode_slice(q, m, BITS, SHIFT, tl.float16, 2 if PAIRS > 0 else 0)
        w = to_fp8(w, PAIRS == 0)
    elif BITS == 8 and DTYPE.is_int():
        w = q.to(tl.int8, bitcast=True)
    elif PAIRS == 0:
        w = decode_levels(q, SHIFT, BITS, DTYPE)
        if m is not None:
            w = w * m.to(DTYPE)
    else:
        IS_FP16: tl.constexpr = DTYPE.is_fp16()
        if DTYPE.is_int():
            m = tl.full((1, 1), 1, tl.int32) if m is None else m.to(tl.int32)
            factor = m * level_step(BITS)
            offset = (128 - m * level_bias(BITS)) * 0x01010101
            w = tl.inline_asm_elementwise(
                int8_asm(BITS, SHIFT), "=r,r,r,r,r,r,r,r,r,r",
                [q, tl.broadcast_to(factor, q.shape), tl.broadcast_to(offset, q.shape)],
                dtype=tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            if m is None:
                factor = tl.full((1, 1), 1.0, DTYPE)
            else:
                # the bits of 1024 + m in fp16, of 128 + m in bf16: no conversion, which is slow
                BASE: tl.constexpr = 1024.0 if IS_FP16 else 128.0
                ONE: tl.constexpr = 0x6400 if IS_FP16 else 0x4300
                factor = ((m.to(tl.uint16) | ONE).to(DTYPE, bitcast=True) - BASE).to(DTYPE)
            offset = (factor * -half_bias(BITS, IS_FP16)).to(DTYPE)
            w = tl.inline_asm_elementwise(
                half_asm(BITS, SHIFT, IS_FP16, PAIRS), half_constraints(PAIRS),
                [q, tl.broadcast_to(factor, q.shape), tl.broadcast_to(offset, q.shape)],
                dtype=tl.float16 if IS_FP16 else tl.bfloat16, is_pure=True, pack=2 * PAIRS,
            )  # fmt: skip
    return w


@triton.jit
def side_by_side(a, b):
    # [N, J] and [N, J] -> [N, 2 J]; registers only, where each thread holds the same of both
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def decode_asymmetric(q, shift, zero_point, scale, BITS: tl.constexpr, DTYPE: tl.constexpr):
    # zero_point and scale fp32, broadcastable to q; fp32 arithmetic, rounded once, like dequantize
    code = ((q >> shift) & (2**BITS - 1)).to(tl.float32)
    return ((code - zero_point) * scale).to(DTYPE)


@triton.jit
def _dequantize_kernel(
    qweight_ptr, scale_ptr, group_scale_ptr, zero_point_ptr, out_ptr,
    N, K, num_groups,
    stride_qn,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # one program: one 32-byte block of BLOCK_N rows
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows past the end read the last one, and are not written
    rows = tl.minimum(offs_n, N - 1)
    block = tl.program_id(0)
    offs_j = tl.arange(0, 32)
    q = tl.load(qweight_ptr + rows[:, None] * stride_qn + block * 32 + offs_j[None, :])
    if zero_point_ptr is None:
        scale = tl.load(scale_ptr + rows)
    for u in tl.static_range(8 // BITS):
        start = block * (256 // BITS) + u * 32
        if GROUP_SIZE > 0:
            offs_g = rows * num_groups + tl.minimum(start // GROUP_SIZE, num_groups - 1)
        if zero_point_ptr is not None:
            zero = tl.load(zero_point_ptr + offs_g).to(tl.float32)
            step = tl.load(scale_ptr + offs_g).to(tl.float32)
            w = decode_asymmetric(q, u * BITS, zero[:, None], step[:, None], BITS, tl.float32)
        else:
            w = decode_levels(q, u * BITS, BITS, tl.int8).to(tl.float32)
            if GROUP_SIZE > 0:
                w = w * tl.load(group_scale_ptr + offs_g).to(tl.float32)[:, None]
            w = w * scale[:, None]
        offs_k = start + offs_j
        out_ptrs = out_ptr + offs_n[:, None] * K + offs_k[None, :]
        mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_triton(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K], the bits of ``weight.dequantize(dtype)``."""
    N, K, spec = weight.N, weight.K, weight.spec
    out = torch.empty(N, K, dtype=dtype, device=weight.qweight.device)
    block_n = 64
    _dequantize_kernel[(weight.qweight.shape[1] // 32, triton.cdiv(N, block_n))](
        weight.qweight, weight.scale, weight.group_scale, weight.zero_point, out,
        N, K, -(-K // spec.group) if spec.group else 0,
        weight.qweight.stride(0),
        BITS=spec.bits, GROUP_SIZE=spec.group, BLOCK_N=block_n,
    )  # fmt: skip
    return out
