"""HuBERT's masked prediction (arXiv 2106.07447): which cluster a hidden frame belongs to.

Dimension key: B utterances, S samples, T frames, C features, K clusters, P projected features.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Targets = Callable[[Tensor, Tensor | None, int], Tensor]


class MaskedPrediction(nn.Module):
    """Spans of frames are replaced before the encoder, which predicts their clusters.

    Logits are cosines of projected frames and of label embeddings over a temperature. The defaults
    are those of HuBERT's base model, but in fairseq the losses are summed over frames: the penalty
    counts here against a mean.

    Args:
        hidden_size: C.
        clusters: K.
        targets: gives [B, T] int64 of waveforms, lengths and T; learns nothing.
        projected_size: P.
        mask_probability: expected share of masked frames if spans did not overlap.
        mask_frames: of a span.
        temperature: of the cosines.
        unmasked_weight: of the loss over frames that are not masked.
        penalty_weight: of the mean square of a convolutional front end's features.
        feature_gradient: factor of the gradient into the front end.
    """

    def __init__(
        self,
        hidden_size: int,
        clusters: int,
        targets: Targets,
        *,
        projected_size: int = 256,
        mask_probability: float = 0.8,
        mask_frames: int = 10,
        temperature: float = 0.1,
        unmasked_weight: float = 0.0,
        penalty_weight: float = 10.0,
        feature_gradient: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 < mask_probability <= 1 or mask_frames < 1:
            raise ValueError(
                "mask_probability must be in (0, 1] and mask_frames at least 1, "
                f"got {mask_probability} and {mask_frames}"
            )
        self.targets = targets
        self.mask_probability, self.mask_frames = mask_probability, mask_frames
        self.temperature, self.unmasked_weight = temperature, unmasked_weight
        self.penalty_weight, self.feature_gradient = penalty_weight, feature_gradient
        self.mask_embedding = nn.Parameter(torch.empty(hidden_size).uniform_())
        self.projection = nn.Linear(hidden_size, projected_size)
        self.labels = nn.Parameter(torch.empty(clusters, projected_size).uniform_())
        # of the last batch: right among masked frames, and how many these are
        self.correct = torch.zeros(2, dtype=torch.int64)

    def forward(self, model: Any, batch: Any) -> Tensor:
        """The loss of a batch.

        Args:
            model: a ``SpeechEncoder``.
            batch: has ``waveforms`` [B, S] and ``lengths`` [B] or None.
        """
        features: list[Tensor] = []
        masks: list[Tensor] = []
        lengths = batch.lengths

        def soften(module: nn.Module, args: Any, output: Any) -> Any:
            x, frames = output
            features.append(x)
            return x * self.feature_gradient + x.detach() * (1 - self.feature_gradient), frames

        def hide(module: nn.Module, args: Any, x: Tensor) -> Tensor:
            masks.append(self._mask(x.shape[0], x.shape[1], model, lengths).to(x.device))
            return torch.where(masks[0][..., None], self.mask_embedding.to(x.dtype), x)

        with contextlib.ExitStack() as hooks:
            hooks.enter_context(model.feature_extractor.register_forward_hook(soften))
            hooks.enter_context(model.feature_projection.register_forward_hook(hide))
            x, frames = model(batch.waveforms, lengths)
        targets = self.targets(batch.waveforms, lengths, x.shape[1])
        valid = _valid(x, frames)
        losses, right = self._losses(x, targets)
        masked, seen = masks[0] & valid, ~masks[0] & valid
        self.correct = torch.stack(((right & masked).sum(), masked.sum())).detach()
        loss = _mean(losses, masked)
        if self.unmasked_weight:
            loss = loss + self.unmasked_weight * _mean(losses, seen)
        # of mel energies there is nothing to learn
        if self.penalty_weight and features[0].requires_grad:
            penalty = _mean(features[0].float().square().mean(-1), valid)
            loss = loss + self.penalty_weight * penalty
        return loss

    @property
    def accuracy(self) -> float:
        """Of the last batch, among masked frames."""
        right, count = self.correct.tolist()
        return float(right / max(count, 1))

    def _losses(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The cross entropy of each frame [B, T], and whether its cluster is found."""
        projected = F.normalize(self.projection(x).float(), dim=-1)
        logits = projected @ F.normalize(self.labels.float(), dim=-1).T / self.temperature
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape), logits.argmax(-1) == targets

    def _mask(self, B: int, T: int, model: Any, lengths: Tensor | None) -> Tensor:
        frames = model.feature_extractor.frames(lengths)
        counts = [T] * B if frames is None else frames.tolist()
        return span_mask(counts, T, self.mask_probability, self.mask_frames)


def span_mask(counts: list[int], T: int, probability: float, span: int) -> Tensor:
    """Spans of frames to hide, drawn from torch's random state: [B, T] bool.

    Each utterance has probability * frames / span of them, rounded up or down at random, at least
    one; they start at different frames and may overlap. An utterance shorter than a span is hidden
    by half.

    Args:
        counts: valid frames of B utterances.
        T: of the longest.
        probability: see ``MaskedPrediction``.
        span: frames of a span.
    """
    mask = torch.zeros(len(counts), T, dtype=torch.bool)
    for row, count in zip(mask, counts, strict=True):
        width = min(span, max(1, count // 2))
        places = max(count - width + 1, 0)
        wanted = max(1, int(probability * count / width + torch.rand(()).item()))
        for start in torch.randperm(places)[:wanted].tolist():
            row[start : start + width] = True
    return mask


def _valid(x: Tensor, frames: Tensor | None) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device)
    if frames is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return places < frames[:, None]


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Over chosen frames; 0 where there are none."""
    return torch.where(chosen, values, 0).sum() / chosen.sum().clamp(min=1)
