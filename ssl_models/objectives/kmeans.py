"""Targets of masked prediction: clusters of MFCCs, then of an encoder's own features.

Computed with every batch, so that crops need no alignment and nothing is stored beside the audio.

Dimension key: B utterances, S samples, T frames, F features, K clusters.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_models.error_propagation.trace import watching
from ssl_models.fbank import HOP, MEL_BINS, WINDOW, log_mel_energies

COEFFICIENTS = 13
# one a window of 10 ms
MFCC_RATE = 100
Features = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def mfcc(waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """13 cepstral coefficients and their first and second differences, 100 a second.

    Args:
        waveforms: [B, S] at 16 kHz.
        lengths: [B], the valid samples; None: all.

    Returns:
        [B, windows, 39], and valid windows [B].
    """
    energies = log_mel_energies(waveforms)
    n = torch.arange(MEL_BINS, dtype=energies.dtype, device=energies.device)
    k = n[:COEFFICIENTS, None]
    cosines = torch.cos(math.pi / MEL_BINS * (n + 0.5) * k) * math.sqrt(2 / MEL_BINS)
    cepstra = energies @ cosines.T
    first = _difference(cepstra)
    if lengths is None:
        lengths = torch.full((len(waveforms),), waveforms.shape[1], device=waveforms.device)
    windows = ((lengths - WINDOW).div(HOP, rounding_mode="floor") + 1).clamp(min=0)
    return torch.cat((cepstra, first, _difference(first)), -1), windows


def _difference(x: Tensor) -> Tensor:
    """Half of what comes next less what came before, [B, windows, F]."""
    padded = torch.cat((x[:, :1], x, x[:, -1:]), 1)
    return (padded[:, 2:] - padded[:, :-2]) / 2


def layer_features(encoder: nn.Module, layer: str) -> Features:
    """What a layer of a frozen encoder gives, as features to cluster.

    Args:
        encoder: as ``SpeechEncoder``; set to evaluation mode.
        layer: its dotted name, such as ``"encoder.layers.5"``.
    """
    encoder.eval().requires_grad_(False)
    encoder.get_submodule(layer)

    def features(waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        encoder.to(waveforms.device)
        with torch.no_grad(), watching(encoder, [layer], lambda name, x: seen.append(x)):
            _, frames = encoder(waveforms, lengths)
        if frames is None:
            frames = torch.full((len(waveforms),), seen[0].shape[1], device=waveforms.device)
        return seen[0].float(), frames

    return features


class KMeansTargets(nn.Module):
    """The nearest of K centers for each frame.

    Args:
        features: gives [B, T, F] and valid frames [B] of waveforms and their lengths.
        centers: [K, F].
    """

    centers: Tensor

    def __init__(self, features: Features, centers: Tensor) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("centers", centers)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, lengths: Tensor | None, T: int) -> Tensor:
        """Targets [B, T] int64 at the rate of an encoder that gives T frames of these waveforms.

        Features at another rate count at the times of the encoder's frames.
        """
        x, _ = self.features(waveforms.float(), lengths)
        distances = self.centers.square().sum(1) - 2 * (x.to(self.centers.dtype) @ self.centers.T)
        ratio = max(1, round(x.shape[1] / max(T, 1)))
        at = (torch.arange(T, device=x.device) * ratio).clamp(max=x.shape[1] - 1)
        return distances.argmin(-1)[:, at]


def fit_kmeans(
    features: Features, batches: Iterable[Any], clusters: int, *, seed: int = 0
) -> KMeansTargets:
    """Cluster the valid frames of batches, by scikit-learn's MiniBatchKMeans.

    Args:
        features: ``mfcc``, or what ``layer_features`` gives.
        batches: with ``waveforms`` and ``lengths``.
        clusters: K.
        seed: of the first centers.

    Raises:
        ValueError: for fewer frames than clusters.
    """
    from sklearn.cluster import MiniBatchKMeans

    rows = []
    for batch in batches:
        x, frames = features(batch.waveforms, batch.lengths)
        rows += [row[:count].cpu().numpy() for row, count in zip(x, frames.tolist(), strict=True)]
    data = np.concatenate(rows) if rows else np.empty((0, 1))
    if len(data) < clusters:
        raise ValueError(f"clusters must be at most the {len(data)} frames, got {clusters}")
    found = MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=4096).fit(data)
    return KMeansTargets(features, torch.from_numpy(found.cluster_centers_).float())
