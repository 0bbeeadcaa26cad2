"""Attention of packed utterances on a CPU: one after the other.

Dimension key: B utterances, H heads, D head dimension; total the frames of all of them.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.cpu import empty_gates, empty_heads


def utterances(q: Tensor, starts: Tensor, longest: int) -> Iterator[tuple[int, slice]]:
    """Number and frames of each utterance of q [1, H, total, D].

    Raises:
        ValueError: where they are not all of its frames, or one has more than ``longest``.
    """
    bounds, total = starts.tolist(), q.shape[2]
    counts = [end - begin for begin, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != total or min(counts, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to the {total} frames of q, got {bounds}")
    if max(counts, default=0) > longest:
        raise ValueError(f"max_seqlen must be at least the longest {max(counts)}, got {longest}")
    return ((i, slice(*bounds_of)) for i, bounds_of in enumerate(pairwise(bounds)))


def empty_lse(q: Tensor, lengths: Tensor | None, longest: int | None) -> Tensor:
    """Uninitialized [B, H, T]; of packed utterances each is padded to the longest."""
    B, H, T = q.shape[:3]
    if lengths is not None and longest is not None:
        B, T = lengths.shape[0] - 1, longest
    return q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))


def empty_rows_gradient(q: Tensor, scheme: Scheme | None, is_packed: bool) -> Tensor:
    """Uninitialized, for the gradient of a scheme's rows; [0] where it has none."""
    if scheme is None or scheme.rows is None:
        return q.new_empty(0)
    if scheme.kind == "relative":
        return empty_heads(q)
    return empty_gates(q, scheme.rows.dtype, is_packed)


def attend_packed(
    attend: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, starts: Tensor,
    scheme: Scheme | None, seed: Tensor | None, *options: Any, longest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What ``attend`` makes of each utterance: [1, H, total, D], and lse."""
    out, lse = empty_heads(q), empty_lse(q, starts, longest).zero_()
    for i, at in utterances(q, starts, longest):
        heads = (x[:, :, at] for x in (q, k, v))
        of_scheme = None if scheme is None else scheme.at(at)
        result = attend(*heads, None, of_scheme, None if seed is None else seed + i, *options)
        out[:, :, at], lse[i : i + 1, :, : at.stop - at.start] = result
    return out, lse


def differentiate_packed(
    differentiate: Callable[..., tuple[Tensor, ...]], grad_out: Tensor, q: Tensor, k: Tensor,
    v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, scheme: Scheme | None,
    seed: Tensor | None, *options: Any, longest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and the scheme's table and rows, by those of each utterance."""
    dq, dk, dv = empty_heads(q), empty_heads(q), empty_heads(q)
    drows, dtable = empty_rows_gradient(q, scheme, True), q.new_empty(0)
    if scheme is not None and options[-1]:
        dtable = scheme.table.new_zeros(scheme.table.shape, dtype=lse.dtype)
    for i, at in utterances(q, starts, longest):
        heads = (x[:, :, at] for x in (grad_out, q, k, v, out))
        of_scheme = None if scheme is None else scheme.at(at)
        dq[:, :, at], dk[:, :, at], dv[:, :, at], of_table, of_rows = differentiate(
            *heads, lse[i : i + 1, :, : at.stop - at.start], None, of_scheme,
            None if seed is None else seed + i, *options,
        )  # fmt: skip
        if dtable.numel():
            dtable += of_table
        if drows.numel():
            drows[:, :, at] = of_rows
    return dq, dk, dv, dtable if scheme is None else dtable.to(scheme.table.dtype), drows
