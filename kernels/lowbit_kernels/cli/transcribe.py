"""``lowbit transcribe``: audio to text.

Dimension key: B windows of a batch, T frames.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from lowbit_kernels.cli.audio import find_audio
from lowbit_kernels.cli.errors import CommandError
from lowbit_kernels.cli.inference import Run, cut_for_frames, cut_for_text, forward, read_files
from lowbit_kernels.cli.load import find_device, load_speech, quiet_transformers
from lowbit_kernels.cli.output import Outcome
from lowbit_kernels.cli.speech import Speech
from lowbit_kernels.cli.windows import Cut, Window


def transcribe(model: str, audio: Sequence[Path], device: str | None) -> dict[str, Any]:
    """Transcribe files with a CTC or a sequence-to-sequence model.

    Args:
        model: a hub id, a folder, or a low-bit checkpoint.
        audio: files, and folders of them.
        device: ``None`` takes a GPU if there is one.

    Returns:
        ``files`` holds one outcome a file, with its ``text`` or its ``error``.

    Raises:
        CommandError: if something named is not there, or the model writes no text.
    """
    files, place = find_audio(audio), find_device(device)
    speech = load_speech(model, place)
    run, cut, join = text_reader(speech)
    outcomes = read_files(
        files, speech, run, cut, "transcribing", lambda values: {"text": join(values)}
    )
    return {"model": model, "device": str(place), "files": outcomes}


def text_reader(speech: Speech) -> tuple[Run, Cut, Callable[[list[Any]], str]]:
    """How a model reads: what runs a batch, what cuts a file, what joins a file's windows to text.

    Raises:
        CommandError: if the model writes no text.
    """
    if speech.kind == "encoder":
        raise CommandError(
            f"{speech.name}: a {type(speech.model).__name__} writes no text; a model for CTC or a "
            "sequence-to-sequence model does"
        )
    _ = speech.tokenizer  # a missing one is said before any audio is read
    if speech.kind == "ctc":
        return partial(_best_tokens, speech), cut_for_frames(speech), partial(_spell, speech)
    return partial(_generate, speech), cut_for_text(speech), " ".join


def _best_tokens(speech: Speech, windows: Sequence[Window]) -> list[list[int]]:
    return [logits.argmax(-1).tolist() for logits in forward(speech, speech.logits, windows)]


def _spell(speech: Speech, windows: list[list[int]]) -> str:
    return speech.decode([token for tokens in windows for token in tokens])


def _generate(speech: Speech, windows: Sequence[Window]) -> list[str]:
    inputs = speech.prepare([window.samples for window in windows])
    with quiet_transformers():
        tokens = speech.model.generate(**inputs)
    texts = speech.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def view_transcripts(outcomes: Sequence[Outcome]) -> RenderableType:
    """Texts beside their files' names; lines of name, tab and text where no terminal reads.

    Files that failed are left to stderr.
    """
    done = [outcome for outcome in outcomes if "text" in outcome]
    if not done or not sys.stdout.isatty():
        return "".join(f"{outcome['file']}\t{outcome['text']}\n" for outcome in done)
    name = Column(style="dim", overflow="fold", max_width=30)
    table = Table.grid(name, Column(overflow="fold"), padding=(0, 2, 0, 0))
    for outcome in done:
        table.add_row(Path(outcome["file"]).name, Text(outcome["text"] or "(nothing)"))
    return table
