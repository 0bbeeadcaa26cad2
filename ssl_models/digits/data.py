"""Spoken digit clips and the strings of digits joined from them.

Dimension key: B strings of a batch, T samples at 16 kHz, L letters of a transcript.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Audio: TypeAlias = NDArray[np.float32]

SAMPLE_RATE = 16_000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAINING_SPEAKERS = ("george", "jackson", "lucas", "nicolas")
HELD_OUT_SPEAKER = "theo"
OFFICIAL_TEST_INDICES = range(5)  # the data set's own test part
MAX_DIGITS = 4

_CLIP_NAME = re.compile(r"(\d)_([a-z]+)_(\d+)\.(flac|wav)")


@dataclass(frozen=True, slots=True)
class Clip:
    """One spoken digit: audio is [T] at 16 kHz, its louder parts at an RMS of 1."""

    digit: int
    speaker: str
    index: int
    audio: Audio


@dataclass(frozen=True, slots=True)
class DigitString:
    """Digits of one speaker in one recording: audio is [T] at 16 kHz."""

    text: str
    speaker: str
    audio: Audio


def load_fsdd(folder: Path) -> list[Clip]:
    """Read the Free Spoken Digit Dataset, resampled to 16 kHz.

    Args:
        folder: holds ``{digit}_{speaker}_{index}.flac`` or ``.wav`` files.

    Raises:
        ValueError: ``folder`` holds no such file.
    """
    import soundfile
    import soxr

    clips = []
    for path in sorted(folder.glob("*")):
        name = _CLIP_NAME.fullmatch(path.name)
        if name is None:
            continue
        audio, rate = soundfile.read(path, dtype="float32")
        audio = level(soxr.resample(audio, rate, SAMPLE_RATE))
        clips.append(Clip(int(name[1]), name[2], int(name[3]), audio))
    if not clips:
        raise ValueError(f"folder must hold files like 7_theo_12.flac or .wav, got {folder}")
    return clips


def level(audio: Audio) -> Audio:
    """Scale audio [T] so that its louder frames have an RMS of 1: speakers differ by 30 dB."""
    frames = audio[: len(audio) // 160 * 160].reshape(-1, 160)
    power = np.quantile((frames**2).mean(axis=1), 0.8) if len(frames) else (audio**2).mean()
    leveled: Audio = (audio / np.sqrt(power + 1e-12)).astype(np.float32)
    return leveled


def training_clips(clips: Sequence[Clip]) -> list[Clip]:
    """The clips a model may learn from: those of the training speakers but the official test."""
    return [
        clip
        for clip in clips
        if clip.speaker in TRAINING_SPEAKERS and clip.index not in OFFICIAL_TEST_INDICES
    ]


def test_clips(clips: Sequence[Clip]) -> list[Clip]:
    """The clips that are reported: official ones of training speakers, all of the held-out one."""
    return [
        clip
        for clip in clips
        if clip.speaker == HELD_OUT_SPEAKER
        or (clip.speaker in TRAINING_SPEAKERS and clip.index in OFFICIAL_TEST_INDICES)
    ]


test_clips.__test__ = False  # type: ignore[attr-defined]


def join(audios: Sequence[Audio], gaps: Sequence[int]) -> Audio:
    """Put clips one after the other in silence.

    Args:
        audios: n arrays [T_i].
        gaps: n + 1 lengths in samples: before the first, between neighbors, after the last.

    Returns:
        [sum of all lengths].
    """
    parts = [np.zeros(gaps[0], dtype=np.float32)]
    for audio, gap in zip(audios, gaps[1:], strict=True):
        parts += [audio, np.zeros(gap, dtype=np.float32)]
    return np.concatenate(parts)


def transcript(digits: Sequence[int]) -> str:
    """``[3, 0]`` becomes ``"three zero"``."""
    return " ".join(WORDS[digit] for digit in digits)


def random_gains(count: int, decibels: float, rng: np.random.Generator) -> list[np.float32]:
    """Linear gains [count], uniform in decibels within plus and minus ``decibels``."""
    return list((10 ** (rng.uniform(-decibels, decibels, count) / 20)).astype(np.float32))


def fixed_strings(clips: Sequence[Clip], seed: int = 0) -> list[DigitString]:
    """Join every clip into exactly one string of 1 to 4 digits of one speaker.

    The result depends on the clips and the seed alone. Silence between digits lasts 0.05 to
    0.4 s, at the ends 0.1 to 0.3 s; the gain of a digit is within 3 dB.
    """
    strings = []
    for speaker in sorted({clip.speaker for clip in clips}):
        rng = np.random.default_rng([seed, *speaker.encode()])
        own = sorted((c for c in clips if c.speaker == speaker), key=lambda c: (c.digit, c.index))
        for chunk in _chunks([own[i] for i in rng.permutation(len(own))], rng):
            gains = random_gains(len(chunk), 3.0, rng)
            seconds = rng.uniform(0.05, 0.4, len(chunk) + 1)
            seconds[[0, -1]] = rng.uniform(0.1, 0.3, 2)
            gaps = [int(s * SAMPLE_RATE) for s in seconds]
            audio = join([clip.audio * gain for clip, gain in zip(chunk, gains, strict=True)], gaps)
            strings.append(DigitString(transcript([c.digit for c in chunk]), speaker, audio))
    return strings


def _chunks(clips: list[Clip], rng: np.random.Generator) -> Iterator[list[Clip]]:
    start = 0
    while start < len(clips):
        size = int(rng.integers(1, MAX_DIGITS + 1))
        yield clips[start : start + size]
        start += size
