"""Audio files as mono blocks at the model's rate, read in bounded memory.

Dimension key: S samples of a block, C channels.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowbit_kernels.cli.errors import CommandError, require

Samples: TypeAlias = NDArray[np.float32]

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
_BLOCK_SECONDS = 10
# what libsndfile says of a wav file whose header promises more than the file holds
_SHORT_WAV = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
# headers of files written to a pipe hold one of these instead of a size
_UNKNOWN_SIZES = (0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF)


class AudioError(Exception):
    """An audio file that cannot be used; the message is the reason, without the file's name."""


def find_audio(arguments: Iterable[Path]) -> list[Path]:
    """The audio files that arguments name: a folder stands for all audio files below it.

    Raises:
        CommandError: for a folder without audio files, or no file at all.
    """
    found: list[Path] = []
    for argument in arguments:
        if not argument.is_dir():
            found.append(argument)
            continue
        inside = sorted(
            p for p in argument.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir()
        )
        if not inside:
            raise CommandError(f"{argument}: no audio file in it ({', '.join(SUFFIXES)})")
        found += inside
    return list(dict.fromkeys(found))


def read_seconds(path: Path) -> float:
    """Length of a file in seconds, from its header.

    Raises:
        AudioError: if the file cannot be opened or holds no samples.
    """
    with _open(path) as file:
        if file.frames == 0:
            raise AudioError("empty: it holds no samples")
        return float(file.frames / file.samplerate)


def read_blocks(path: Path, rate: int) -> Iterator[Samples]:
    """Read a file block by block, mixed down to one channel and resampled.

    Args:
        path: wav, flac, ogg or mp3, of any rate and number of channels.
        rate: samples a second wanted.

    Yields:
        [S] float32, about ten seconds each.

    Raises:
        AudioError: if the file cannot be decoded, or holds a sample that is not finite.
    """
    soxr = require("soxr", "audio")
    with _open(path) as file:
        own_rate = file.samplerate
        resampler = None
        if own_rate != rate:
            resampler = soxr.ResampleStream(own_rate, rate, 1, dtype="float32")
        position = 0
        while True:
            with _decoding(path, "corrupt: {}"):
                block = file.read(_BLOCK_SECONDS * own_rate, dtype="float32", always_2d=True)
            if not len(block):
                break
            mono = block.mean(axis=1, dtype=np.float32)
            if not np.isfinite(mono).all():
                at = (position + int(np.argmin(np.isfinite(mono)))) / own_rate
                raise AudioError(f"holds NaN or infinite samples, the first at {at:.3f} s")
            position += len(mono)
            yield resampler.resample_chunk(mono) if resampler else mono
        if resampler:
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _open(path: Path) -> Any:
    soundfile = require("soundfile", "audio")
    if not path.exists():
        raise AudioError("no such file")
    if not path.is_file():
        raise AudioError("not a file")
    if path.stat().st_size == 0:
        raise AudioError("empty: it holds no bytes")
    with _decoding(path, "not an audio file that can be read ({})"):
        file = soundfile.SoundFile(path)
    short = _SHORT_WAV.search(file.extra_info)
    if short and int(short[1]) not in _UNKNOWN_SIZES:
        file.close()
        raise AudioError(f"truncated: {short[2]} of {short[1]} bytes of samples are there")
    return file


def _reason(error: Exception) -> str:
    text = str(getattr(error, "error_string", None) or error)
    # what libsndfile says of a file without an mp3 stream, which is there and regular
    if text.startswith("File does not exist"):
        return "Format not recognised"
    return text.removeprefix("Error : ").rstrip(".")


@contextlib.contextmanager
def _decoding(path: Path, message: str) -> Iterator[None]:
    """Say what fails inside, and drop what the mp3 decoder prints by itself of the same."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    if path.suffix.lower() == ".mp3":
        os.dup2(nowhere, 2)
    try:
        yield
    except (require("soundfile", "audio").LibsndfileError, OSError) as error:
        raise AudioError(message.format(_reason(error))) from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
