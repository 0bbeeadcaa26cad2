"""Triton kernels of a front end's first layer: convolution of a waveform, norm, activation.

Dimension key: B utterances, S samples, T frames, N output channels, P chunks of an utterance; a
window is what one frame is computed from, W taps.

A GroupNorm of one channel a group is an affine map of the convolution's output, whose mean and
variance follow from the windows alone: ``mean = w m``, ``var = w R w'`` with their mean m [W] and
covariance R [W, W]. So the output is written once, normalized, and never read.

The product runs on the matrix unit, K = 16 of which W are taps: products of 16-bit samples and
weights are exact there, and the pipes of fp32, which the activation fills, are spared them. Floor
for 10 s and 512 channels, from data sheets: 33 MB written, 7.6 us of an H200. Compiled for sm_90,
not measured: 14.3 instructions a value, 12.5 of them norm and GELU, which issue in 7.9 us; 15.8
with the range of the result, 20 to int8, 28 with a LayerNorm. The moments take 8 of a warp a frame.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment"

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.conv1d.geometry import MAX_WINDOW
from lowbit_kernels.cpu import FrontEndLayer, Norm
from lowbit_kernels.matmul.epilogue_kernel import activate
from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.quantize_kernel import max_or_nan, round_to_int8

_WINDOW = tl.constexpr(MAX_WINDOW)
# frames of a program of one warp: eight a lane
CHUNK = 256
# chunks that are put together at once, and the channels of a program that does so
MERGED, FOLD_CHANNELS = 32, 32


@triton.jit
def frames_of(lengths_ptr, batch, S, FIELD: tl.constexpr, HOP: tl.constexpr):
    # frames computed from an utterance's own samples alone: FIELD samples each, HOP apart
    samples = S
    if lengths_ptr is not None:
        samples = tl.minimum(S, tl.load(lengths_ptr + batch).to(tl.int32))
    return tl.where(samples < FIELD, 0, (samples - FIELD) // HOP + 1)


@triton.jit(do_not_specialize=["S", "chunks", "stride_xb"])
def _moments_kernel(
    x_ptr, lengths_ptr, total_ptr, squares_ptr,
    S, chunks, stride_xb,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # one program: the windows of one chunk; their sum, and products centered at their own mean
    batch, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    frames = frames_of(lengths_ptr, batch, S, TAPS, STRIDE)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    valid = offs < frames
    count = tl.minimum(tl.maximum(frames - chunk * BLOCK, 1), BLOCK).to(tl.float32)
    x_ptrs = x_ptr + batch * stride_xb + offs * STRIDE
    total_ptr += (batch * chunks + chunk) * WIDTH
    squares_ptr += (batch * chunks + chunk) * WIDTH * WIDTH
    taps = ()
    for i in tl.static_range(TAPS):
        x = tl.load(x_ptrs + i, mask=valid, other=0.0).to(tl.float32)
        total = tl.sum(x, 0)
        tl.store(total_ptr + i, total)
        x = tl.where(valid, x - total / count, 0.0)
        taps = taps + (x,)  # noqa: RUF005
        for j in tl.static_range(i + 1):
            tl.store(squares_ptr + i * WIDTH + j, tl.sum(x * taps[j], 0))


@triton.jit(do_not_specialize=["S", "chunks"])
def _fold_norm_kernel(
    total_ptr, squares_ptr, lengths_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr,
    padded_ptr, gain_ptr, shift_ptr,
    S, N, chunks,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, EPS: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr, MERGED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # one program: a few channels of one utterance. The chunks are merged without cancellation
    # (Chan, Golub, LeVeque, 1983), always in the same order
    batch = tl.program_id(0).to(tl.int64)
    frames = frames_of(lengths_ptr, batch, S, TAPS, STRIDE)
    some = tl.maximum(frames, 1).to(tl.float32)
    tap = tl.arange(0, WIDTH)
    total = tl.zeros((MERGED, WIDTH), dtype=tl.float32)
    total_ptr += batch * chunks * WIDTH
    for start in range(0, chunks, MERGED):
        chunk = (start + tl.arange(0, MERGED))[:, None]
        mask = (chunk < chunks) & (tap < TAPS)[None, :]
        total += tl.load(total_ptr + chunk * WIDTH + tap[None, :], mask=mask, other=0.0)
    mean = tl.sum(total, 0) / some

    pair = tl.arange(0, WIDTH * WIDTH)
    i, j = pair // WIDTH, pair % WIDTH
    stored = tl.maximum(i, j) * WIDTH + tl.minimum(i, j)
    used = ((i < TAPS) & (j < TAPS))[None, :]
    mean_i, mean_j = tl.gather(mean, i, 0), tl.gather(mean, j, 0)
    products = tl.zeros((MERGED, WIDTH * WIDTH), dtype=tl.float32)
    squares_ptr += batch * chunks * WIDTH * WIDTH
    for start in range(0, chunks, MERGED):
        chunk = (start + tl.arange(0, MERGED))[:, None]
        count = tl.minimum(tl.maximum(frames - chunk * CHUNK, 0), CHUNK).to(tl.float32)
        mask = (chunk < chunks) & used
        inverse = 1.0 / tl.maximum(count, 1.0)
        row = total_ptr + chunk * WIDTH
        shift_i = tl.load(row + i[None, :], mask=mask, other=0.0) * inverse - mean_i[None, :]
        shift_j = tl.load(row + j[None, :], mask=mask, other=0.0) * inverse - mean_j[None, :]
        squares = squares_ptr + chunk * (WIDTH * WIDTH) + stored[None, :]
        products += tl.load(squares, mask=mask, other=0.0) + count * (shift_i * shift_j)
    covariance = tl.sum(products, 0) / some

    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    row = weight_ptr + offs_n[:, None] * TAPS
    mask = mask_n[:, None] & (tap < TAPS)[None, :]
    w = tl.load(row + tap[None, :], mask=mask, other=0.0)
    if tl.program_id(0) == 0:
        tl.store(padded_ptr + offs_n[:, None] * WIDTH + tap[None, :], w, mask=mask_n[:, None])
    mean = tl.sum(w.to(tl.float32) * mean[None, :], 1)
    mask = mask_n[:, None] & used
    w_i = tl.load(row + i[None, :], mask=mask, other=0.0).to(tl.float32)
    w_j = tl.load(row + j[None, :], mask=mask, other=0.0).to(tl.float32)
    # rounding can leave a silent channel's variance a little below zero
    variance = tl.maximum(tl.sum(w_i * w_j * covariance[None, :], 1), 0.0)
    gain = tl.load(norm_weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    gain *= tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))
    # the convolution's own bias is taken away again by the mean
    shift = tl.load(norm_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32) - mean * gain
    tl.store(gain_ptr + batch * N + offs_n, gain, mask=mask_n)
    tl.store(shift_ptr + batch * N + offs_n, shift, mask=mask_n)


@triton.jit(do_not_specialize=["S", "T", "tiles_t", "stride_xb"])
def _first_layer_kernel(
    x_ptr, weight_ptr, gain_ptr, shift_ptr, norm_weight_ptr, norm_bias_ptr, lengths_ptr,
    out_scale_ptr, out_offset_ptr, y_ptr, largest_ptr,
    S, T, N, tiles_t, stride_xb, stride_sb,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, EPS: tl.constexpr, EPILOGUE: tl.constexpr,
    EVEN_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # one program: all channels of BLOCK_T frames, BLOCK_N at a time; with a LayerNorm (EPS) at once
    batch, tile = (tl.program_id(0) // tiles_t).to(tl.int64), tl.program_id(0) % tiles_t
    offs_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    tap = tl.arange(0, _WINDOW)
    # frames past the utterance's own repeat its last: none reads padding, or raises the range
    last = tl.maximum(frames_of(lengths_ptr, batch, S, TAPS, STRIDE) - 1, 0)
    window = x_ptr + batch * stride_xb + tl.minimum(offs_t, last) * STRIDE
    x = tl.load(window[None, :] + tap[:, None], mask=(tap < TAPS)[:, None], other=0.0)
    y_rows = y_ptr + (batch * T + offs_t) * N
    mask_t = (offs_t < T)[None, :]
    largest, inverse = tl.zeros((BLOCK_N,), dtype=tl.float32), 1.0
    if out_scale_ptr is not None:
        inverse = tl.div_rn(1.0, tl.load(out_scale_ptr))
    for start_n in range(0, N, BLOCK_N):
        index_n = start_n + tl.arange(0, BLOCK_N)
        # channels past the end repeat the last
        offs_n = index_n if EVEN_N else tl.minimum(index_n, N - 1)
        z = tl.dot(tl.load(weight_ptr + offs_n[:, None] * _WINDOW + tap[None, :]), x)
        if gain_ptr is not None:
            z *= tl.load(gain_ptr + batch * stride_sb + offs_n)[:, None]
        if shift_ptr is not None:
            z += tl.load(shift_ptr + batch * stride_sb + offs_n).to(tl.float32)[:, None]
        if EPS is not None:
            inside = (index_n < N)[:, None]
            mean = tl.sum(z if EVEN_N else tl.where(inside, z, 0.0), 0) / N
            z -= mean[None, :]
            squares = z * z
            variance = tl.sum(squares if EVEN_N else tl.where(inside, squares, 0.0), 0) / N
            z *= tl.rsqrt(variance + EPS)[None, :]
            z *= tl.load(norm_weight_ptr + offs_n).to(tl.float32)[:, None]
            z += tl.load(norm_bias_ptr + offs_n).to(tl.float32)[:, None]
        y = activate(z, EPILOGUE, True)
        if out_offset_ptr is not None:
            y -= tl.load(out_offset_ptr + offs_n)[:, None]
        if largest_ptr is not None:
            largest = max_or_nan(largest, tl.reduce(tl.abs(y), 1, max_or_nan))
        if out_scale_ptr is not None:
            y, _ = round_to_int8(y, inverse, CLAMP=True)
        y = y.to(y_ptr.dtype.element_ty)
        mask = mask_t if EVEN_N else mask_t & (index_n < N)[:, None]
        tl.store(y_rows[None, :] + index_n[:, None], y, mask=mask)
    if largest_ptr is not None:
        # what is rounded last is the largest of what is rounded
        largest = tl.reduce(largest, 0, max_or_nan).to(y_ptr.dtype.element_ty).to(tl.float32)
        tl.store(largest_ptr + batch * tiles_t + tile, largest)


def first_layer_triton(
    waveform: Tensor,
    layer: FrontEndLayer,
    lengths: Tensor | None,
    *,
    out_scale: Tensor | None = None,
    out_offset: Tensor | None = None,
    want_largest: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Convolution, norm and activation. The caller has checked the inputs.

    Args:
        waveform: [B, S], fp16 or bf16, samples adjacent.
        layer: float weight [N, 1, W] in the waveform's dtype, W <= ``MAX_WINDOW``.
        lengths: [B] valid samples, or None; only statistics depend on them.
        out_scale: [] fp32, the static scale of an int8 result.
        out_offset: [N] fp32, subtracted from the result before it is rounded.
        want_largest: whether to find the largest magnitudes of the result.

    Returns:
        y: [B, T, N], in the waveform's dtype or int8; frames past ``lengths`` hold anything.
        largest: [B, tiles] fp32, of the valid frames of a tile; or None.
    """
    (B, S), N, norm, device = waveform.shape, layer.N, layer.norm, waveform.device
    assert isinstance(layer.weight, Tensor), "a front end's first layer is float"
    taps, stride = layer.weight.shape[-1], layer.stride
    T = (S - taps) // stride + 1
    weight = layer.weight.detach().view(N, taps)
    is_layer = norm is not None and norm.kind == "layer"
    tiles_t = triton.cdiv(T, tiles(N, is_layer)[0])
    dtype = waveform.dtype if out_scale is None else torch.int8
    y = torch.empty(B, T, N, dtype=dtype, device=device)
    largest = torch.empty(B, tiles_t, device=device) if want_largest else None
    if B == 0:
        return y, largest
    gain, shift, stride_sb, norm_parameters = None, layer.bias, 0, (None, None)
    if norm is not None and norm.kind == "group":
        weight, gain, shift = _folded(waveform, weight, norm, lengths, stride)
        stride_sb = N
    else:
        weight = F.pad(weight, (0, MAX_WINDOW - taps))
        if norm is not None:
            norm_parameters = norm.weight, norm.bias
    eps = norm.eps if norm is not None and is_layer else None
    tensors = (waveform, weight, gain, shift, *norm_parameters, lengths, out_scale, out_offset)
    _launch(
        (B * tiles_t, 1),
        (*tensors, y, largest, S, T, N, tiles_t, waveform.stride(0), stride_sb),
        _constants(taps, stride, eps, layer.activation, N),
    )
    return y, largest


