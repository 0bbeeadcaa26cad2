"""Where output goes: results to stdout, all else to stderr, progress only on a terminal."""

import json
import math
import sys
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

# what became of one audio file: "file" and its results, or "file" and "error"
Outcome: TypeAlias = dict[str, Any]


def results() -> Console:
    """The console for results. Text that is not for a terminal is never wrapped."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=120)


def note(message: str, style: str = "yellow") -> None:
    """One line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(message, style=style))


def print_json(data: dict[str, Any]) -> None:
    """Machine-readable results, strict JSON: what is not a finite number becomes null."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")


def progress(unit: str) -> Progress:
    """A progress bar on stderr, shown only if that is a terminal.

    Args:
        unit: what is counted.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} " + unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
