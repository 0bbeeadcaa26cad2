"""Distillation from a float model of the same shape (arXiv 2301.00652).

Dimension key: B utterances, S samples, T frames, C features, H heads, D head dimension.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_kernels.attention.position import Position, Scheme, resolve
from lowbit_kernels.attention.reference import attention_probs
from ssl_models.error_propagation.sources import find_blocks
from ssl_models.error_propagation.trace import watching

Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor | None]]


def encode(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Run a ``SpeechEncoder`` on a batch with ``waveforms`` and ``lengths``."""
    found: tuple[Tensor, Tensor | None] = model(batch.waveforms, batch.lengths)
    return found


class Distillation(nn.Module):
    """Mean squared errors of a model's outputs, of each layer's, and of attention maps.

    The sum over layers, as in the paper; frames beyond an utterance do not count. Attention maps
    are computed beside the model's own attention, from its queries and keys before these are
    rounded: [B, H, T, T] numbers a layer, while this objective runs, and none otherwise.

    Args:
        teacher: the float model, set to evaluation mode; no part of what is trained or saved.
        output_weight: of the error of what the models give.
        layer_weight: of the errors of layers.
        attention_weight: of the errors of maps.
        relative: divide each error by the teacher's mean square: for models whose layers' outputs
            are not of unit size.
        forward: runs a model on a batch, giving [B, T, C] and valid frames [B] or None.

    Raises:
        ValueError: for weights below 0 or all 0, or a model without layers.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        output_weight: float = 1.0,
        layer_weight: float = 1.0,
        attention_weight: float = 1.0,
        relative: bool = False,
        forward: Forward = encode,
    ) -> None:
        super().__init__()
        weights = (output_weight, layer_weight, attention_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"weights must be at least 0, one above, got {weights}")
        # in a tuple: not a child
        self._teacher = (teacher.eval().requires_grad_(False),)
        self.output_weight, self.layer_weight, self.attention_weight = weights
        self.relative, self.run = relative, forward
        self.layers = find_blocks(teacher) if layer_weight else ()
        self.attentions = _attentions(teacher) if attention_weight else ()

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch.

        Raises:
            ValueError: for a model of another shape.
        """
        teacher = self._teacher[0].to(next(model.parameters()).device)
        with torch.no_grad():
            wanted, frames = self._trace(teacher, batch)
        found, _ = self._trace(model, batch)
        T = wanted[-1][1].shape[1]
        losses = [
            weight * self._error(a, b, frames, T)
            for (weight, a), (_, b) in zip(found, wanted, strict=True)
            if weight
        ]
        return torch.stack(losses).sum()

    def _trace(self, model: nn.Module, batch: Any) -> tuple[list[tuple[float, Tensor]], Any]:
        """Weights and what they weigh: of layers, maps, and the output."""
        seen: list[tuple[float, Tensor]] = []
        with (
            watching(model, self.layers, lambda name, x: seen.append((self.layer_weight, x))),
            watching_attention(
                model, self.attentions, lambda x: seen.append((self.attention_weight, x))
            ),
        ):
            output, frames = self.run(model, batch)
        return [*seen, (self.output_weight, output)], frames

    def _error(self, found: Tensor, wanted: Tensor, frames: Tensor | None, T: int) -> Tensor:
        """Mean squared error of [B, T, C], or of maps [B, H, T, T], over valid frames.

        Of half as many frames, too, as a Squeezeformer has inside.
        """
        if found.shape != wanted.shape:
            raise ValueError(
                "model must have the teacher's shape, "
                f"got {list(found.shape)} for {list(wanted.shape)}"
            )
        squares = F.mse_loss(found.float(), wanted.float(), reduction="none")
        sizes = wanted.float().square()
        if frames is not None:
            valid = _valid(squares, frames, T)
            squares, sizes = (x * valid for x in (squares, sizes))
            count = valid.expand_as(squares).sum().clamp(min=1)
        else:
            count = torch.tensor(squares.numel())
        error = squares.sum() / count
        return error / (sizes.sum() / count).clamp(min=1e-12) if self.relative else error


def _valid(x: Tensor, frames: Tensor, T: int) -> Tensor:
    """Which frames count, broadcastable to x: [B, T', 1], or [B, 1, T', T'] for maps."""
    own = x.shape[-2]
    ratio = max(1, round(T / own))
    counts = (frames.to(x.device) + ratio - 1) // ratio
    valid = torch.arange(own, device=x.device) < counts[:, None]
    if x.dim() == 3:
        return valid[..., None]
    return valid[:, None, :, None] & valid[:, None, None, :]


def _attentions(model: nn.Module) -> tuple[str, ...]:
    """Names of modules that attend.

    Raises:
        ValueError: for a model without them.
    """
    names = tuple(name for name, module in model.named_modules() if hasattr(module, "attend"))
    if not names:
        raise ValueError(
            "attention_weight must be 0 for a model whose attention has no method attend, "
            f"got a {type(model).__name__}"
        )
    return names


@contextlib.contextmanager
def watching_attention(
    model: nn.Module, names: tuple[str, ...], see: Callable[[Tensor], None]
) -> Iterator[None]:
    """Call ``see(maps)`` for each of these modules that attends inside the ``with``."""
    modules: list[Any] = [model.get_submodule(name) for name in names]
    for module in modules:
        module.attend = partial(_attend_seen, module, module.attend, see)
    try:
        yield
    finally:
        for module in modules:
            del module.attend


def _attend_seen(
    module: Any, attend: Any, see: Callable[[Tensor], None], q: Tensor, k: Tensor, v: Tensor, /,
    *, lengths: Tensor | None, position: Position | Scheme | None = None,
) -> Tensor:  # fmt: skip
    see(attention_maps(module, q, k, lengths, position))
    out: Tensor = attend(q, k, v, lengths=lengths, position=position)
    return out


def attention_maps(
    module: Any, q: Tensor, k: Tensor, lengths: Tensor | None, position: Position | Scheme | None
) -> Tensor:
    """The probabilities [B, H, T, T] of an attention module, materialized and in float.

    Args:
        module: may have a ``window`` or a ``block``, in frames.
        q: [B, H, T, D].
        k: like q.
        lengths: [B], the valid frames; None: all.
        position: as in ``flash_attention``.
    """
    T, scale = q.shape[2], q.shape[3] ** -0.5
    window, block = getattr(module, "window", None), getattr(module, "block", None)
    scheme, bias = resolve(q, position, window), None
    if scheme is not None:
        q, scheme = scheme.with_rows(q)
        bias = scheme.scores(T, scale)
    if block is not None:
        blocks = torch.arange(T, device=q.device) // block
        apart = torch.zeros(T, T, dtype=q.dtype, device=q.device)
        apart = apart.masked_fill(blocks[:, None] != blocks, -torch.inf)[None, None]
        bias = apart if bias is None else bias + apart
    return attention_probs(q, k, lengths, bias, window, scale)[0]