def _folded(
    waveform: Tensor,
    weight: Tensor,
    norm: Norm,
    lengths: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight [N, 16] with its taps padded; gain and shift [B, N] of its products."""
    (B, S), (N, taps), device = waveform.shape, weight.shape, waveform.device
    chunks = triton.cdiv((S - taps) // stride + 1, CHUNK)
    total = torch.empty(B, chunks, MAX_WINDOW, device=device)
    squares = torch.empty(B, chunks, MAX_WINDOW, MAX_WINDOW, device=device)
    padded = torch.empty(N, MAX_WINDOW, dtype=weight.dtype, device=device)
    gain, shift = (torch.empty(B, N, device=device) for _ in range(2))
    of_moments, of_fold = _moment_constants(taps, stride, norm.eps)
    moments = (waveform, lengths, total, squares, S, chunks, waveform.stride(0))
    _launch_moments((B, chunks), moments, of_moments)
    inputs = (total, squares, lengths, weight, norm.weight, norm.bias)
    fold = (*inputs, padded, gain, shift, S, N, chunks)
    _launch_fold((B, triton.cdiv(N, FOLD_CHANNELS)), fold, of_fold)
    return padded, gain, shift


_launch, _launch_moments, _launch_fold = (
    Launcher(kernel) for kernel in (_first_layer_kernel, _moments_kernel, _fold_norm_kernel)
)


@functools.cache
def _constants(
    taps: int, stride: int, eps: float | None, epilogue: str | None, N: int
) -> Constants:
    block_t, block_n, num_warps = tiles(N, eps is not None)
    return Constants(
        {
            "TAPS": taps, "STRIDE": stride, "EPS": eps, "EPILOGUE": epilogue,
            "EVEN_N": N % block_n == 0, "BLOCK_T": block_t, "BLOCK_N": block_n,
            "num_warps": num_warps,
        }
    )  # fmt: skip


def tiles(N: int, is_layer: bool) -> tuple[int, int, int]:
    """BLOCK_T, BLOCK_N and num_warps; a LayerNorm needs all of N channels."""
    return (16, max(64, triton.next_power_of_2(N)), 8) if is_layer else (64, 128, 4)


@functools.cache
def _moment_constants(taps: int, stride: int, eps: float) -> tuple[Constants, Constants]:
    shared = {"TAPS": taps, "STRIDE": stride, "WIDTH": MAX_WINDOW}
    fold = {"EPS": eps, "CHUNK": CHUNK, "MERGED": MERGED, "BLOCK_N": FOLD_CHANNELS, "num_warps": 8}
    return Constants(shared | {"BLOCK": CHUNK, "num_warps": 1}), Constants(shared | fold)
