"""Normalizations of speech encoders in plain PyTorch: what the kernels must compute.

Dimension key: B batch, C channels, T frames, G groups; rows M and features N for LayerNorm.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit_kernels.matmul.reference import (
    apply_epilogue,
    epilogue_backward_reference,
    int8_scale,
    quantize_rows,
)


def masked_group_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    lengths: Tensor | None,
    num_groups: int,
    eps: float,
    activation: str | None = None,
) -> Tensor:
    """Normalize each group of channels over its valid frames. Differentiable by autograd.

    Args:
        x: [B, C, T], any floating dtype. Computed in fp32 at least.
        weight: [C], the scale of each channel.
        bias: [C].
        lengths: [B], int32 or int64: the valid frames. None: all of them.
        num_groups: G, a divisor of C.
        eps: added to the variance.
        activation: applied to the result.

    Returns:
        [B, C, T]; 0 in the frames beyond the length.
    """
    mean, rstd = group_statistics(x, lengths, num_groups, eps)
    channels = (per_channel(mean, x.shape[1]), per_channel(rstd, x.shape[1]))
    return normalize(x, weight, bias, *channels, lengths, activation)


def group_statistics(
    x: Tensor, lengths: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(variance + eps)`` over the valid frames of x [B, C, T], [B, G]."""
    (B, C, T), wide = x.shape, torch.promote_types(x.dtype, torch.float32)
    valid = valid_frames(x, lengths)
    groups = (B, num_groups, C // num_groups * T)
    values, mask = x.to(wide).masked_fill(~valid, 0.0).reshape(groups), valid.expand(B, C, T)
    mask = mask.reshape(groups)
    count = mask.sum(2).clamp(min=1)
    mean = values.sum(2) / count
    # once more from there: a sum of values far from 0 is rounded coarsely
    mean = mean + (values - mean[..., None]).masked_fill(~mask, 0.0).sum(2) / count
    centered = (values - mean[..., None]).masked_fill(~mask, 0.0)
    return mean, (centered.square().sum(2) / count + eps).rsqrt()


def per_channel(statistic: Tensor, num_channels: int) -> Tensor:
    """[B, G] to [B, C]."""
    repeats = num_channels // statistic.shape[1]
    return statistic if repeats == 1 else statistic.repeat_interleave(repeats, 1)


def group_norm_backward(
    backward: Callable[..., Tensor],
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lengths: Tensor | None,
    num_groups: int,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, by two calls of ``normalize_backward`` or its like."""
    B, C, T = x.shape
    channels = (per_channel(mean, C), per_channel(rstd, C))
    arguments = (grad_y, x, weight, bias, *channels, lengths, activation)
    sums = backward(*arguments, None).sum(1)
    means = sums * weight.to(sums.dtype)
    if num_groups < C:
        means = means.view(B, 2, num_groups, C // num_groups).mean(-1)
        means = means.repeat_interleave(C // num_groups, -1)
    count = max(T, 1) if lengths is None else lengths.clamp(1, max(T, 1))[:, None, None]
    dx = backward(*arguments, means / count)
    dbias, dweight = sums.sum(0).unbind()
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def valid_frames(x: Tensor, lengths: Tensor | None) -> Tensor:
    """[B, 1, T] bool, of x [B, C, T]."""
    frames = torch.arange(x.shape[2], device=x.device).expand(x.shape[0], 1, x.shape[2])
    return frames < (x.shape[2] if lengths is None else lengths[:, None, None])


def channel_moments(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Of each channel over the valid frames of x [B, C, T]: for ``merge_moments``, [1, 1, 2 C + 1].

    They are the means, the sums of squared deviations and the count, in fp32 at least.
    """
    valid = valid_frames(x, lengths)
    frames = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~valid, 0.0)
    count = valid.sum().to(frames.dtype)
    mean = frames.sum((0, 2)) / count.clamp(min=1)
    squares = (frames - mean[:, None]).masked_fill(~valid, 0.0).square().sum((0, 2))
    return torch.cat((mean, squares, count[None]))[None, None]


def merge_moments(moments: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the moments of the parts of a set.

    The formula is that of Chan, Golub and LeVeque, "Algorithms for computing the sample variance"
    (1983).

    Args:
        moments: [S, E, 2 C + 1] of S sets of E parts: means, sums of squared deviations, count.
        eps: added to the variance.

    Returns:
        The moments of each set [S, 2 C + 1]; its means and ``1 / sqrt(variance + eps)`` [S, C].
    """
    means, squares = moments[..., :-1].chunk(2, -1)
    count = moments[..., -1:]
    total = count.sum(1)
    mean = (means * count).sum(1) / total.clamp(min=1)
    squares = (squares + count * (means - mean[:, None]).square()).sum(1)
    rstd = (squares / total.clamp(min=1) + eps).rsqrt()
    return torch.cat((mean, squares, total), -1), mean, rstd


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lengths: Tensor | None,
    activation: str | None,
) -> Tensor:
    """``activation((x - mean) * rstd * weight + bias)`` of x [B, C, T], 0 beyond the lengths.

    mean and rstd are [B, C], or [1, C].
    """
    wide, scale, shift = mean.dtype, weight[:, None], bias[:, None]
    normalized = (x.to(wide) - mean[..., None]) * rstd[..., None]
    y = apply_epilogue(normalized * scale.to(wide) + shift.to(wide), activation)
    return y.to(x.dtype).masked_fill(~valid_frames(x, lengths), 0.0)


def normalize_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lengths: Tensor | None,
    activation: str | None,
    means: Tensor | None,
) -> Tensor:
    """One of the two passes of the gradient of ``normalize``.

    Args:
        grad_y: [B, C, T].
        x: as in the forward, and so all up to ``activation``.
        means: [S, 2, C], means over the valid frames of the gradient of the normalized value, and
            of that times the normalized value. None in the first pass.

    Returns:
        dx, in the dtype of x. In the first pass [B, 1, 2, C], the sums of the gradient before the
        activation, and of that times the normalized value.
    """
    wide, padding = mean.dtype, ~valid_frames(x, lengths)
    grad = grad_y.to(wide).masked_fill(padding, 0.0)
    normalized = (x.to(wide).masked_fill(padding, 0.0) - mean[..., None]) * rstd[..., None]
    scale, shift = weight.to(wide)[:, None], bias.to(wide)[:, None]
    grad = epilogue_backward_reference(grad, normalized * scale + shift, activation)
    if means is None:
        return torch.stack((grad.sum(2), (grad * normalized).sum(2)), 1)[:, None]
    mean_grad, mean_projection = means[..., None].unbind(1)
    dx = rstd[..., None] * (grad * scale - mean_grad - normalized * mean_projection)
    return dx.masked_fill(padding, 0.0).to(x.dtype)


def zero_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [B, T, N] with zeros from frame ``lengths[b]`` on; x itself without lengths."""
    if lengths is None:
        return x
    padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(padding[..., None], 0.0)


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
