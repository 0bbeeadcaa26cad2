"""Gradient of a depthwise convolution's weight by the rolling register window.

Dimension key: B batch, C channels, T frames read, T_out frames written, P parts of the sum.

``dW[tap] = sum over t of dz[t] * x[t * stride + tap * dilation - left]`` is the walk of
``depthwise_walk.py`` with taps and frames exchanged: a lane has up to 16 taps of a channel and
walks over a part of the frames. The runs of a program, one for every 16 taps, share x and dz in
the cache.

Floor for k = 31 on an H200, from data sheet, not measured: 4 bytes and 31 multiply-adds a value of
bf16, as the forward.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.conv1d.kernels.depthwise_walk import lanes, walk

BLOCK = 256
# frames of a part: few parts for much work, so that their sums are small beside x
FRAMES_OF_A_PART = (64, 256)


@triton.jit(do_not_specialize=["T", "T_out", "parts", "left"])
def _depthwise_conv1d_dw_kernel(
    dz_ptr, x_ptr, lengths_ptr, part_ptr,
    T, T_out, parts, stride_db, stride_dt, stride_xb, stride_xt, left,
    C: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    TAP_STEP: tl.constexpr, FRAME_STEP: tl.constexpr, FRAMES: tl.constexpr, LOG2: tl.constexpr,
    VEC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program: FRAMES frames of one utterance; a run of lanes: taps base + TAP_STEP * i
    WINDOW: tl.constexpr = 1 << LOG2
    pid = tl.program_id(0).to(tl.int64)
    batch, start = pid // parts, (pid % parts * FRAMES).to(tl.int32)
    run, read_c, offs_c, mask = lanes(C, BLOCK_C, BLOCK, VEC)
    run += tl.program_id(2) * (BLOCK // BLOCK_C)
    base = run // TAP_STEP * (WINDOW * TAP_STEP) + run % TAP_STEP
    limit = T
    if lengths_ptr is not None:
        limit = tl.minimum(T, tl.load(lengths_ptr + batch).to(tl.int32))
    stride_xt *= VEC
    stride_dt *= VEC
    x_ptrs = x_ptr + batch * (stride_xb * VEC) + read_c
    dz_ptrs = dz_ptr + batch * (stride_db * VEC) + start.to(tl.int64) * stride_dt + read_c
    frames = tl.minimum(FRAMES, T_out - start)
    acc = ()
    for _ in tl.static_range(WINDOW):
        acc += (tl.zeros((BLOCK,), dtype=tl.float32),)
    for phase in tl.static_range(FRAME_STEP):
        first = (start + phase) * STRIDE + base * DILATION - left
        acc = walk(
            acc, x_ptrs + first.to(tl.int64) * stride_xt, None, dz_ptrs + phase * stride_dt,
            stride_xt, FRAME_STEP * stride_dt, first, limit,
            (frames - phase + FRAME_STEP - 1) // FRAME_STEP,
            None, DILATION * TAP_STEP, 1, WINDOW, tl.float32,
        )  # fmt: skip
    offs = (pid * TAPS + base) * C + offs_c
    taps = tl.where(mask, TAPS - base, 0)
    for i in tl.static_range(WINDOW):
        tl.store(part_ptr + offs + TAP_STEP * i * C, acc[i], mask=taps > TAP_STEP * i)


def depthwise_conv1d_dw_triton(
    dz: Tensor, x: Tensor, lengths: Tensor | None, geometry: Geometry
) -> Tensor:
    """Gradient of the weight: [taps, C] fp32 from dz [B, T_out, C] and x [B, T, C].

    Channels of both are adjacent; frames of x from ``lengths[b]`` on count as zeros. The sum is
    taken in a fixed order.
    """
    (B, T_out, C), taps = dz.shape, geometry.kernel_size
    assert all(t.stride(2) == 1 or C == 1 for t in (dz, x)), "the caller passes channel-last"
    frames = FRAMES_OF_A_PART[B * T_out * C >= 2**22]
    parts = triton.cdiv(T_out, frames)
    part = torch.empty(B * parts, taps, C, device=x.device, dtype=torch.float32)
    if part.numel():
        strides = [s for t in (dz, x) for s in (t.stride(0) if B > 1 else 0, t.stride(1))]
        vec = math.gcd(C, 2, *strides)
        constants = constants_of(C, vec, taps, geometry.stride, geometry.dilation, frames)
        runs = triton.cdiv(taps, constants["TAP_STEP"] << constants["LOG2"]) * constants["TAP_STEP"]
        block_c = constants["BLOCK_C"]
        _depthwise_conv1d_dw_kernel[
            B * parts, triton.cdiv(C, block_c), triton.cdiv(runs, BLOCK // block_c)
        ](
            dz, x, lengths, part,
            x.shape[1], T_out, parts, *[s // vec for s in strides], geometry.left, **constants,
        )  # fmt: skip
    return part.sum(0)


def constants_of(
    C: int, vec: int, taps: int, stride: int, dilation: int, frames: int
) -> dict[str, int]:
    """Constants of a launch for parts of so many frames; 8 or 16 taps a lane."""
    shared = math.gcd(stride, dilation)
    tap_step, frame_step = stride // shared, dilation // shared
    log2 = 4 if taps > 8 * tap_step else 3
    runs = triton.cdiv(taps, tap_step << log2) * tap_step
    return {
        "C": C, "TAPS": taps, "STRIDE": stride, "DILATION": dilation, "TAP_STEP": tap_step,
        "FRAME_STEP": frame_step, "FRAMES": frames, "LOG2": log2, "VEC": vec,
        "BLOCK_C": _block_channels(C, vec, runs), "BLOCK": BLOCK, "num_warps": 4,
    }  # fmt: skip


def _block_channels(C: int, vec: int, runs: int) -> int:
    """BLOCK_C that leaves the fewest lanes idle: all runs of a program share its channels."""
    sizes = range(vec, min(C, BLOCK) + 1, vec)

    def used(block_c: int) -> float:
        of_program = BLOCK // block_c
        programs = -(-C // block_c) * -(-runs // of_program)
        return C * runs / (programs * BLOCK)

    return max(sizes, key=lambda n: (round(used(n), 2), n))
