"""What flash_attention refuses.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

import math

import torch
from torch import Tensor

from lowbit_kernels.attention.position import (
    BucketedBias,
    DenseBias,
    Position,
    RelativeKey,
    Scheme,
    TransformerXL,
)
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
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, got {scale}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def check_position(q: Tensor, position: Position | Scheme | None, window: int | None) -> None:
    """Refuse a position scheme whose tensors do not fit q.

    Raises:
        ValueError: naming the argument, the rule and what was received.
    """
    (B, H, T, D), name = q.shape, type(position).__name__
    if position is None or isinstance(position, Scheme):
        return
    if isinstance(position, DenseBias):
        _check_dense(q, position.bias)
    elif isinstance(position, BucketedBias):
        _check_tensor(q, "table", position.table, "[buckets, H]", (None, H))
        buckets = position.table.shape[0]
        if buckets % 2 or buckets < 4:
            raise ValueError(f"position.table must have an even number >= 4 rows, got {buckets}")
        if not position.max_distance > buckets // 4:
            raise ValueError(
                f"position.max_distance must be above a quarter of {buckets} buckets, "
                f"got {position.max_distance}"
            )
        if position.gate is not None:
            _check_tensor(q, "gate", position.gate, "[B, H, T]", (B, H, T))
    elif isinstance(position, RelativeKey):
        _check_tensor(q, "table", position.table, "[positions, D]", (None, D), like_q=True)
        if not 0 <= position.left < position.table.shape[0]:
            raise ValueError(
                f"position.left must be 0 to {position.table.shape[0] - 1}, got {position.left}"
            )
    elif isinstance(position, TransformerXL):
        heads = 1 if position.keys.shape[:1] == (1,) else H
        _check_tensor(q, "keys", position.keys, "[H or 1, 2 R + 1, D]", (heads, None, D), True)
        for bias in ("content_bias", "position_bias"):
            _check_tensor(q, bias, getattr(position, bias), "[H, D]", (H, D))
        count, needed = position.keys.shape[1], T - 1 if window is None else min(window, T - 1)
        if count % 2 == 0 or count // 2 < needed:
            raise ValueError(
                f"position.keys must have 2 R + 1 offsets with R >= {needed} "
                f"(T - 1, or the window), got {count}"
            )
    else:
        raise ValueError(
            "position must be None, DenseBias, BucketedBias, RelativeKey or TransformerXL, "
            f"got {name}"
        )


def _check_tensor(
    q: Tensor, name: str, x: Tensor, said: str, shape: tuple[int | None, ...], like_q: bool = False
) -> None:
    fits = x.dim() == len(shape) and all(
        size in (None, actual) for size, actual in zip(shape, x.shape, strict=False)
    )
    if not fits:
        wanted = ["any" if size is None else size for size in shape]
        raise ValueError(f"position.{name} must be {said} = {wanted}, got {list(x.shape)}")
    dtype = q.dtype if like_q and not torch.is_autocast_enabled(q.device.type) else None
    if x.device != q.device or not x.is_floating_point() or dtype not in (None, x.dtype):
        kind = "floating point" if dtype is None else f"{dtype} as q"
        raise ValueError(
            f"position.{name} must be {kind} on {q.device}, got {x.dtype} on {x.device}"
        )


def _check_dense(q: Tensor, bias: Tensor) -> None:
    scores = (*q.shape[:3], q.shape[2])
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
