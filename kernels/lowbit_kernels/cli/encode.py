"""``lowbit encode``: audio to one file of frames each, in safetensors or npy.

Files are written as the frames come, under a temporary name, and renamed when complete. What is
there already is skipped, so a run that was stopped goes on where it was.

Dimension key: T frames, D features.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowbit_kernels.cli.audio import Samples, find_audio
from lowbit_kernels.cli.errors import CommandError
from lowbit_kernels.cli.frames_file import FORMATS, FramesWriter, read_shape
from lowbit_kernels.cli.inference import Failure, cut_for_frames, forward, stream
from lowbit_kernels.cli.load import find_device, load_speech
from lowbit_kernels.cli.output import Outcome
from lowbit_kernels.cli.speech import Speech
from lowbit_kernels.cli.windows import Window
from lowbit_kernels.modules import QuantizedModule

# what made the frames of a folder; another model may not add to them
RECORD = "encode.json"


def encode(
    model: str, audio: Sequence[Path], out: Path, form: str, device: str | None
) -> dict[str, Any]:
    """Write the encoder's last hidden states [T, D], float32, of every audio file.

    Args:
        model: a hub id, a folder, or a low-bit checkpoint.
        audio: files, and folders of them.
        out: the folder for the frames and the record of the run.
        form: a key of ``FORMATS``.
        device: ``None`` takes a GPU if there is one.

    Returns:
        ``files`` holds one outcome a file: ``output``, ``frames`` and ``skipped``, or ``error``.

    Raises:
        CommandError: if something named is not there, or ``out`` holds frames of another model.
    """
    targets, place = name_targets(audio, out, form), find_device(device)
    speech = load_speech(model, place)
    _check_record(speech, out)
    shapes = {path: _finished(path, target) for path, target in targets.items()}
    outcomes: dict[Path, Outcome] = {
        path: {"output": str(targets[path]), "frames": shape[0], "skipped": True}
        for path, shape in shapes.items()
        if shape
    }
    writers: dict[Path, FramesWriter] = {}
    todo = [path for path in targets if path not in outcomes]
    run = partial(_frames, speech)
    try:
        for event in stream(todo, speech, run, cut_for_frames(speech), "encoding"):
            path = event.path
            if isinstance(event, Failure):
                if path in writers:
                    writers.pop(path).discard()
                outcomes[path] = {"error": event.reason}
                continue
            if path not in writers:
                writers[path] = FramesWriter(targets[path], speech.frame / speech.rate)
            writers[path].write(event.value)
            if event.last:
                count = writers[path].finish()
                outcomes[path] = {"output": str(targets[path]), "frames": count, "skipped": False}
                del writers[path]
    finally:
        for writer in writers.values():
            writer.discard()
    files = [{"file": str(path)} | outcomes[path] for path in targets]
    return {"model": model, "device": str(place), "files": files}


def name_targets(arguments: Sequence[Path], out: Path, form: str) -> dict[Path, Path]:
    """Which frames file belongs to which audio file.

    A file's is named after it; files found in a folder keep their place below that folder.

    Args:
        arguments: what the user named, files and folders.
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
    for path in find_audio(arguments):
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
    return f"{', '.join(parts)}, in {folder}\n"


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


def _check_record(speech: Speech, folder: Path) -> None:
    wanted = json.dumps(
        {"model": type(speech.model).__name__, "sha256": _fingerprint(speech)}, indent=1
    )
    record = folder / RECORD
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--out {folder}: a file; it must be a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not record.exists():
        temporary = record.with_suffix(".tmp")
        temporary.write_text(wanted)
        os.replace(temporary, record)
    elif record.read_bytes() != wanted.encode():
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
