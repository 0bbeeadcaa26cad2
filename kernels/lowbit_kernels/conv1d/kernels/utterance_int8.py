"""Triton kernels between a front end's layers: int8 with one scale an utterance, zeros at its end.

Dimension key: B utterances, S samples, T frames, C channels, P parts of an utterance. An utterance
is one run of T * C numbers here, of which the frames of its own samples come first.

Compiled for sm_90, not measured: quantizing takes 9 instructions a value and moves 3 bytes, which
take an H200 as long as 18.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.conv1d.kernels.first_layer import frames_of
from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.quantize_kernel import int8_scale, max_or_nan, round_to_int8

BLOCK, MAX_PARTS = 8192, 64


@dataclass(frozen=True)
class Reach:
    """How frames lie in the samples: each is computed from ``field`` of them, ``hop`` apart."""

    field: int
    hop: int


@triton.jit(do_not_specialize=["S", "B", "planes", "parts", "field", "hop"])
def _largest_kernel(
    x_ptr, offset_ptr, lengths_ptr, part_ptr,
    S, B, size, C, planes, parts, field, hop,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: every parts-th block of one utterance
    batch, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    valid = tl.minimum(size, frames_of(lengths_ptr, batch, S, field, hop) * C)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for plane in range(planes):
        row = x_ptr + (plane * B + batch) * size
        for start in range(part * BLOCK, valid, parts * BLOCK):
            offs = start + tl.arange(0, BLOCK)
            x = tl.load(row + offs, mask=offs < valid, other=0.0).to(tl.float32)
            if offset_ptr is not None:
                x -= tl.load(offset_ptr + offs % C)
            largest = max_or_nan(largest, tl.where(offs < valid, tl.abs(x), 0.0))
    tl.store(part_ptr + batch * parts + part, tl.reduce(largest, 0, max_or_nan))


@triton.jit(do_not_specialize=["tiles", "parts", "rows"])
def _quantize_kernel(
    x_ptr, offset_ptr, part_ptr, q_ptr, scale_ptr,
    size, C, tiles, parts, rows,
    IS_STATIC: tl.constexpr, IS_SCALE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: one block of one utterance
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_ptr + batch * size + offs, mask=mask, other=0.0).to(tl.float32)
    if offset_ptr is not None:
        x -= tl.load(offset_ptr + offs % C)
    if IS_STATIC:
        scale = tl.load(part_ptr)
    else:
        part = tl.arange(0, PARTS)
        largest = tl.load(part_ptr + batch * parts + part, mask=part < parts, other=0.0)
        scale = tl.reduce(largest, 0, max_or_nan)
        if not IS_SCALE:
            scale = int8_scale(scale)
        if tile * BLOCK < rows:
            # of the rows of the product that comes next, fewer than there are values
            tl.store(scale_ptr + batch * rows + offs, scale + tl.zeros_like(x), mask=offs < rows)
    # padding may be larger than the utterance
    q, _ = round_to_int8(x, tl.div_rn(1.0, scale), CLAMP=True)
    tl.store(q_ptr + batch * size + offs, q, mask=mask)


@triton.jit(do_not_specialize=["S", "tiles", "field", "hop"])
def _zero_padding_kernel(
    y_ptr, lengths_ptr, S, size, C, tiles, field, hop, BLOCK: tl.constexpr
):  # fmt: skip
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    padded = (offs >= frames_of(lengths_ptr, batch, S, field, hop) * C) & (offs < size)
    tl.store(y_ptr + batch * size + offs, tl.zeros((BLOCK,), y_ptr.dtype.element_ty), mask=padded)


def largest_triton(
    x: Tensor, offset: Tensor | None, lengths: Tensor | None, samples: int, reach: Reach
) -> Tensor:
    """Largest magnitudes [B, P] fp32 of ``x - offset`` over an utterance's own frames.

    Args:
        x: [R, B, T, C] or [R, B, T], floating point, contiguous: R planes that share the scales.
        offset: [C] fp32, or None.
        lengths: [B] valid samples, or None.
        samples: S.
        reach: of the frames.
    """
    planes, B, T, *channels = x.shape
    C = channels[0] if channels else 1
    parts = min(MAX_PARTS, triton.cdiv(T * C, BLOCK))
    part = torch.empty(B, parts, device=x.device)
    if B:
        sizes = (samples, B, T * C, C, planes, parts, reach.field, reach.hop)
        args = (x, offset, lengths, part, *sizes)
        _launch_largest((B, parts), args, _OF_BLOCK)
    return part


def quantize_utterances_triton(
    x: Tensor, offset: Tensor | None, part: Tensor, rows: int, *, is_scale: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``x - offset`` as int8, one scale an utterance.

    Args:
        x: [B, T, C], floating point, contiguous.
        offset: [C] fp32, or None.
        part: [B, P] fp32, the largest magnitudes of parts of an utterance, or with ``is_scale`` the
            scales these would have; or [], the static scale of all.
        rows: that the next product has for an utterance, at most T * C.
        is_scale: what ``part`` is.

    Returns:
        q: [B, T, C] int8.
        scale: [B * rows] fp32, the scale of each row; None for a static one.
    """
    B, T, C = x.shape
    q = torch.empty(B, T, C, dtype=torch.int8, device=x.device)
    is_static, tiles = part.dim() == 0, triton.cdiv(T * C, BLOCK)
    scale = None if is_static else torch.empty(B * rows, device=x.device)
    parts = 1 if is_static else part.shape[1]
    if B:
        constants = _quantize_constants(is_static, is_scale, triton.next_power_of_2(parts))
        args = (x, offset, part, q, scale, T * C, C, tiles, parts, rows)
        _launch_quantize((B * tiles, 1), args, constants)
    return q, scale


def zero_padding_triton(y: Tensor, lengths: Tensor, samples: int, reach: Reach) -> None:
    """Write zeros to the frames of y [B, T, C] past each utterance's own; in place."""
    B, T, C = y.shape
    tiles = triton.cdiv(T * C, BLOCK)
    if B:
        args = (y, lengths, samples, T * C, C, tiles, reach.field, reach.hop)
        _launch_zeros((B * tiles, 1), args, _OF_BLOCK)


_launch_largest, _launch_quantize, _launch_zeros = (
    Launcher(kernel) for kernel in (_largest_kernel, _quantize_kernel, _zero_padding_kernel)
)
_OF_BLOCK = Constants({"BLOCK": BLOCK, "num_warps": 8})


@functools.cache
def _quantize_constants(is_static: bool, is_scale: bool, parts: int) -> Constants:
    constants = {"IS_STATIC": is_static, "IS_SCALE": is_scale, "PARTS": parts}
    return Constants(constants | {"BLOCK": BLOCK, "num_warps": 8})
