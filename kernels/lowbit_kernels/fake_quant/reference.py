"""What fake quantization means, in plain PyTorch.

Dimension key: M rows, K columns, S scale groups a row. Tensors of a quantizer are matrices here:
scale [1, 1], [M, 1] or [M, S], group_scale [M, S], center [1, 1] or [M, 1].
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lowbit_kernels.fake_quant.quantizer import Levels, Quantizer

# of a learned scale: the smallest fp16 number. A step of the optimizer may take it to zero or
# below, where it would flip signs
MIN_LEARNED_SCALE = 2.0**-24

# of a scale computed from the data: the smallest normal fp32 number, as int8 inputs have it
MIN_SCALE = 2.0**-126


def as_matrices(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Quantizer]:
    """x [..., K] as [M, K], contiguous, and its quantizer's tensors as matrices."""
    scale, group_scale, center = quantizer.scale, quantizer.group_scale, quantizer.center
    M, K = math.prod(x.shape[:-1]), x.shape[-1]

    def matrix(values: Tensor | None, *, per_group: bool) -> Tensor | None:
        if values is None:
            return None
        if values.numel() == 1:
            return values.reshape(1, 1)
        return values.reshape(M, values.shape[-1] if per_group else 1)

    per_group = quantizer.group_size > 0
    return x.reshape(M, K).contiguous(), replace(
        quantizer,
        scale=matrix(scale, per_group=per_group and group_scale is None),
        group_scale=None if group_scale is None else group_scale.reshape(M, group_scale.shape[-1]),
        center=matrix(center, per_group=False),
    )


def row_scale(x: Tensor, levels: Levels) -> Tensor:
    """Each row's largest magnitude / high, fp32 [M, 1]; see ``matmul.reference.int8_scale``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return x.new_full((x.shape[0], 1), MIN_SCALE, dtype=wide)
    largest: Tensor = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).to(wide)
    # a tensor divides correctly rounded, a number on CUDA through its reciprocal
    return (largest / torch.full_like(largest, levels.high)).clamp_min(MIN_SCALE)


def min_scale(quantizer: Quantizer) -> float:
    """What a quantizer's scale is raised to."""
    return MIN_SCALE if quantizer.method == "ste" else MIN_LEARNED_SCALE


def round_to_levels(v: Tensor, levels: Levels) -> Tensor:
    """The nearest level of v, floating point like v; NaN stays."""
    low, high = levels.low, levels.high
    if levels.step == 1:
        return v.clamp(low, high).round_()
    return v.clamp(low, high).sub_(low).mul_(0.5).round_().mul_(2).add_(low)


def quantize_reference(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levels [M, K] of x [M, K]; v [M, K], what was rounded; scale; and the integer multiplier.

    The last two broadcast to [M, K]. Everything is fp32, fp64 where x is.
    """
    K, size, wide = x.shape[1], quantizer.group_size, torch.promote_types(x.dtype, torch.float32)
    if quantizer.scale is None:
        scale = row_scale(x, quantizer.levels)
    else:
        scale = quantizer.scale.to(wide).clamp_min(min_scale(quantizer))
    group_scale = quantizer.group_scale
    multiplier = x.new_ones((1, 1), dtype=wide) if group_scale is None else group_scale.to(wide)
    v = x.to(wide)
    if quantizer.center is not None:
        v = v - quantizer.center.to(wide)
    v = v * _per_column(1 / (multiplier * scale), size, K)
    level = round_to_levels(v, quantizer.levels)
    return level, v, _per_column(scale, size, K), _per_column(multiplier, size, K)


def _per_column(values: Tensor, group_size: int, K: int) -> Tensor:
    """[M, S] to [M, K]; one value a row stays one."""
    if values.shape[1] == 1:
        return values
    return values.repeat_interleave(group_size, dim=1)[:, :K]


def fake_quantize_reference(
    x: Tensor, quantizer: Quantizer, dtype: torch.dtype | None = None
) -> Tensor:
    """x [M, K] quantized and dequantized, in ``dtype`` or its own."""
    level, _, scale, multiplier = quantize_reference(x, quantizer)
    return level.mul_(multiplier).mul_(scale).to(dtype or x.dtype)


def fake_quantize_backward_reference(
    grad: Tensor, x: Tensor, quantizer: Quantizer
) -> tuple[Tensor, Tensor]:
    """Gradients of x [M, K], in its dtype, and of the scale, like it; ``"lsq"`` or ``"elastic"``.

    Args:
        grad: [M, K], of the result; floating point.
        x: [M, K].
        quantizer: see ``Quantizer`` for the formulas.
    """
    levels, given = quantizer.levels, quantizer.scale
    assert given is not None, "op.py asks for it"
    level, v, _, multiplier = quantize_reference(x, quantizer)
    inside = (v >= levels.low) & (v <= levels.high)
    wide = grad.to(v.dtype)
    dx = torch.where(inside, wide, 0.0).to(x.dtype)
    if not has_sign_gradient(quantizer):
        level = torch.where(inside, level - v, level)
    terms = wide * level * multiplier
    if given.numel() == 1:
        dscale = terms.sum()
    elif given.shape[1] == 1:
        dscale = terms.sum(1)
    else:  # one scale a group: columns past the end add nothing
        (M, S), size = given.shape, quantizer.group_size
        padded = torch.nn.functional.pad(terms, (0, S * size - x.shape[1]))
        dscale = padded.view(M, S, size).sum(-1)
    return dx, (dscale * gradient_factor(x, quantizer)).to(given.dtype).view(given.shape)


def has_sign_gradient(quantizer: Quantizer) -> bool:
    """Whether a scale's slope is the level itself: BiT's levels {-1, 1}."""
    return quantizer.method == "elastic" and quantizer.levels.is_binary


def gradient_factor(x: Tensor, quantizer: Quantizer) -> float:
    """1 / sqrt(n * high), n the elements that share a scale (Esser et al., 2020, section 2.2)."""
    assert quantizer.scale is not None, "op.py asks for it"
    shared = x.numel() / max(1, quantizer.scale.numel())
    return 1 / math.sqrt(max(1.0, shared) * quantizer.levels.high)
