"""Digits spoken by espeak-ng: more voices to train on than the recordings have."""

import io
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ssl_models.digits.data import SAMPLE_RATE, WORDS, Audio, Clip, level

ACCENTS = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
)
# the shipped clips are spoken by other variants (f5, m7), so that training never heard them
VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m8", "f1", "f2", "f3", "f4"),
    *("klatt", "klatt2", "klatt3", "klatt4", "adam", "Alex", "Andy", "Annie", "benjamin"),
    *("boris", "caleb", "david", "edward", "iven", "john", "linda", "michel", "norbert"),
    *("paul", "pedro", "quincy", "rob", "steph", "travis", "victor"),
)


def synthesize(
    text: str, *, voice: str, words_per_minute: int = 160, pitch: int = 50, gap: int = 0
) -> Audio:
    """Speak a text.

    Args:
        text: English words.
        voice: a voice of espeak-ng, with an optional variant: ``en-us+f5``.
        words_per_minute: 80 to 450.
        pitch: 0 to 99.
        gap: additional silence between words, in units of 10 ms.

    Returns:
        [T] float32 at 16 kHz, without the silence around it.

    Raises:
        RuntimeError: espeak-ng is not installed.
        ValueError: espeak-ng rejects the arguments.
    """
    import soundfile
    import soxr

    if shutil.which("espeak-ng") is None:
        raise RuntimeError(
            "espeak-ng is not installed: run 'apt-get install espeak-ng' (or your system's "
            "equivalent), or train without synthetic voices by --no-synthetic"
        )
    options = ["-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "-g", str(gap)]
    process = subprocess.run(
        ["espeak-ng", *options, "--stdout", text], capture_output=True, check=False
    )
    if process.returncode != 0 or not process.stdout:
        raise ValueError(
            f"voice must be one that espeak-ng has, got {voice!r}: "
            f"{process.stderr.decode(errors='replace').strip()}"
        )
    audio, rate = soundfile.read(io.BytesIO(process.stdout), dtype="float32")
    return _trim(soxr.resample(audio, rate, SAMPLE_RATE))


def _trim(audio: Audio) -> Audio:
    loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
    return audio[loud[0] : loud[-1] + 1]


def synthetic_clips(cache: Path, voices: int = 120, seed: int = 0) -> list[Clip]:
    """Ten digits of each of ``voices`` random voices, rendered once and kept in ``cache``.

    Args:
        cache: an ``.npz`` file; written where it does not exist.
        voices: how many combinations of accent, variant, speed and pitch.
        seed: of the choice of voices.

    Raises:
        RuntimeError: the cache is missing and so is espeak-ng.
    """
    if not cache.exists():
        _render(cache, voices, seed)
    clips = []
    with np.load(cache) as arrays:
        for name in arrays.files:
            speaker, digit = name.rsplit("_", 1)
            audio = arrays[name].astype(np.float32) / 32768
            clips.append(Clip(int(digit), speaker, 0, level(audio)))
    return clips


def _render(cache: Path, voices: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    jobs = []
    for number in range(voices):
        voice = f"{ACCENTS[rng.integers(len(ACCENTS))]}+{VARIANTS[rng.integers(len(VARIANTS))]}"
        speed, pitch = int(rng.integers(120, 240)), int(rng.integers(15, 86))
        name = f"synthetic{number:03d}"
        jobs += [(f"{name}_{d}", word, voice, speed, pitch) for d, word in enumerate(WORDS)]

    def render(job: tuple[str, str, str, int, int]) -> tuple[str, Audio]:
        name, word, voice, speed, pitch = job
        return name, synthesize(word, voice=voice, words_per_minute=speed, pitch=pitch)

    with ThreadPoolExecutor(max_workers=2) as pool:
        rendered = dict(pool.map(render, jobs))
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(".partial.npz")
    levels = {name: np.round(audio * 32767).astype(np.int16) for name, audio in rendered.items()}
    np.savez(partial, allow_pickle=False, **levels)
    os.replace(partial, cache)
