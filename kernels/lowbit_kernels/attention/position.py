"""Position schemes: what is added to the attention scores before the softmax.

Dimension key: B batch, H heads, T frames, D head dimension, R largest offset of a table. An offset
is a key's frame less its query's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseBias:
    """A bias that is added to the scaled scores.

    Attributes:
        bias: broadcastable to [B, H, T, T], any floating dtype. Differentiable. A key whose
            bias is -inf is not attended to.
    """

    bias: Tensor


@dataclass(frozen=True)
class BucketedBias:
    """A bias of the offset's bucket, as in T5 (arXiv 1910.10683), times a gate, as in WavLM.

    Half of the buckets are for keys to the right; half of those are an offset each, the others grow
    with its logarithm. No [T, T] tensor is made.

    Attributes:
        table: [buckets, H], an embedding's weight, any floating dtype; an even number of buckets,
            at least 4. Differentiable.
        max_distance: the offset from which on all share the last bucket; above buckets / 4.
        gate: [B, H, T], multiplies what a query's scores get; None: 1. Differentiable.
    """

    table: Tensor
    max_distance: int
    gate: Tensor | None = None


@dataclass(frozen=True)
class RelativeKey:
    """Keys of clipped offsets that the query scores too (arXiv 1803.02155), as in Wav2Vec2-BERT.

    Attributes:
        table: [positions, D], shared by the heads, in the dtype of q. Differentiable.
        left: the position of offset 0; offsets are clipped to [-left, positions - 1 - left].
    """

    table: Tensor
    left: int


@dataclass(frozen=True)
class TransformerXL:
    """Relative positions of Transformer-XL (arXiv 1901.02860, section 3.3), as in Conformers.

    The scores are (q + content_bias) k + (q + position_bias) keys[offset], scaled. The second term
    is computed in the kernel's tiles: no [T, 2 T] tensor is made.

    Attributes:
        keys: [H or 1, 2 R + 1, D], the projected positions, in the dtype of q, that of offset -R (a
            key R frames to the left) first; R at least T - 1, or the window. Differentiable.
        content_bias: [H, D], u. Differentiable.
        position_bias: [H, D], v. Differentiable.
    """

    keys: Tensor
    content_bias: Tensor
    position_bias: Tensor


Position = DenseBias | BucketedBias | RelativeKey | TransformerXL


@dataclass(frozen=True)
class Scheme:
    """A position scheme as the op and its kernels take it.

    Attributes:
        kind: ``"dense"``, ``"offset"`` or ``"relative"``.
        table: the bias, broadcastable [B, H, T, T]; the bias of each offset [H, 2 R + 1], of -R
            first; or the keys of the offsets [H or 1, 2 R + 1, D].
        rows: None; the gates [B, H, T] that multiply the bias, or None; or the queries
            [B, H, T, D] that score the keys. None there: q itself, see ``biases``.
        biases: None, or what is added to q [B, H, T, D] where it scores the keys of frames, and of
            offsets: [H, D] each.
        left: the table's place of offset 0, where its ends serve all offsets beyond them; None:
            its middle.
    """

    kind: str
    table: Tensor
    rows: Tensor | None = None
    biases: tuple[Tensor, Tensor] | None = None
    left: int | None = None

    def expanded(self, largest: int) -> "Scheme":
        """With a table of all offsets from -R to R, R being ``largest``."""
        if self.left is None:
            return self
        offsets = torch.arange(-largest, largest + 1, device=self.table.device)
        places = offsets.clamp(-self.left, self.table.shape[1] - 1 - self.left) + self.left
        return Scheme(self.kind, self.table[0][places][None], self.rows, self.biases)

    def at(self, frames: slice) -> "Scheme":
        """Of some frames alone."""
        rows = None if self.rows is None else self.rows[:, :, frames]
        return Scheme(self.kind, self.table, rows, self.biases, self.left)

    def with_rows(self, q: Tensor) -> tuple[Tensor, "Scheme"]:
        """The queries that score the keys of frames, and a scheme that has those of offsets."""
        if self.kind != "relative" or self.rows is not None:
            return q, self
        if self.biases is None:
            return q, Scheme(self.kind, self.table, q)
        content, position = (bias.to(q.dtype)[:, None] for bias in self.biases)
        return q + content, Scheme(self.kind, self.table, q + position)

    def to(self, dtype: torch.dtype) -> "Scheme":
        """In another dtype."""
        rows = None if self.rows is None else self.rows.to(dtype)
        return Scheme(self.kind, self.table.to(dtype), rows)

    def scores(self, T: int, scale: float) -> Tensor:
        """What is added to the scaled scores: broadcastable to [B, H, T, T]."""
        if self.kind == "dense" or T == 0:
            return self.table if T else self.table.new_zeros(1, 1, 0, 0)
        table = _resize(self.table, T)
        if self.kind == "offset":
            # of the last query first: a key or a query on is an offset on
            H, offsets = table.shape
            bias = table.as_strided((H, T, T), (offsets, 1, 1), table.storage_offset()).flip(1)
            return bias[None] if self.rows is None else bias * self.rows[..., None]
        assert self.rows is not None, "keys of offsets are scored by queries"
        return _by_key((self.rows @ table.mT * scale).contiguous())

    def gradients(self, grad_scores: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
        """Gradients of table and rows from that of the scores [B, H, T, T]."""
        if self.kind == "dense":
            return grad_scores.sum_to_size(self.table.shape), None
        H, T = grad_scores.shape[1:3]
        wide, drows = self.to(grad_scores.dtype), None
        if T == 0:
            drows = None if wide.rows is None else torch.zeros_like(wide.rows)
            return torch.zeros_like(wide.table), drows
        if self.kind == "offset" and wide.rows is not None:
            bias = Scheme("offset", wide.table).scores(T, scale)
            drows = (grad_scores * bias).sum(-1)
            grad_scores = grad_scores * wide.rows[..., None]
        if self.kind == "offset":
            grad_scores = grad_scores.sum(0, keepdim=True)
        per_offset = grad_scores.new_zeros(*grad_scores.shape[:3], 2 * T - 1)
        _by_key(per_offset).copy_(grad_scores)
        if self.kind == "offset":
            dtable = per_offset.sum((0, 2))
        else:
            assert wide.rows is not None, "keys of offsets are scored by queries"
            per_offset *= scale
            dtable = (per_offset.mT @ wide.rows).sum(0)
            dtable = dtable.sum(0, keepdim=True) if self.table.shape[0] < H else dtable
            drows = per_offset @ _resize(wide.table, T)
        return _resize(dtable, self.table.shape[1] // 2 + 1), drows


def _resize(table: Tensor, T: int) -> Tensor:
    """A table [H, 2 R + 1, ...] of the offsets of T frames, with zeros where it has none."""
    missing = T - 1 - table.shape[1] // 2
    sides = (0, 0) * (table.dim() - 2) + (missing, missing)
    return torch.nn.functional.pad(table, sides).contiguous()


def _by_key(per_offset: Tensor) -> Tensor:
    """The view [B, H, T, T] of numbers [B, H, T, 2 T - 1], by key instead of by offset."""
    B, H, T, offsets = per_offset.shape
    strides = (H * T * offsets, T * offsets, offsets - 1, 1)
    return per_offset.as_strided((B, H, T, T), strides, per_offset.storage_offset() + T - 1)


def resolve(
    q: Tensor, position: Position | Scheme | None, window: int | None, *, compact: bool = False
) -> Scheme | None:
    """The scheme for queries [B, H, T, D]; shapes have been checked.

    ``compact``: tables of clipped offsets stay as they are, see ``Scheme.left``; for the forward.
    """
    if position is None or isinstance(position, Scheme):
        return position
    if isinstance(position, DenseBias):
        bias = position.bias
        return Scheme("dense", bias[(None,) * (4 - bias.dim())])
    if isinstance(position, TransformerXL):
        biases = position.content_bias, position.position_bias
        return Scheme("relative", position.keys.to(q.dtype), biases=biases)
    largest = max(0, q.shape[2] - 1 if window is None else min(window, q.shape[2] - 1))
    if isinstance(position, RelativeKey):
        scheme = Scheme("relative", position.table.to(q.dtype)[None], left=position.left)
        return scheme if compact else scheme.expanded(largest)
    return Scheme("offset", resolve_bias(position, largest), position.gate)


def resolve_bias(position: BucketedBias, largest: int) -> Tensor:
    """The biases [H, 2 R + 1] of the offsets from -R to R, R being ``largest``."""
    table = position.table
    offsets = torch.arange(-largest, largest + 1, device=table.device)
    return table[buckets_of(offsets, table.shape[0], position.max_distance)].t()


def buckets_of(offsets: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each offset; see ``BucketedBias``."""
    half = buckets // 2
    single, distance = half // 2, offsets.abs()
    # fp32, as the models were trained: the boundaries depend on the rounding
    growth = torch.log(distance.float() / single) / math.log(max_distance / single)
    far = (single + growth * (half - single)).long().clamp(max=half - 1)
    return (offsets > 0) * half + torch.where(distance < single, distance, far)
