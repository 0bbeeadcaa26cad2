"""What flash_attention refuses.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

import math

import torch
from torch import Tensor

from lowbit_kernels.attention.position import DenseBias
from lowbit_kernels.checks import check_dtype, check_lengths

MAX_HEAD_DIM = 256


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse q, k and v that are not self-attention heads of a served dtype and size.

    Raises:
        ValueError: naming the argument, the rule and what was received.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be [B, H, T, D], got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(
                f"{name} must have q's shape {tuple(q.shape)} (self-attention; cross-attention "
                f"is served by F.scaled_dot_product_attention), got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must have q's dtype and device, {q.dtype} on {q.device}, "
                f"got {x.dtype} on {x.device}"
            )
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"q's head dimension must be 1 to {MAX_HEAD_DIM}, got {q.shape[-1]}")
    check_dtype("q", q)


def check_options(
    q: Tensor, lengths: Tensor | None, window: int | None, scale: float | None, dropout_p: float
) -> None:
    """Refuse lengths that do not fit q, and numbers out of range.

    Raises:
        ValueError: naming the argument, the rule and what was received.
    """
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
            got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise ValueError(
                f"lengths must be an int32 or int64 tensor (one length an utterance; other masks "
                f"are served by F.scaled_dot_product_attention), got {got}"
            )
        check_lengths(lengths, q)
    if window is not None and (type(window) is bool or not isinstance(window, int) or window < 0):
        raise ValueError(f"window must be an int >= 0 (frames each side) or None, got {window}")
    # math.isfinite cannot be traced with a scale that torch.compile made symbolic
    if scale is not None and not abs(scale) < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def dense_bias(q: Tensor, position: DenseBias | None) -> Tensor | None:
    """The bias of ``position`` as [B or 1, H or 1, T or 1, T or 1].

    Raises:
        ValueError: on another position, or a bias that does not fit q.
    """
    if position is None:
        return None
    if not isinstance(position, DenseBias):
        raise ValueError(f"position must be None or DenseBias, got {type(position).__name__}")
    bias, scores = position.bias, (*q.shape[:3], q.shape[2])
    if not bias.is_floating_point() or bias.device != q.device:
        raise ValueError(
            f"position.bias must be floating point on {q.device} (a boolean mask is served by "
            f"F.scaled_dot_product_attention), got {bias.dtype} on {bias.device}"
        )
    fits = bias.dim() <= 4 and all(
        size in (1, full)
        for size, full in zip(reversed(bias.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise ValueError(
            f"position.bias must broadcast to [B, H, T, T] = {list(scores)}, got {list(bias.shape)}"
        )
    return bias[(None,) * (4 - bias.dim())]
