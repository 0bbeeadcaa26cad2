"""Convolutions with a 16-bit weight on the matrix units, and the gradients of input and weight.

Dimension key: B batch, C input channels, N output channels, T input frames, T_out output frames,
G groups; K = taps * C / G values that an output reads. In the kernels C and N are those of a group,
M = B * T_out rows.

Both kernels are matmuls over windows that overlap in memory (``frames.py::windows``), a group each.
Read off sm_90's code, not measured: a step of 64 x 128 x 64 takes 80 instructions a thread and 256
cycles of the matrix unit, the weight's gradient 221; shared memory is busy for 384 cycles of it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.conv1d.kernels.frames import copy_frames_triton, windows
from lowbit_kernels.matmul.gpu import sms_of
from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.tile_kernel import tile_rows, write_tile

MAX_PARTS = 16


# a new length must not compile again
@triton.jit(do_not_specialize=["M", "T"])
def _grouped_kernel(
    x_ptr, w_ptr, bias_ptr, lengths_ptr, y_ptr,
    M, N, K, T, stride_xb, stride_xt,
    GROUPS: tl.constexpr, PHASES: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    start_m = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    # rows past the end read the last one, and are not written
    rows = tl.minimum(start_m + tl.arange(0, BLOCK_M), M - 1)
    offs_n, index_n = tile_rows(start_n, N, N, BLOCK_N, False)
    offs_n += tl.program_id(1) * N
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + (rows // T * GROUPS + tl.program_id(1)) * stride_xb + rows % T * stride_xt
    x_ptrs = x_rows[None, :] + offs_k[:, None]
    w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + start, cache_modifier=".ca")
            w = tl.load(w_ptrs + start)
        else:
            mask = start + offs_k < K
            x = tl.load(x_ptrs + start, mask=mask[:, None], other=0.0, cache_modifier=".ca")
            w = tl.load(w_ptrs + start, mask=mask[None, :], other=0.0)
        acc = tl.dot(w, x, acc)
    if lengths_ptr is not None:
        # a row is PHASES frames, one after the other
        phase = index_n // (N // PHASES)
        phases = (tl.load(lengths_ptr + rows // T) - rows % T * PHASES).to(tl.int32)
        acc = tl.where(phase[:, None] < phases[None, :], acc, 0.0)
    bias = tl.load(bias_ptr + offs_n).to(tl.float32) if bias_ptr is not None else None
    write_tile(
        acc, None, bias, None, None, None, None, None, None, y_ptr + tl.program_id(1) * N, None,
        None, None, None, None,
        start_m, start_n, offs_n, index_n < N, M, N, N, 0,
        None, GROUPS, 0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "steps", "steps_per_utterance", "steps_per_part"])
def _grouped_dw_kernel(
    dz_ptr, x_ptr, part_ptr,
    N, K, T, steps, steps_per_utterance, steps_per_part, stride_zb, stride_zt, stride_xb, stride_xt,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # one program: BLOCK_N x BLOCK_K of the sum over every frame of a part of the batch
    tiles_k = tl.cdiv(K, BLOCK_K)
    group = tl.program_id(1)
    index_n = tl.program_id(0) // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    index_k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = group * N + index_n
    mask_n, mask_k = (index_n < N)[:, None], (index_k < K)[None, :]
    offs_t = tl.arange(0, BLOCK_T)
    z_ptrs = dz_ptr + offs_n[:, None] + offs_t[None, :] * stride_zt
    x_ptrs = x_ptr + offs_t[:, None] * stride_xt + index_k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    first = tl.program_id(2) * steps_per_part
    for step in range(first, tl.minimum(first + steps_per_part, steps)):
        batch = (step // steps_per_utterance).to(tl.int64)
        start = (step % steps_per_utterance).to(tl.int64) * BLOCK_T
        mask = start + offs_t < T
        z_start = batch * stride_zb + start * stride_zt
        z = tl.load(z_ptrs + z_start, mask=mask[None, :] & mask_n, other=0.0)
        x_start = (batch * GROUPS + group) * stride_xb + start * stride_xt
        mask_x = mask[:, None] & mask_k
        x = tl.load(x_ptrs + x_start, mask=mask_x, other=0.0, cache_modifier=".ca")
        acc = tl.dot(z, x, acc)
    rows = (tl.program_id(2) * GROUPS * N + offs_n).to(tl.int64)
    tl.store(part_ptr + rows[:, None] * K + index_k[None, :], acc, mask=mask_n & mask_k)


_launch = Launcher(_grouped_kernel)
_launch_dw = Launcher(_grouped_dw_kernel)


def grouped_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, geometry: Geometry
) -> Tensor:
    """Convolve, groups, strides and dilation as ``geometry`` has them.

    Args:
        x: [B, T, C], fp16 or bf16, channels adjacent.
        weight: [N, K], tap-major, in the dtype of x.
        bias: [N].
        lengths: [B], valid frames of x; the others count as zeros.

    Returns:
        y: [B, T_out, N].
    """
    planes = copy_frames_triton(x, lengths, geometry, pad=True, groups=geometry.groups)
    return _multiply(planes, weight, bias, geometry)


def grouped_conv1d_dx_triton(
    dz: Tensor, weight: Tensor, lengths: Tensor | None, geometry: Geometry, T: int
) -> Tensor:
    """Gradient of the input, [B, T, C], zeros from ``lengths[b]`` on.

    A convolution of dz with the taps reversed, channels for outputs. With a stride s a row of the
    result is s frames, each of which has taps of its own: no zeros between the frames of dz.

    Args:
        dz: [B, T_out, N], fp16 or bf16, channels adjacent.
        weight: [N, K], as in the forward pass.
        lengths: [B].
        geometry: of the forward pass.
        T: input frames.
    """
    G, k, s, left = geometry.groups, geometry.kernel_size, geometry.stride, geometry.left
    if s > 1 and (G > 1 or geometry.dilation > 1):
        stretched = dz.new_zeros(dz.shape[0], max(0, dz.shape[1] - 1) * s + 1, dz.shape[2])
        stretched[:, ::s] = dz
        geometry = replace(geometry, stride=1)
        return grouped_conv1d_dx_triton(stretched, weight, lengths, geometry, T)
    # frame s * u + p meets output frame u - e by tap p + left + s * e
    before = s * ((s - 1 + left) // s) - left
    taps = -(-(before + k) // s)
    flipped = weight.view(G, -1, k, weight.shape[1] // k)
    flipped = F.pad(flipped, (0, 0, before, taps * s - k - before))
    flipped = flipped.unflatten(2, (taps, s)).flip(2).permute(0, 3, 4, 2, 1)
    rows, first = -(-T // s), (geometry.span - 1 - left) // s
    span = (taps - 1) * geometry.dilation + 1
    inverse = Geometry(
        taps, 1, first, rows + span - 1 - first - dz.shape[1], geometry.dilation, G
    )  # fmt: skip
    planes = copy_frames_triton(dz, None, inverse, pad=True, groups=G)
    flipped = flipped.reshape(-1, taps * (dz.shape[2] // G)).contiguous()
    dx = _multiply(planes, flipped, None, inverse, lengths, s)
    return dx.view(dx.shape[0], rows * s, flipped.shape[0] // s)[:, :T]


def grouped_conv1d_dw_triton(
    dz: Tensor, x: Tensor, lengths: Tensor | None, geometry: Geometry
) -> Tensor:
    """Gradient of the weight, [N, K] fp32, parts of the sum over frames added in order.

    Args:
        dz: [B, T_out, N], fp16 or bf16, channels adjacent.
        x: [B, T, C] in the same dtype, channels adjacent.
        lengths: [B], valid frames of x.
        geometry: of the forward pass.
    """
    G = geometry.groups
    x_rows = windows(copy_frames_triton(x, lengths, geometry, pad=True, groups=G), geometry)
    (B, T_out, N), K = dz.shape, x_rows.shape[2]
    per_utterance = -(-T_out // _DW_BLOCK_T)
    steps = B * per_utterance
    if steps == 0:
        return torch.zeros(N, K, device=dz.device)
    block_n, block_k, constants = _dw_constants(N // G, G)
    tiles = -(-N // G // block_n) * -(-K // block_k)
    free = 2 * sms_of(dz.device, _grouped_dw_kernel) // (tiles * G)
    parts = max(1, min(MAX_PARTS, free, steps))
    part = torch.empty(parts, N, K, device=dz.device)
    _launch_dw(
        (tiles, G, parts),
        (
            dz, x_rows, part, N // G, K, T_out, steps, per_utterance, -(-steps // parts),
            dz.stride(0), dz.stride(1), x_rows.stride(0), x_rows.stride(1),
        ),
        constants,
    )  # fmt: skip
    return part.sum(0) if parts > 1 else part[0]


def _multiply(
    planes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    lengths: Tensor | None = None,
    phases: int = 1,
) -> Tensor:
    """[B, T_out, N] of padded frames [B * G, T, C]; frames of the result past ``lengths`` 0."""
    x, G = windows(planes, geometry), geometry.groups
    (P, T_out, K), N = x.shape, weight.shape[0] // G
    y = torch.empty(P // G, T_out, G * N, dtype=x.dtype, device=x.device)
    M = P // G * T_out
    if y.numel():
        tiles = -(-M // 128) * -(-N // 64) * G
        is_many = tiles >= 2 * sms_of(x.device, _grouped_kernel)
        block_n, block_m, constants = _constants(N, K, G, phases, is_many)
        _launch(
            (-(-N // block_n) * -(-M // block_m), G),
            (x, weight, bias, lengths, y, M, N, K, T_out, x.stride(0), x.stride(1)),
            constants,
        )
    return y


@functools.cache
def _constants(
    N: int, K: int, groups: int, phases: int, is_many: bool
) -> tuple[int, int, Constants]:
    """Tile [n, m], and the constants; ``is_many`` allows larger tiles."""
    # the mask of several phases would spill in the largest
    block_n = 128 if N > 64 and is_many and phases == 1 else 64
    block_m = 128 if is_many else 64
    values = {
        "GROUPS": groups, "PHASES": phases, "EVEN_K": K % _BLOCK_K == 0,
        "BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_K": _BLOCK_K,
        "num_warps": 8 if block_n == 128 else 4, "num_stages": 3,
    }  # fmt: skip
    return block_n, block_m, Constants(values)


@functools.cache
def _dw_constants(N: int, groups: int) -> tuple[int, int, Constants]:
    block_n = 128 if N > 64 else 64
    values = {
        "GROUPS": groups, "BLOCK_N": block_n, "BLOCK_K": 128, "BLOCK_T": _DW_BLOCK_T,
        "num_warps": 8 if block_n == 128 else 4, "num_stages": 3,
    }  # fmt: skip
    return block_n, 128, Constants(values)


_BLOCK_K = _DW_BLOCK_T = 64
