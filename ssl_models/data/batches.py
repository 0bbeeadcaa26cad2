"""Batches of utterances of similar length, each a function of a seed and its number.

Dimension key: B utterances, S samples at 16 kHz.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ssl_models.data.manifest import SAMPLE_RATE, Utterance

# utterances of one batch differ by no more than this factor in length
_SPREAD = 1.15


@dataclass(frozen=True)
class AudioBatch:
    """Utterances of similar length.

    Attributes:
        waveforms: [B, S] float32, 0 beyond the lengths.
        lengths: [B] int64, the valid samples.
        texts: B transcripts.
        skipped: files that could not be read.
        problems: a line for each.
    """

    waveforms: Tensor
    lengths: Tensor
    texts: tuple[str, ...] = ()
    skipped: int = 0
    problems: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "AudioBatch":
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("waveforms", "lengths")}
        return replace(self, **moved)


class AudioBatches(Dataset[AudioBatch]):
    """Batch ``n`` of a run without end: epochs follow one another, each shuffled anew.

    Utterances are in buckets of similar length; each epoch shuffles those of a bucket, and the
    batches. Files that cannot be read leave the batch, which counts them; a batch of none but such
    is the next one.

    Args:
        utterances: at least one.
        seed: of the shuffles and crops.
        seconds: of audio in a batch, padding included: the longest sets how many fit, at least one.
        max_seconds: what is longer is cropped at random, or left out with ``crop=False``.
        min_seconds: what is shorter is left out.
        crop: not for transcripts, which would not fit.
        normalize: give each utterance zero mean and unit variance, as wav2vec 2.0 takes it.
        read: gives the samples of a path, [S] float32 at 16 kHz.

    Attributes:
        left_out: utterances that are too short or too long.

    Raises:
        ValueError: where no utterance is left.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        *,
        seed: int = 0,
        seconds: float = 87.5,
        max_seconds: float = 15.625,
        min_seconds: float = 0.1,
        crop: bool = True,
        normalize: bool = True,
        read: Callable[[Path], NDArray[np.float32]] | None = None,
    ) -> None:
        self.max_samples = int(max_seconds * SAMPLE_RATE)
        self.min_samples = int(min_seconds * SAMPLE_RATE)
        self.utterances = [
            each
            for each in utterances
            if each.samples >= self.min_samples and (crop or each.samples <= self.max_samples)
        ]
        self.left_out = len(utterances) - len(self.utterances)
        if not self.utterances:
            raise ValueError(
                f"utterances must have one of {min_seconds:g} to {max_seconds:g} s, "
                f"got {len(utterances)} of other lengths"
            )
        self.seed, self.normalize = seed, normalize
        self.read = read_audio if read is None else read
        self.buckets = self._make_buckets(int(seconds * SAMPLE_RATE))
        self.batches_per_epoch = sum(-(-len(bucket) // size) for bucket, size in self.buckets)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __getstate__(self) -> dict[str, Any]:
        """For workers: the cache stays behind."""
        return {name: value for name, value in vars(self).items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With an empty cache."""
        vars(self).update(state)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_buckets(self, budget: int) -> list[tuple[NDArray[np.int64], int]]:
        """Indices of utterances of similar length, and how many fit into a batch."""
        lengths = np.array([min(each.samples, self.max_samples) for each in self.utterances])
        order = np.argsort(-lengths, kind="stable")
        buckets, start = [], 0
        while start < len(order):
            longest = lengths[order[start]]
            end = start + int((lengths[order[start:]] * _SPREAD >= longest).sum())
            buckets.append((order[start:end], max(1, budget // int(longest))))
            start = end
        return buckets

    def _make_epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        for bucket, size in self.buckets:
            mixed = rng.permutation(bucket)
            batches += [mixed[i : i + size] for i in range(0, len(mixed), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def __getitem__(self, number: int) -> AudioBatch:
        problems: list[str] = []
        # an epoch later every file has been tried
        for tried in range(number, number + self.batches_per_epoch):
            epoch, place = divmod(tried, self.batches_per_epoch)
            rng = np.random.default_rng([self.seed, epoch, place])
            rows, texts = [], []
            for index in self._epoch(epoch)[place]:
                utterance = self.utterances[index]
                try:
                    rows.append(self._load(utterance, rng))
                    texts.append(utterance.text or "")
                except (OSError, RuntimeError, ValueError) as error:
                    problems.append(f"{utterance.path}: {str(error).splitlines()[0]}")
            if rows:
                waveforms = pad_sequence(rows, batch_first=True)
                lengths = torch.tensor([len(row) for row in rows])
                return AudioBatch(waveforms, lengths, tuple(texts), len(problems), tuple(problems))
        raise ValueError(f"utterances must be readable, got none: {problems[0]}")

    def _load(self, utterance: Utterance, rng: np.random.Generator) -> Tensor:
        audio = self.read(utterance.path)
        if len(audio) < self.min_samples or not np.isfinite(audio).all():
            raise ValueError(f"audio must be finite and not shorter than it says, got {len(audio)}")
        if len(audio) > self.max_samples:
            start = int(rng.integers(len(audio) - self.max_samples + 1))
            audio = audio[start : start + self.max_samples]
        if self.normalize:
            audio = (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)
        return torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))


def read_audio(path: Path) -> NDArray[np.float32]:
    """The samples of a file at 16 kHz, channels averaged: [S].

    Raises:
        OSError: for a file that is missing.
        RuntimeError: for one that is not audio.
    """
    import soundfile
    import soxr

    if not path.is_file():
        raise FileNotFoundError("no such file")
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    resampled: NDArray[np.float32] = soxr.resample(audio.mean(1), rate, SAMPLE_RATE)
    return resampled
