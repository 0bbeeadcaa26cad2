"""Triton kernel of position_gate: x is read once, which is its floor: 2 bytes a value in 16 bits.

In PyTorch it is a product of 8 columns and seven passes.

Dimension key: B batch, T frames, H heads, D head dimension, C = H * D; M rows of a head each.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _summed(weight_ptr, bias_ptr, FIRST: tl.constexpr, offs_d, D: tl.constexpr):
    # of four rows of the layer, whose results are added: their sum
    offs = (FIRST + tl.arange(0, 4))[:, None]
    weight = tl.load(weight_ptr + offs * D + offs_d[None, :], mask=offs_d[None, :] < D, other=0.0)
    bias = tl.load(bias_ptr + FIRST + tl.arange(0, 4))
    return tl.sum(weight.to(tl.float32), 0), tl.sum(bias.to(tl.float32), 0)


@triton.jit(do_not_specialize=["M", "T"])
def _position_gate_kernel(
    x_ptr, weight_ptr, bias_ptr, const_ptr, out_ptr, M, T, H, stride_b, stride_t,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d, is_row = tl.arange(0, BLOCK_D), m < M
    h, frame = m % H, m // H
    b, t = (frame // T).to(tl.int64), frame % T
    x_ptrs = x_ptr + (b * stride_b + t.to(tl.int64) * stride_t + h * D)[:, None] + offs_d[None, :]
    mask = is_row[:, None] & (offs_d < D)[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    weight, bias = _summed(weight_ptr, bias_ptr, 0, offs_d, D)
    update = tl.sigmoid(tl.sum(x * weight[None, :], 1) + bias)
    weight, bias = _summed(weight_ptr, bias_ptr, 4, offs_d, D)
    reset = tl.sigmoid(tl.sum(x * weight[None, :], 1) + bias)
    const = tl.load(const_ptr + h, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + (b * H + h) * T + t, update * (reset * const - 1.0) + 2.0, mask=is_row)


def tile_rows(block_d: int) -> int:
    """BLOCK_M: a program reads 4096 values."""
    return max(1, 4096 // block_d)


def position_gate_triton(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> Tensor:
    """Launch the kernel on x [B, T, C]. gate_op.py has checked the inputs."""
    (B, T, C), H = x.shape, const.numel()
    out = torch.empty(B, H, T, device=x.device, dtype=torch.float32)
    M, block_d = out.numel(), triton.next_power_of_2(C // H)
    if M:
        x = x if x.stride(-1) == 1 else x.contiguous()
        block_m = tile_rows(block_d)
        _position_gate_kernel[(triton.cdiv(M, block_m),)](
            x, weight.contiguous(), bias.contiguous(), const.contiguous(), out,
            M, T, H, x.stride(0), x.stride(1), D=C // H, BLOCK_M=block_m, BLOCK_D=block_d,
        )  # fmt: skip
    return out
