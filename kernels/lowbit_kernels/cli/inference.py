"""Many audio files through a model: batches of similar length, one bad file never stops the rest.

Dimension key: B windows of a batch, T frames of a window, D features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.cli.audio import AudioError, read_blocks, read_seconds
from lowbit_kernels.cli.output import Outcome, progress
from lowbit_kernels.cli.speech import Speech
from lowbit_kernels.cli.windows import (
    CONTEXT_SECONDS,
    WINDOW_SECONDS,
    Cut,
    Window,
    at_pauses,
    overlapping,
)

# the activations of a base model's front end take 13 MB a second
_BATCH_SECONDS = {"cpu": WINDOW_SECONDS, "cuda": 8 * WINDOW_SECONDS}

Run = Callable[[Sequence[Window]], Sequence[Any]]


@dataclass(frozen=True)
class Piece:
    """The result of one window, in order within its file; ``last`` ends the file."""

    path: Path
    value: Any
    last: bool


@dataclass(frozen=True)
class Failure:
    """A file that could not be done; earlier pieces of it are void."""

    path: Path
    reason: str


def stream(
    paths: Sequence[Path], speech: Speech, run: Run, cut: Cut, what: str
) -> Iterator[Piece | Failure]:
    """Run a model over files, shortest first, in memory that does not grow with their length.

    Args:
        paths: audio files.
        speech: the model that says how much audio fits a batch.
        run: gives one value for each window of a batch.
        cut: cuts a file's blocks into windows.
        what: said beside the progress bar.

    Yields:
        Results as they come, the windows of a file in order.
    """
    lengths: dict[Path, float] = {}
    for path in paths:
        try:
            lengths[path] = read_seconds(path)
        except AudioError as error:
            yield Failure(path, str(error))
    ordered = sorted(lengths, key=lambda path: lengths[path])
    budget = _BATCH_SECONDS[speech.device.type] * speech.rate
    with progress("s of audio") as bar:
        task = bar.add_task(what, total=sum(lengths.values()))
        batch: list[tuple[Path, Window]] = []
        for item in _windows(ordered, speech, cut):
            if isinstance(item, Failure):
                # what its earlier windows gave is dropped with it
                batch = [entry for entry in batch if entry[0] != item.path]
                yield item
                continue
            longest = max(len(window.samples) for _, window in (*batch, item))
            padded = speech.padded_samples(longest)
            if batch and (len(batch) + 1) * padded > budget:
                yield from _flush(batch, run)
                bar.advance(task, sum(w.new_samples for _, w in batch) / speech.rate)
                batch = []
            batch.append(item)
        yield from _flush(batch, run)


def read_files(
    paths: Sequence[Path],
    speech: Speech,
    run: Run,
    cut: Cut,
    what: str,
    finish: Callable[[list[Any]], Outcome],
) -> list[Outcome]:
    """Run a model over files as ``stream`` does, and make one outcome of each.

    Args:
        finish: what the values of a file's windows, in order, say of the file.

    Returns:
        One outcome a file, in the order of ``paths``: that of ``finish``, or ``error``.
    """
    values: dict[Path, list[Any]] = {}
    outcomes: dict[Path, Outcome] = {}
    for event in stream(paths, speech, run, cut, what):
        if isinstance(event, Failure):
            values.pop(event.path, None)
            outcomes[event.path] = {"error": event.reason}
            continue
        values.setdefault(event.path, []).append(event.value)
        if event.last:
            outcomes[event.path] = finish(values.pop(event.path))
    return [{"file": str(path)} | outcomes[path] for path in paths]


def _windows(
    paths: Sequence[Path], speech: Speech, cut: Cut
) -> Iterator[tuple[Path, Window] | Failure]:
    for path in paths:
        try:
            for window in cut(read_blocks(path, speech.rate)):
                count = len(window.samples)
                if count < speech.least_samples:
                    raise AudioError(
                        f"too short: {count} samples at {speech.rate} Hz, the model needs "
                        f"{speech.least_samples} ({speech.least_samples / speech.rate:.3f} s)"
                    )
                yield path, window
        except AudioError as error:
            yield Failure(path, str(error))


def _flush(batch: Sequence[tuple[Path, Window]], run: Run) -> Iterator[Piece]:
    if not batch:
        return
    with torch.inference_mode():
        values = run([window for _, window in batch])
    for (path, window), value in zip(batch, values, strict=True):
        yield Piece(path, value, window.last)


def cut_for_frames(speech: Speech) -> Cut:
    """How files are cut where every frame counts: with overlap, see ``windows``."""
    frame = speech.frame
    seconds = min(WINDOW_SECONDS, speech.longest_window)

    def cut(blocks: Any) -> Iterator[Window]:
        return overlapping(
            blocks,
            length=int(seconds * speech.rate) // frame * frame,
            context=int(CONTEXT_SECONDS * speech.rate) // frame * frame,
            frame=frame,
        )

    return cut


def cut_for_text(speech: Speech) -> Cut:
    """How files are cut for a model that writes text: at pauses."""
    length = int(min(WINDOW_SECONDS, speech.longest_window) * speech.rate)
    return lambda blocks: at_pauses(blocks, length=length, rate=speech.rate)


def forward(
    speech: Speech, function: Callable[[dict[str, Tensor]], Tensor], windows: Sequence[Window]
) -> list[Tensor]:
    """Run windows as one batch and keep of each the frames that count.

    Returns:
        One [T, D] tensor a window, without padding and without the frames next to a cut.
    """
    inputs = speech.prepare([window.samples for window in windows])
    outputs = function(inputs)
    return [
        output[:count][window.drop :][: window.keep]
        for output, count, window in zip(outputs, speech.frame_counts(inputs), windows, strict=True)
    ]
