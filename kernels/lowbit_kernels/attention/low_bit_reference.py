"""Attention whose probabilities are low-bit, in plain PyTorch: what the kernels must compute.

Dimension key: B batch, H heads, T frames, D head dimension; scores are [B, H, query, key].
"""

import math

import torch
from torch import Tensor

from lowbit_kernels.attention.reference import attention_probs

# of a learned step, as fake quantization has it: an optimizer may take it to zero or below
MIN_STEP = 2.0**-24


def gradient_factor(q: Tensor, high: int) -> float:
    """What the gradient of the step is multiplied by: 1 / sqrt(elements * high), as in LSQ."""
    B, H, T, _ = q.shape
    return 1 / math.sqrt(max(1, B * H * T * T) * high)


def low_bit_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, bias: Tensor | None,
    window: int | None, scale: float, step: Tensor, high: int, keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend with rounded probabilities, all materialized. Differentiable by autograd.

    The gradient passes the rounding straight through where a probability is at most
    ``high * step``; that of the step is LSQ's without its factor, see ``gradient_factor``.

    Args:
        q: [B, H, T, D], any floating dtype, in which everything is computed.
        k: like q.
        v: like q.
        lengths: [B], int32 or int64, or None.
        bias: broadcastable to [B, H, T, T], or None.
        window: frames a query sees on each side, or None.
        scale: multiplies the scores.
        step: one element, the distance of two levels.
        high: the highest level; the lowest is 0.
        keep: [B, H, T, T], the dropout mask divided by the probability to keep, or None.

    Returns:
        out: [B, H, T, D]; 0 for a query with nothing to attend to.
        lse: [B, H, T], the logarithm of the softmax's denominator; 0 for such a query.
    """
    probs, lse = attention_probs(q, k, lengths, bias, window, scale)
    step = step.to(probs.dtype).clamp_min(MIN_STEP)
    level = (probs * (1 / step)).clamp(max=high)
    level = level + (level.round() - level).detach()
    weights = level * step
    return (weights if keep is None else weights * keep.to(probs.dtype)) @ v, lse


def low_bit_attention_backward_reference(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, bias: Tensor | None,
    window: int | None, scale: float, step: Tensor, high: int, keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Differentiate ``low_bit_attention_reference``.

    Args:
        grad_out: [B, H, T, D], the gradient of the result.
        q: as in the forward.
        k: as in the forward.
        v: as in the forward.
        lengths: as in the forward.
        bias: as in the forward.
        window: as in the forward.
        scale: as in the forward.
        step: as in the forward.
        high: as in the forward.
        keep: as in the forward.

    Returns:
        The gradients of q, k and v, of the scores [B, H, T, T], and of the step [], which has its
        factor.
    """
    probs, _ = attention_probs(q, k, lengths, bias, window, scale)
    step = step.to(probs.dtype).clamp_min(MIN_STEP)
    ratio = probs * (1 / step)
    level = ratio.clamp(max=high).round_()
    inside = ratio <= high
    weights, grad_weights = level * step, grad_out @ v.mT
    if keep is not None:
        keep = keep.to(probs.dtype)
        weights, grad_weights = weights * keep, grad_weights * keep
    slope = torch.where(inside, level - ratio, level)
    dstep = (grad_weights * slope).sum() * gradient_factor(q, high)
    grad_probs = torch.where(inside, grad_weights, 0.0)
    delta = (probs * grad_probs).sum(-1, keepdim=True)
    grad_scores = probs * (grad_probs - delta)
    dq = (grad_scores @ k) * scale
    dk = (grad_scores.mT @ q) * scale
    return dq, dk, weights.mT @ grad_out, grad_scores, dstep
