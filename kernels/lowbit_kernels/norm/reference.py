"""Normalizations of speech encoders in plain PyTorch: what the kernels must compute.

Dimension key: B batch, C channels, T frames, G groups; rows M and features N for LayerNorm.
"""

import torch
from torch import Tensor

INT8_MAX = 127


def masked_group_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor | None, num_groups: int, eps: float
) -> Tensor:
    """Normalize each group of channels over its valid frames. Differentiable by autograd.

    Args:
        x: [B, C, T], any floating dtype, in which everything is computed.
        weight: [C], the scale of each channel.
        bias: [C].
        lengths: [B], int32 or int64: the valid frames. None: all of them.
        num_groups: G, a divisor of C.
        eps: added to the variance.

    Returns:
        [B, C, T]; 0 in the frames beyond the length.
    """
    B, C, T = x.shape
    if lengths is None:
        lengths = torch.full((B,), T, device=x.device)
    valid = (torch.arange(T, device=x.device) < lengths[:, None])[:, None]  # [B, 1, T]
    group_mask = valid[:, None].expand(B, num_groups, C // num_groups, T)
    groups = x.reshape(B, num_groups, C // num_groups, T).masked_fill(~group_mask, 0.0)
    count = group_mask.sum((2, 3), keepdim=True).clamp(min=1)
    mean = groups.sum((2, 3), keepdim=True) / count
    centered = (groups - mean).masked_fill(~group_mask, 0.0)
    variance = centered.square().sum((2, 3), keepdim=True) / count
    normalized = (centered * (variance + eps).rsqrt()).reshape(B, C, T)
    return (normalized * weight[:, None] + bias[:, None]).masked_fill(~valid, 0.0)


def quantize_rows_reference(y: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 by its largest magnitude.

    Args:
        y: [..., N], floating point.

    Returns:
        q: [..., N], int8 in [-127, 127].
        scale: [..., 1], fp32, y is nearly q * scale; 1 for a row of zeros.
    """
    scale = y.abs().amax(-1, keepdim=True).float() / INT8_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    q = (y / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return q, scale


def norm_quantize_reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add a residual, apply LayerNorm to the rows, and quantize them.

    Args:
        x: [..., N], any floating dtype.
        weight: [N].
        bias: [N].
        residual: like x, or None.
        eps: added to the variance.

    Returns:
        q: [..., N], int8.
        scale: [..., 1], fp32.
        h: [..., N], x + residual, in the dtype of x.
        normalized: [..., N], what q stands for, before its rounding; fp32 at least.
    """
    h = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    normalized = torch.nn.functional.layer_norm(
        h.to(wide), (h.shape[-1],), weight.to(wide), bias.to(wide), eps
    )
    return *quantize_rows_reference(normalized), h, normalized
