"""``lowbit transcribe``: audio to text.

Dimension key: B windows of a batch, T frames.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lowbit_kernels.cli.errors import CommandError
from lowbit_kernels.cli.inference import (
    Failure,
    Run,
    cut_for_frames,
    cut_for_text,
    forward,
    stream,
)
from lowbit_kernels.cli.load import quiet_transformers
from lowbit_kernels.cli.output import Outcome, results
from lowbit_kernels.cli.speech import Speech
from lowbit_kernels.cli.windows import Cut, Window


def transcribe(speech: Speech, paths: Sequence[Path]) -> list[Outcome]:
    """Transcribe files with a CTC or a sequence-to-sequence model.

    Args:
        speech: the model.
        paths: audio files.

    Returns:
        One outcome a file, in the order of ``paths``, with its ``text`` or its ``error``.

    Raises:
        CommandError: if the model writes no text.
    """
    run, cut, join = text_reader(speech)
    pieces: dict[Path, list[Any]] = {}
    outcomes: dict[Path, Outcome] = {}
    for event in stream(paths, speech, run, cut, "transcribing"):
        if isinstance(event, Failure):
            pieces.pop(event.path, None)
            outcomes[event.path] = {"file": str(event.path), "error": event.reason}
            continue
        pieces.setdefault(event.path, []).append(event.value)
        if event.last:
            text = join(pieces.pop(event.path))
            outcomes[event.path] = {"file": str(event.path), "text": text}
    return [outcomes[path] for path in paths]


def text_reader(speech: Speech) -> tuple[Run, Cut, Callable[[list[Any]], str]]:
    """How a model reads: what runs a batch, what cuts a file, what joins a file's windows to text.

    Raises:
        CommandError: if the model writes no text.
    """
    # a missing tokenizer is said before any audio is read
    if speech.kind == "ctc":
        _ = speech.tokenizer
        return partial(_best_tokens, speech), cut_for_frames(speech), partial(_spell, speech)
    if speech.kind == "seq2seq":
        _ = speech.tokenizer
        return partial(_generate, speech), cut_for_text(speech), " ".join
    raise CommandError(
        f"{speech.name}: a {type(speech.model).__name__} writes no text; a model for CTC or a "
        "sequence-to-sequence model does"
    )


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


def print_transcripts(outcomes: Sequence[Outcome]) -> None:
    """Texts beside their files' names; lines of name, tab and text where no terminal reads.

    Files that failed are left to stderr.
    """
    done = [outcome for outcome in outcomes if "text" in outcome]
    if not sys.stdout.isatty():
        sys.stdout.writelines(f"{outcome['file']}\t{outcome['text']}\n" for outcome in done)
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", overflow="fold", max_width=30)
    table.add_column(overflow="fold")
    for outcome in done:
        table.add_row(Path(outcome["file"]).name, Text(outcome["text"] or "(nothing)"))
    if done:
        results().print(table)
