"""``lowbit encode``: audio to one file of frames each, in safetensors or npy.

Files are written as the frames come, under a temporary name, and renamed when complete. What is
there already is skipped, so a run that was stopped goes on where it was.

Dimension key: T frames, D features.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from lowbit_kernels.cli.audio import Samples
from lowbit_kernels.cli.errors import CommandError
from lowbit_kernels.cli.frames_file import FORMATS, FramesWriter, read_shape
from lowbit_kernels.cli.inference import Failure, cut_for_frames, forward, stream
from lowbit_kernels.cli.output import Outcome
from lowbit_kernels.cli.speech import Speech
from lowbit_kernels.cli.windows import Window
from lowbit_kernels.modules import QuantizedModule

# what made the frames of a folder; another model may not add to them
RECORD = "encode.json"


def encode(speech: Speech, targets: Mapping[Path, Path], folder: Path) -> list[Outcome]:
    """Write the encoder's last hidden states [T, D], float32, of every audio file.

    Args:
        speech: the model.
        targets: audio file to frames file, of ``name_targets``.
        folder: where the record of the run goes.

    Returns:
        One outcome a file, in the order of ``targets``: ``output``, ``frames`` and ``skipped``, or
        ``error``.

    Raises:
        CommandError: if the folder holds frames of another model.
    """
    _check_record(speech, folder)
    outcomes: dict[Path, Outcome] = {}
    for path, target in targets.items():
        if (shape := _finished(path, target)) is not None:
            outcomes[path] = _done(path, target, shape[0], skipped=True)
    writers: dict[Path, FramesWriter] = {}
    todo = [path for path in targets if path not in outcomes]
    run = partial(_frames, speech)
    try:
        for event in stream(todo, speech, run, cut_for_frames(speech), "encoding"):
            if isinstance(event, Failure):
                if writer := writers.pop(event.path, None):
                    writer.discard()
                outcomes[event.path] = {"file": str(event.path), "error": event.reason}
                continue
            target = targets[event.path]
            if event.path not in writers:
                writers[event.path] = FramesWriter(target, speech.frame / speech.rate)
            writers[event.path].write(event.value)
            if event.last:
                count = writers.pop(event.path).finish()
                outcomes[event.path] = _done(event.path, target, count, skipped=False)
    finally:
        for writer in writers.values():
            writer.discard()
    return [outcomes[path] for path in targets]


def name_targets(
    arguments: Sequence[Path], audio: Sequence[Path], out: Path, form: str
) -> dict[Path, Path]:
    """Which frames file belongs to which audio file.

    A file's is named after it; files found in a folder keep their place below that folder.

    Args:
        arguments: what the user named, files and folders.
        audio: the files these stand for.
        out: the folder for the frames.
        form: a key of ``FORMATS``.

    Raises:
        CommandError: for an unknown format, or if two audio files would share a frames file.
    """
    if form not in FORMATS:
        raise CommandError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    folders = [argument for argument in arguments if argument.is_dir()]
    targets: dict[Path, Path] = {}
    owners: dict[Path, Path] = {}
    for path in audio:
        folder = next((f for f in folders if path.is_relative_to(f)), path.parent)
        target = (out / path.relative_to(folder)).with_suffix(f".{form}")
        if target in owners:
            raise CommandError(
                f"{owners[target]} and {path} would both become {target}; name the folder that "
                "holds both, or encode them into two folders"
            )
        owners[target] = path
        targets[path] = target
    return targets


def summarize(outcomes: Sequence[Outcome], folder: Path) -> str:
    """One line: how many files were written, skipped and failed."""
    done = [outcome for outcome in outcomes if "error" not in outcome]
    skipped = sum(outcome["skipped"] for outcome in done)
    frames = sum(outcome["frames"] for outcome in done if not outcome["skipped"])
    parts = [f"{len(done) - skipped} written ({frames} frames)"]
    if skipped:
        parts.append(f"{skipped} there already")
    if len(done) < len(outcomes):
        parts.append(f"{len(outcomes) - len(done)} failed")
    return f"{', '.join(parts)}, in {folder}"


def _frames(speech: Speech, windows: Sequence[Window]) -> list[Samples]:
    outputs = forward(speech, speech.frames, windows)
    return [output.float().cpu().numpy() for output in outputs]


def _finished(path: Path, target: Path) -> tuple[int, int] | None:
    """The shape of a complete frames file that is newer than its audio."""
    try:
        if target.stat().st_mtime < path.stat().st_mtime:
            return None
        return read_shape(target)
    except (OSError, ValueError):
        return None


def _done(path: Path, target: Path, frames: int, *, skipped: bool) -> Outcome:
    return {"file": str(path), "output": str(target), "frames": frames, "skipped": skipped}


def _check_record(speech: Speech, folder: Path) -> None:
    wanted = {"model": type(speech.model).__name__, "sha256": _fingerprint(speech)}
    record = folder / RECORD
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--out {folder}: a file; it must be a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(wanted, indent=1))
        os.replace(temporary, record)
        return
    try:
        found = json.loads(record.read_text())
    except ValueError:
        raise CommandError(f"{record}: not a record of an earlier run") from None
    if found != wanted:
        raise CommandError(f"{folder} holds frames of another model; choose another --out")


def _fingerprint(speech: Speech) -> str:
    """A hash of the weights and of how each low-bit layer takes its inputs."""
    digest = hashlib.sha256()
    for name, module in speech.model.named_modules():
        if isinstance(module, QuantizedModule):
            digest.update(f"{name}: {module.spec}\n".encode())
    for name, tensor in speech.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
