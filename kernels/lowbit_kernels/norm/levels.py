"""Where results lie in memory.

Dimension key: any leading dimensions, together M rows; N features. B batch, C channels, T frames.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# bytes: a matmul kernel copies rows that begin at multiples of 16
ALIGNMENT = 32


def level_pitch(num_features: int) -> int:
    """Bytes from an int8 row to the next."""
    return (num_features + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def empty_levels(shape: Sequence[int], device: torch.device) -> Tensor:
    """An uninitialized int8 [..., N] whose rows are ``level_pitch(N)`` bytes apart."""
    *batch, N = shape
    pitch = level_pitch(N)
    q = torch.empty(*batch, pitch, dtype=torch.int8, device=device)
    return q if pitch == N else q[..., :N]


def aligned_levels(q: Tensor) -> Tensor:
    """q, contiguous, or a copy whose rows are ``level_pitch(N)`` bytes apart."""
    N = q.shape[-1]
    return q if level_pitch(N) == N else empty_levels(q.shape, q.device).copy_(q)


def is_channel_last(x: Tensor) -> bool:
    """Whether the channels of x [B, C, T] are nearer to each other than its frames."""
    return x.stride(1) < x.stride(2)


def empty_channels(x: Tensor) -> Tensor:
    """An uninitialized tensor like x [B, C, T], dense, channel-last where x is."""
    B, C, T = x.shape
    if is_channel_last(x):
        return torch.empty(B, T, C, dtype=x.dtype, device=x.device).mT
    return torch.empty(B, C, T, dtype=x.dtype, device=x.device)
