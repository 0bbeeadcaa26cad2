"""Manifests of speech: fairseq's TSV, JSON lines, or a folder of audio files."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SAMPLE_RATE = 16_000
_ENDINGS = {".wav", ".flac", ".ogg", ".mp3"}
# what JSON lines call the file: ours, and NeMo's
_AUDIO_KEYS = ("audio", "audio_filepath")


@dataclass(frozen=True, slots=True)
class Utterance:
    """An audio file, its samples at 16 kHz and what is said, if that is known."""

    path: Path
    samples: int
    text: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Utterances, and a line for each file that was left out: missing, or not readable."""

    utterances: tuple[Utterance, ...]
    problems: tuple[str, ...] = ()


class _Entry(NamedTuple):
    path: Path
    samples: int | None
    text: str | None


def read_manifest(source: Path) -> Manifest:
    """Read a manifest.

    Args:
        source: a ``.tsv`` file, whose first line is a folder and whose others are ``path<TAB>
            samples`` and perhaps ``<TAB>text`` (samples count at 16 kHz); a ``.jsonl`` or
            ``.json`` file of lines like ``{"audio": "a.flac", "text": "hello", "duration": 1.5}``,
            of which the last two are optional; or a folder. Paths are relative to the folder, or
            to the file.

    Raises:
        ValueError: for a source that is none of these, a line that is wrong, or no utterance.
    """
    if source.is_dir():
        found = (p for p in sorted(source.rglob("*")) if p.suffix.lower() in _ENDINGS)
        entries: Iterator[_Entry] = (_Entry(path, None, None) for path in found)
    elif source.is_file() and source.suffix in (".jsonl", ".json"):
        entries = _read_json_lines(source)
    elif source.is_file() and source.suffix == ".tsv":
        entries = _read_tsv(source)
    else:
        raise ValueError(f"data must be a folder, a .tsv or a .jsonl file, got {source}")
    utterances, problems = list[Utterance](), list[str]()
    for entry in entries:
        try:
            samples = _count_samples(entry.path) if entry.samples is None else entry.samples
            utterances.append(Utterance(entry.path, samples, entry.text))
        except (OSError, RuntimeError) as error:
            problems.append(f"{entry.path}: {str(error).splitlines()[0]}")
    if not utterances:
        left_out = f", {len(problems)} files were left out: {problems[0]}" if problems else ""
        raise ValueError(f"data must hold at least one readable utterance, got none{left_out}")
    return Manifest(tuple(utterances), tuple(problems))


def _read_tsv(source: Path) -> Iterator[_Entry]:
    lines = source.read_text().splitlines()
    root = source.parent / lines[0].strip() if lines else source.parent
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        if not rest or not rest[0].strip().isdecimal():
            raise ValueError(f"{source} line {number} must be path<TAB>samples, got {line!r}")
        yield _Entry(root / name, int(rest[0]), rest[1].strip() if len(rest) > 1 else None)


def _read_json_lines(source: Path) -> Iterator[_Entry]:
    for number, line in enumerate(source.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = next(row[key] for key in _AUDIO_KEYS if key in row)
            seconds = row.get("duration")
            samples = None if seconds is None else round(float(seconds) * SAMPLE_RATE)
        except (json.JSONDecodeError, StopIteration, TypeError, ValueError):
            raise ValueError(
                f"{source} line {number} must be a JSON object with 'audio', got {line[:80]!r}"
            ) from None
        yield _Entry(source.parent / name, samples, row.get("text"))


def _count_samples(path: Path) -> int:
    """At 16 kHz, of the file's header."""
    import soundfile

    if not path.is_file():
        raise FileNotFoundError("no such file")
    header = soundfile.info(path)
    return int(header.frames * SAMPLE_RATE // header.samplerate)
