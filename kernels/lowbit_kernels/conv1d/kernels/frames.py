"""Triton kernels that copy frames into a padded, masked, possibly int8 buffer.

Dimension key: B batch, T input frames, C channels, P parts of an utterance.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.matmul.reference import INT8_MAX, MIN_INPUT_SCALE

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
            # a maximum passes over a NaN; an infinite scale makes the whole utterance NaN
            largest = tl.maximum(largest, tl.where(x == x, tl.abs(x), float("inf")))
    tl.store(part_ptr + batch * PARTS + part, tl.max(tl.max(largest, 1), 0))


# a new length must not compile again
@triton.jit(do_not_specialize=["T", "T_padded", "left", "tiles_t"])
def _copy_frames_kernel(
    x_ptr, part_ptr, static_scale_ptr, lengths_ptr, out_ptr, scale_ptr,
    T, T_padded, C, left, tiles_t, stride_xb, stride_xt,
    PARTS: tl.constexpr, INT8_MAX: tl.constexpr, MIN_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0) // tiles_t
    tile = tl.program_id(0) % tiles_t
    offs_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    limit = T
    if lengths_ptr is not None:
        limit = tl.minimum(T, tl.load(lengths_ptr + batch).to(tl.int32))
    x_ptr += batch.to(tl.int64) * stride_xb
    x = _load_frames(x_ptr, offs_t - left, offs_c, limit, C, stride_xt)
    if scale_ptr is not None:
        if static_scale_ptr is not None:
            scale = tl.load(static_scale_ptr).to(tl.float32)
        else:
            parts = tl.load(part_ptr + batch * PARTS + tl.arange(0, PARTS))
            scale = tl.maximum(tl.div_rn(tl.max(parts), INT8_MAX), MIN_SCALE)
        tl.store(scale_ptr + batch, scale)  # every program of an utterance stores the same
        q = x.to(tl.float32) * tl.div_rn(1.0, scale)
        q = tl.minimum(tl.maximum(q, -INT8_MAX), INT8_MAX)
        # 1.5 * 2 ** 23: the sum has no bits left for a fraction, and rounds half to even
        x = (q + 12582912.0) - 12582912.0
    rows = (batch.to(tl.int64) * T_padded + offs_t) * C
    mask = (offs_t < T_padded)[:, None] & (offs_c < C)[None, :]
    tl.store(out_ptr + rows[:, None] + offs_c[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


def copy_frames_triton(
    x: Tensor, lengths: Tensor | None, geometry: Geometry, *, pad: bool
) -> Tensor:
    """x [B, T, C] (channels adjacent) with zeros in the padding and from ``lengths[b]`` on.

    Returns:
        [B, left + T + right, C] with ``pad``, else [B, T, C]; contiguous.
    """
    left, T_padded = _padding(x, geometry, pad)
    out = torch.empty(x.shape[0], T_padded, x.shape[2], dtype=x.dtype, device=x.device)
    _launch_copy(x, None, None, lengths, out, None, left)
    return out


def quantize_frames_triton(
    x: Tensor, static_scale: Tensor | None, lengths: Tensor | None, geometry: Geometry, *, pad: bool
) -> tuple[Tensor, Tensor]:
    """Like ``copy_frames_triton``, quantized to int8 with one scale an utterance.

    Returns:
        The integers, int8, and the scales [B] fp32; see ``reference.py::quantize_utterances``.
    """
    (B, T, C), device = x.shape, x.device
    left, T_padded = _padding(x, geometry, pad)
    part = None
    if static_scale is None:
        parts = min(MAX_PARTS, triton.next_power_of_2(max(1, triton.cdiv(T, BLOCK_T))))
        part = torch.empty(B, parts, device=device)
        if B:
            _largest_magnitude_kernel[(B, parts)](
                x, lengths, part,
                T, C, x.stride(0), x.stride(1),
                PARTS=parts, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C,
            )  # fmt: skip
    out = torch.empty(B, T_padded, C, dtype=torch.int8, device=device)
    scale = torch.empty(B, device=device)
    _launch_copy(x, part, static_scale, lengths, out, scale, left)
    return out, scale


def _padding(x: Tensor, geometry: Geometry, pad: bool) -> tuple[int, int]:
    """Frames before the first one, and in all."""
    if not pad:
        return 0, x.shape[1]
    return geometry.left, geometry.left + x.shape[1] + geometry.right


def _launch_copy(
    x: Tensor,
    part: Tensor | None,
    static_scale: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    left: int,
) -> None:
    B, T_padded, C = out.shape
    if B == 0:
        return
    assert x.stride(2) == 1 or x.shape[2] == 1, "the caller passes channel-last tensors"
    # one tile at least: an utterance without frames has a scale too
    tiles_t = max(1, triton.cdiv(T_padded, BLOCK_T))
    _copy_frames_kernel[(B * tiles_t, triton.cdiv(C, BLOCK_C))](
        x, part, static_scale, lengths, out, scale,
        x.shape[1], T_padded, C, left, tiles_t, x.stride(0), x.stride(1),
        PARTS=1 if part is None else part.shape[1], INT8_MAX=float(INT8_MAX),
        MIN_SCALE=MIN_INPUT_SCALE, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C,
    )  # fmt: skip
