"""Triton kernels that copy frames into a padded, masked, possibly int8 buffer.

Dimension key: B batch, T input frames, C channels, G groups of channels, P parts of an utterance.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.quantize_kernel import int8_scale, round_to_int8

MAX_PARTS = 128
BLOCK_T, BLOCK_C = 16, 128


@triton.jit
def _load_frames(x_ptr, frame, offs_c, limit, C, stride_xt):
    mask = ((frame >= 0) & (frame < limit))[:, None] & (offs_c < C)[None, :]
    x_ptrs = x_ptr + frame.to(tl.int64)[:, None] * stride_xt + offs_c[None, :]
    return tl.load(x_ptrs, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["T"])
def _largest_magnitude_kernel(
    x_ptr, lengths_ptr, part_ptr,
    T, C, stride_xb, stride_xt,
    PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program: every PARTS-th tile of one utterance
    batch, part = tl.program_id(0), tl.program_id(1)
    x_ptr += batch.to(tl.int64) * stride_xb
    limit = T
    if lengths_ptr is not None:
        limit = tl.minimum(T, tl.load(lengths_ptr + batch).to(tl.int32))
    largest = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for start_t in range(part * BLOCK_T, limit, PARTS * BLOCK_T):
        for start_c in range(0, C, BLOCK_C):
            x = _load_frames(
                x_ptr, start_t + tl.arange(0, BLOCK_T), start_c + tl.arange(0, BLOCK_C),
                limit, C, stride_xt,
            ).to(tl.float32)  # fmt: skip
            # a maximum passes over a NaN; an infinite one makes the whole utterance NaN
            largest = tl.maximum(largest, tl.where(x == x, tl.abs(x), float("inf")))
    tl.store(part_ptr + batch * PARTS + part, tl.max(tl.max(largest, 1), 0))


# a new length must not compile again
@triton.jit(do_not_specialize=["T", "T_padded", "left", "tiles_t", "scale_rows"])
def _copy_frames_kernel(
    x_ptr, part_ptr, static_scale_ptr, lengths_ptr, out_ptr, scale_ptr,
    T, T_padded, C, left, tiles_t, scale_rows, stride_xb, stride_xt,
    GROUPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_T frames of BLOCK_C channels of one group, C of which it has
    batch = tl.program_id(0) // tiles_t
    tile = tl.program_id(0) % tiles_t
    group = tl.program_id(1) % GROUPS
    offs_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(1) // GROUPS * BLOCK_C + tl.arange(0, BLOCK_C)
    limit = T
    if lengths_ptr is not None:
        limit = tl.minimum(T, tl.load(lengths_ptr + batch).to(tl.int32))
    x_ptr += batch.to(tl.int64) * stride_xb + group * C
    x = _load_frames(x_ptr, offs_t - left, offs_c, limit, C, stride_xt)
    if scale_ptr is not None:
        if static_scale_ptr is not None:
            scale = tl.load(static_scale_ptr).to(tl.float32)
        else:
            parts = tl.load(part_ptr + batch * PARTS + tl.arange(0, PARTS))
            scale = int8_scale(tl.max(parts))
        # every program of a tile stores the same
        scale_ptrs = scale_ptr + batch.to(tl.int64) * scale_rows + offs_t
        tl.store(scale_ptrs, tl.zeros_like(offs_t) + scale, mask=offs_t < scale_rows)
        inverse = tl.div_rn(1.0, scale)
        x, _ = round_to_int8(x.to(tl.float32), inverse, static_scale_ptr is not None)
    rows = ((batch.to(tl.int64) * GROUPS + group) * T_padded + offs_t) * C
    mask = (offs_t < T_padded)[:, None] & (offs_c < C)[None, :]
    tl.store(out_ptr + rows[:, None] + offs_c[None, :], x, mask=mask)


_launch_largest = Launcher(_largest_magnitude_kernel)
_launch_copy = Launcher(_copy_frames_kernel)


def copy_frames_triton(
    x: Tensor, lengths: Tensor | None, geometry: Geometry, *, pad: bool, groups: int = 1
) -> Tensor:
    """x [B, T, C] (channels adjacent) with zeros in the padding and from ``lengths[b]`` on.

    Returns:
        [B * groups, left + T + right, C / groups] with ``pad``, else [B * groups, T, C / groups];
        contiguous, the groups of an utterance one after the other.
    """
    left, T_padded = _padding(x, geometry, pad)
    B, _, C = x.shape
    out = torch.empty(B * groups, T_padded, C // groups, dtype=x.dtype, device=x.device)
    _copy(x, None, None, lengths, out, None, left)
    return out


def quantize_frames_triton(
    x: Tensor,
    static_scale: Tensor | None,
    lengths: Tensor | None,
    geometry: Geometry,
    *,
    pad: bool,
    groups: int = 1,
    scale_rows: int = 1,
) -> tuple[Tensor, Tensor]:
    """Like ``copy_frames_triton``, quantized to int8 with one scale an utterance.

    Returns:
        The integers, int8, and the scales fp32 [B * scale_rows], each so many times; see
        ``reference.py::quantize_utterances``.
    """
    (B, T, C), device = x.shape, x.device
    left, T_padded = _padding(x, geometry, pad)
    part = None
    if static_scale is None:
        parts = min(MAX_PARTS, triton.next_power_of_2(max(1, -(-T // BLOCK_T))))
        part = torch.empty(B, parts, device=device)
        if B:
            sizes = (T, C, x.stride(0), x.stride(1))
            _launch_largest((B, parts), (x, lengths, part, *sizes), _largest_constants(parts))
    out = torch.empty(B * groups, T_padded, C // groups, dtype=torch.int8, device=device)
    scale = torch.empty(B * scale_rows, device=device)
    _copy(x, part, static_scale, lengths, out, scale, left)
    return out, scale


def windows(planes: Tensor, geometry: Geometry) -> Tensor:
    """What each output frame reads: [P, T_out, taps * C] of padded frames [P, T, C].

    A view in which rows overlap. Taps that are apart are copied together.
    """
    (P, T, C), k = planes.shape, geometry.kernel_size
    rows = (T - geometry.span) // geometry.stride + 1
    step = (planes.stride(0), geometry.stride * C)
    if geometry.dilation == 1:
        return planes.as_strided((P, rows, k * C), (*step, 1))
    spread = planes.as_strided((P, rows, k, C), (*step, geometry.dilation * C, 1))
    return spread.reshape(P, rows, k * C)


def _padding(x: Tensor, geometry: Geometry, pad: bool) -> tuple[int, int]:
    """Frames before the first one, and in all."""
    if not pad:
        return 0, x.shape[1]
    return geometry.left, geometry.left + x.shape[1] + geometry.right


def _copy(
    x: Tensor,
    part: Tensor | None,
    static_scale: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    left: int,
) -> None:
    B, (planes, T_padded, C) = x.shape[0], out.shape
    if B == 0:
        return
    assert x.stride(2) == 1 or x.shape[2] == 1, "the caller passes channel-last tensors"
    # an utterance without frames has a scale too
    scale_rows = 0 if scale is None else scale.shape[0] // B
    tiles_t = max(1, -(-max(T_padded, scale_rows) // BLOCK_T))
    groups = planes // B
    block_c, constants = _copy_constants(groups, C, 1 if part is None else part.shape[1])
    sizes = (
        x.shape[1], T_padded, C, left, tiles_t, scale_rows, x.stride(0), x.stride(1),
    )  # fmt: skip
    _launch_copy(
        (B * tiles_t, -(-C // block_c) * groups),
        (x, part, static_scale, lengths, out, scale, *sizes),
        constants,
    )


@functools.cache
def _largest_constants(parts: int) -> Constants:
    return Constants({"PARTS": parts, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C})


@functools.cache
def _copy_constants(groups: int, C: int, parts: int) -> tuple[int, Constants]:
    block_c = min(BLOCK_C, triton.next_power_of_2(C))
    values = {"GROUPS": groups, "PARTS": parts, "BLOCK_T": BLOCK_T, "BLOCK_C": block_c}
    return block_c, Constants(values)
