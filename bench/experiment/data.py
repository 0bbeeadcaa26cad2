"""Strings of digits to learn from and to be judged by, and read speech.

Dimension key: B strings of a batch, S samples at 16 kHz, N digits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ssl_models.digits.augment import change_speed
from ssl_models.digits.data import SAMPLE_RATE, Audio, Clip, join, level, random_gains

BATCH, SECONDS = 16, 2.2
# of a test string; each as often as the others, so that 100 strings take 500 clips
LENGTHS = (3, 4, 5, 6, 7)
READ_SECONDS = 4.0
_MIN_GAP = 0.02
_MAX_DIGITS = 7
# single digits come first, in less silence: that is where CTC finds its alignment, and attention
# alone is slow at it
_SINGLE_STEPS, _SINGLE_SECONDS, _STEPS_A_DIGIT = 300, 1.1, 50


@dataclass(frozen=True, slots=True)
class DigitBatch:
    """Strings: waveforms [B, S], labels [B, N] padded by -1, and how many are valid, [B]."""

    waveforms: Tensor
    labels: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> "DigitBatch":
        """The same on a device."""
        return DigitBatch(*(x.to(device) for x in (self.waveforms, self.labels, self.counts)))


class DigitBatches(Dataset[DigitBatch]):
    """Batch ``step`` of a replicate, a function of the seed and the step alone.

    Args:
        clips: those of the speakers to learn from.
        seed: of the replicate.
        curriculum: whether strings are short at first.
    """

    def __init__(self, clips: Sequence[Clip], seed: int, curriculum: bool = True) -> None:
        speakers = sorted({clip.speaker for clip in clips})
        self.clips = [[clip for clip in clips if clip.speaker == name] for name in speakers]
        self.seed, self.curriculum = seed, curriculum

    def __getitem__(self, step: int) -> DigitBatch:
        rng = np.random.default_rng([self.seed, step])
        most, seconds = _MAX_DIGITS, SECONDS
        if self.curriculum:
            most = min(_MAX_DIGITS, max(1, 2 + (step - _SINGLE_STEPS) // _STEPS_A_DIGIT))
            seconds = _SINGLE_SECONDS if most == 1 else SECONDS
        strings = [self._string(rng, most, seconds) for _ in range(BATCH)]
        labels = [torch.tensor(digits) for _, digits in strings]
        return DigitBatch(
            torch.from_numpy(np.stack([level(audio) for audio, _ in strings])),
            pad_sequence(labels, batch_first=True, padding_value=-1),
            torch.tensor([len(row) for row in labels]),
        )

    def _string(
        self, rng: np.random.Generator, most: int, seconds: float
    ) -> tuple[Audio, list[int]]:
        """As many digits of one speaker as fit into the seconds, in one voice."""
        own = self.clips[rng.integers(len(self.clips))]
        # a vocal tract 0.8 to 1.25 times as short, and slight unsteadiness
        voice = np.exp(rng.uniform(np.log(0.8), np.log(1.25)))
        wanted, free = (
            int(rng.integers(1, most + 1)),
            int((seconds - _MIN_GAP) * SAMPLE_RATE),
        )
        digits: list[int] = []
        audios: list[Audio] = []
        gap = int(_MIN_GAP * SAMPLE_RATE)
        while len(digits) < wanted:
            clip = own[rng.integers(len(own))]
            audio = change_speed(clip.audio, voice * np.exp(rng.normal(0, 0.03)))
            if len(audio) + gap > free:
                if digits:
                    break
                continue
            digits.append(clip.digit)
            audios.append(audio)
            free -= len(audio) + gap
        shares = np.floor(rng.dirichlet(np.ones(len(digits) + 1)) * free).astype(int)
        gaps = [gap + int(share) for share in shares]
        gaps[-1] += free - int(shares.sum())
        gains = random_gains(len(digits), 6.0, rng)
        return join([a * g for a, g in zip(audios, gains, strict=True)], gaps), digits


@dataclass(frozen=True, slots=True)
class Utterance:
    """Audio [S] to be judged by, and its digits; None for speech that has no such."""

    audio: Tensor
    digits: tuple[int, ...] | None


def test_strings(clips: Sequence[Clip]) -> list[Utterance]:
    """Every clip of a held-out speaker in exactly one string of 3 to 7 digits.

    The same for every model. Silence between digits lasts 0.05 to 0.4 s, at the ends 0.1 to 0.3 s;
    the gain of a digit is within 3 dB.

    Raises:
        ValueError: for clips of several speakers, or a number that does not divide into strings.
    """
    speakers = {clip.speaker for clip in clips}
    if len(speakers) != 1 or len(clips) % sum(LENGTHS):
        raise ValueError(
            f"clips must be of one speaker, a multiple of {sum(LENGTHS)}, "
            f"got {len(clips)} of {sorted(speakers)}"
        )
    rng = np.random.default_rng([0, *next(iter(speakers)).encode()])
    ordered = sorted(clips, key=lambda clip: (clip.digit, clip.index))
    mixed = [ordered[i] for i in rng.permutation(len(ordered))]
    sizes = rng.permutation(LENGTHS * (len(clips) // sum(LENGTHS)))
    strings = []
    for chunk in np.split(np.arange(len(mixed)), np.cumsum(sizes)[:-1]):
        chosen = [mixed[i] for i in chunk]
        gains = random_gains(len(chosen), 3.0, rng)
        seconds = rng.uniform(0.05, 0.4, len(chosen) + 1)
        seconds[[0, -1]] = rng.uniform(0.1, 0.3, 2)
        gaps = [int(each * SAMPLE_RATE) for each in seconds]
        audio = join([clip.audio * gain for clip, gain in zip(chosen, gains, strict=True)], gaps)
        digits = tuple(clip.digit for clip in chosen)
        strings.append(Utterance(torch.from_numpy(level(audio)), digits))
    return strings


test_strings.__test__ = False  # type: ignore[attr-defined]


def read_speech(folder: Path, count: int = 50) -> list[Utterance]:
    """The first seconds of utterances of read speech, chosen by a fixed seed.

    Args:
        folder: holds FLAC files, in folders or not.
        count: how many.

    Raises:
        ValueError: for fewer files.
    """
    import soundfile
    import soxr

    files = sorted(folder.rglob("*.flac"))
    if len(files) < count:
        raise ValueError(f"folder must hold at least {count} .flac files, got {len(files)}")
    found = []
    for i in sorted(np.random.default_rng(0).permutation(len(files))[:count]):
        audio, rate = soundfile.read(files[i], dtype="float32")
        audio = soxr.resample(audio, rate, SAMPLE_RATE)[: int(READ_SECONDS * SAMPLE_RATE)]
        found.append(Utterance(torch.from_numpy(audio), None))
    return found
