"""Normalizations of speech encoders in plain PyTorch: what the kernels must compute.

Dimension key: B batch, C channels, T frames, G groups; rows M and features N for LayerNorm.
"""

import torch
from torch import Tensor

from lowbit_kernels.matmul.reference import apply_epilogue, int8_scale, quantize_rows


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


def quantize_rows_reference(y: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize rows to int8, to the integers that ``low_bit_linear`` gives its input.

    Args:
        y: [..., N], floating point.
        static_scale: [] fp32, of all rows. None: each row's own, by its largest magnitude.

    Returns:
        q: [..., N], int8 in [-127, 127].
        scale: [..., 1], fp32, y is nearly q * scale.
    """
    if static_scale is None:
        scale = int8_scale(y.abs().amax(-1, keepdim=True))
    else:
        scale = static_scale.expand(*y.shape[:-1], 1).contiguous()
    return quantize_rows(y.reshape(-1, y.shape[-1]), scale.flatten()).view(y.shape), scale


def activation_quantize_reference(
    x: Tensor, activation: str, static_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply an activation in fp32 and quantize the rows.

    Args:
        x: [..., N], any floating dtype; [..., 2 N] with ``"glu"``.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"relu"`` or ``"glu"``.
        static_scale: as in ``quantize_rows_reference``.

    Returns:
        q: [..., N], int8.
        scale: [..., 1], fp32.
        activated: [..., N], what q stands for, before its rounding; fp32 at least.
    """
    activated = apply_epilogue(x.to(torch.promote_types(x.dtype, torch.float32)), activation)
    return *quantize_rows_reference(activated, static_scale), activated


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
