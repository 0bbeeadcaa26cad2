"""masked_group_norm on a GPU: passes over the channels of each utterance.

Dimension key: B batch, C channels, T frames, G groups.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.norm.channel_kernel import (
    channel_moments_triton,
    merge_moments_triton,
    normalize_backward_triton,
    normalize_triton,
)
from lowbit_kernels.norm.reference import group_norm_backward, per_channel


def masked_group_norm_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lengths: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels on x [B, C, T]. op.py has checked the inputs."""
    B, C, _ = x.shape
    moments = channel_moments_triton(x, lengths, per_utterance=True)
    merged, mean, rstd = merge_moments_triton(moments, eps)
    if num_groups < C:
        # the channels of a group are its parts
        columns = (merged[:, :C], merged[:, C:-1], merged[:, -1:].expand(B, C))
        parts = torch.stack(columns, -1).view(B * num_groups, C // num_groups, 3)
        _, mean, rstd = merge_moments_triton(parts, eps)
        mean, rstd = mean.view(B, num_groups), rstd.view(B, num_groups)
    channels = (per_channel(mean, C), per_channel(rstd, C))
    return normalize_triton(x, weight, bias, *channels, lengths, activation), mean, rstd


def masked_group_norm_backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels on tensors of the forward. op.py has checked the inputs."""
    return group_norm_backward(normalize_backward_triton, *args)
