"""Queries and keys in int8 with a scale a block of frames, in plain PyTorch.

Dimension key: B batch, H heads, T frames, D head dimension, N blocks of ``BLOCK_FRAMES`` frames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.matmul.reference import INT8_MAX

BLOCK_FRAMES = 64
# of the keys, for their mean
NUM_MEAN_FRAMES = 256
# of a block of zeros
MIN_SCALE = 2.0**-126


def quantize_heads_reference(
    q: Tensor, k: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round queries, and keys less their mean, to int8.

    The mean of an utterance's keys adds the same to all scores of a query, which a softmax ignores,
    and takes most of the range of int8 where features have an offset (arXiv 2410.02367, section
    4.2). Any vector may be taken off: the mean is that of 256 evenly spaced frames, or of all.

    Args:
        q: [B, H, T, D].
        k: like q.
        lengths: [B], the valid frames; padding counts as zeros. None: all of them.

    Returns:
        q and k as int8, and the scales [B, H, 2, N] of both, fp32.
    """
    B, H, T, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    counts = torch.full((B,), T, device=q.device) if lengths is None else lengths.clamp(0, T)
    valid = (torch.arange(T, device=q.device) < counts[:, None])[:, None, :, None]
    q, k = (torch.where(valid, x, 0.0) for x in (q, k))
    number = counts.clamp(1, NUM_MEAN_FRAMES)[:, None]
    chosen = torch.arange(min(T, NUM_MEAN_FRAMES), device=q.device)
    frames = (chosen * counts[:, None] // number).clamp_max(T - 1)[:, None, :, None]
    sample = k.gather(2, frames.expand(B, H, len(chosen), D))
    sample = torch.where((chosen < number)[:, None, :, None], sample, 0.0)
    mean = sample.sum(2, keepdim=True) / number[:, None, None]
    k = torch.where(valid, k - mean, 0.0)
    rounded, scales = zip(*(_round(x) for x in (q, k)), strict=True)
    return *rounded, torch.stack(scales, 2)


def dequantize_heads(q: Tensor, k: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers [B, H, T, D] that int8 queries and keys stand for, in the dtype of the scales."""
    T = q.shape[2]
    per_frame = scales.repeat_interleave(BLOCK_FRAMES, -1)[..., :T, None]
    return q * per_frame[:, :, 0], k * per_frame[:, :, 1]


def _round(x: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, D = x.shape
    blocks = F.pad(x, (0, 0, 0, -T % BLOCK_FRAMES)).view(B, H, -1, BLOCK_FRAMES, D)
    scale = (blocks.abs().amax((-1, -2)) / INT8_MAX).clamp_min(MIN_SCALE)
    levels = (blocks * (1 / scale)[..., None, None]).round_()
    return levels.flatten(2, 3)[:, :, :T].to(torch.int8), scale
