"""Bidirectional self-attention in plain PyTorch: what the kernels must compute.

Dimension key: B batch, H heads, T frames, D head dimension; scores are [B, H, query, key].
"""

import torch
from torch import Tensor


def attention_mask(
    num_frames: int, lengths: Tensor | None, window: int | None, device: torch.device
) -> Tensor:
    """Say which key each query attends to.

    Args:
        num_frames: T.
        lengths: [B], int32 or int64: the valid frames. None: all of them.
        window: the frames a query sees on each side of itself. None: all of them.
        device: of the mask.

    Returns:
        [B, 1, T, T] or [1, 1, T, T], bool; the rows of padded queries are False throughout.
    """
    frames = torch.arange(num_frames, device=device)
    if window is None:
        allowed = torch.ones(1, 1, num_frames, num_frames, dtype=torch.bool, device=device)
    else:
        allowed = ((frames[:, None] - frames[None, :]).abs() <= window)[None, None]
    if lengths is not None:
        valid = frames < lengths[:, None]  # [B, T]
        allowed = allowed & valid[:, None, :, None] & valid[:, None, None, :]
    return allowed


def attention_probs(
    q: Tensor,
    k: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The softmax of the scores, [B, H, T, T], and its denominator's logarithm, [B, H, T]."""
    allowed = attention_mask(q.shape[2], lengths, window, q.device)
    scores = (q @ k.transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
        allowed = allowed & (bias > -torch.inf)
    # the lowest finite score, not -inf: a softmax over nothing but -inf is NaN, its gradient too
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1).masked_fill(~allowed, 0.0)
    return probs, scores.logsumexp(-1).masked_fill(~allowed.any(-1), 0.0)


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    window: int | None,
    scale: float,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with every probability materialized. Differentiable by autograd.

    Args:
        q: [B, H, T, D], any floating dtype, in which everything is computed.
        k: like q.
        v: like q.
        lengths: [B], int32 or int64, or None.
        bias: broadcastable to [B, H, T, T], or None.
        window: frames a query sees on each side, or None.
        scale: multiplies the scores.
        keep: [B, H, T, T], the dropout mask divided by the probability to keep, or None.

    Returns:
        out: [B, H, T, D]; 0 for a query with nothing to attend to.
        lse: [B, H, T], the logarithm of the softmax's denominator; 0 for such a query.
    """
    probs, lse = attention_probs(q, k, lengths, bias, window, scale)
    return (probs if keep is None else probs * keep.to(probs.dtype)) @ v, lse


def flash_attention_backward_reference(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    window: int | None,
    scale: float,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate ``flash_attention_reference``.

    Args:
        grad_out: [B, H, T, D], the gradient of out.
        q: as in the forward.
        k: as in the forward.
        v: as in the forward.
        out: [B, H, T, D], as the forward returned it.
        lengths: as in the forward.
        bias: as in the forward.
        window: as in the forward.
        scale: as in the forward.
        keep: as in the forward.

    Returns:
        The gradients of q, k and v, [B, H, T, D], and of the scores, [B, H, T, T].
    """
    probs, _ = attention_probs(q, k, lengths, bias, window, scale)
    grad_probs = grad_out @ v.transpose(-1, -2)
    dropped = probs
    if keep is not None:
        keep = keep.to(probs.dtype)
        dropped, grad_probs = probs * keep, grad_probs * keep
    # sum_j probs_ij grad_probs_ij, without another pass over the keys
    delta = (grad_out * out).sum(-1, keepdim=True)
    grad_scores = probs * (grad_probs - delta)
    dq = (grad_scores @ k) * scale
    dk = (grad_scores.transpose(-1, -2) @ q) * scale
    dv = dropped.transpose(-1, -2) @ grad_out
    return dq, dk, dv, grad_scores
