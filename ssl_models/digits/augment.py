"""Augmentation of digit strings: speed, equalization, band limits, rooms and noise.

Dimension key: B strings of a batch, T samples at 16 kHz, F frequencies of a spectrum.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ssl_models.digits.data import SAMPLE_RATE, Audio

Spectrum: TypeAlias = NDArray[np.complexfloating[Any, Any]]

_ROOM_SECONDS = 0.25
_BANDS_HZ = np.array([50, 150, 300, 600, 1200, 2400, 4800, 8000], dtype=np.float32)


def change_speed(audio: Audio, factor: float) -> Audio:
    """Resample audio [T] to [T / factor]: tempo, pitch and formants all rise with ``factor``."""
    import soxr

    resampled: Audio = soxr.resample(audio, SAMPLE_RATE * factor, SAMPLE_RATE, quality="LQ")
    return resampled


def augment(audio: Audio, rng: np.random.Generator) -> Audio:
    """Color each string of a batch, put some into a room, add noise to most.

    All three act on the spectrum, so that one transform and its inverse serve the batch.

    Args:
        audio: [B, T] float32.
        rng: where every random choice is drawn from.

    Returns:
        [B, T] float32.
    """
    B, T = audio.shape
    size = _fast_size(T + int(_ROOM_SECONDS * SAMPLE_RATE))  # the room must not wrap around
    spectrum = np.fft.rfft(audio, size) * _coloring(B, size, 3.0, rng) * _band_limit(B, size, rng)
    for row in np.flatnonzero(rng.random(B) < 0.3):
        spectrum[row] *= np.fft.rfft(_room(rng), size)
    return np.fft.irfft(spectrum + _noise(spectrum, size, rng), size)[:, :T].astype(np.float32)


def normalize(audio: Audio) -> Audio:
    """Zero mean and unit variance for each row of audio [B, T], as the feature extractor does."""
    centered = audio - audio.mean(axis=1, keepdims=True)
    scaled: Audio = centered / np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-7)
    return scaled


def _fast_size(length: int) -> int:
    """The least 2^a or 3 * 2^a that is no less than ``length``."""
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if power * 3 // 4 >= length else power


def _frequencies(size: int) -> Audio:
    return np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)


def _coloring(B: int, size: int, decibels: float, rng: np.random.Generator) -> Audio:
    """Smooth random gains [B, F], with a standard deviation of ``decibels`` in each band."""
    bands = rng.normal(0, decibels, (B, len(_BANDS_HZ)))
    positions = np.log(np.maximum(_frequencies(size), 1))
    curves = [np.interp(positions, np.log(_BANDS_HZ), row) for row in bands]
    gains: Audio = (10 ** (np.stack(curves) / 20)).astype(np.float32)
    return gains


def _band_limit(B: int, size: int, rng: np.random.Generator) -> Audio:
    """Gains [B, F] of a low-pass at 3.4 to 8 kHz: recordings at 8 kHz end at 4 kHz."""
    cutoff = rng.uniform(3400, 8000, (B, 1))
    gains: Audio = np.clip((cutoff + 200 - _frequencies(size)) / 200, 0, 1).astype(np.float32)
    return gains


def _room(rng: np.random.Generator) -> Audio:
    """An impulse response: the direct sound and an exponential tail, -30 to -5 dB in all."""
    times = np.arange(int(_ROOM_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(times)) * np.exp(-times / rng.uniform(0.01, 0.06))
    response: Audio = (tail * np.sqrt(10 ** rng.uniform(-3, -0.5) / np.sum(tail**2))).astype(
        np.float32
    )
    response[0] = 1.0
    return response


def _noise(spectrum: Spectrum, size: int, rng: np.random.Generator) -> Spectrum:
    """Colored noise [B, F], 5 to 45 dB below each string, in four of five strings."""
    B = len(spectrum)
    parts = rng.standard_normal((2, *spectrum.shape), dtype=np.float32)
    noise = (parts[0] + 1j * parts[1]) * _coloring(B, size, 6.0, rng)
    noise *= np.clip(100 / (_frequencies(size) + 1), 0.03, 1) ** rng.uniform(0, 1, (B, 1))
    decibels = rng.uniform(5, 45, B)
    power = (np.abs(spectrum) ** 2).sum(axis=1) / (np.abs(noise) ** 2).sum(axis=1)
    scale = np.sqrt(power * 10 ** (-decibels / 10)) * (rng.random(B) < 0.8)
    scaled: Spectrum = (noise * scale[:, None]).astype(np.complex64)
    return scaled
