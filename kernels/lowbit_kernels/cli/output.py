"""Where output goes: results to stdout, all else to stderr, progress only on a terminal."""

import json
import sys
from typing import Any, TypeAlias

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

# what became of one audio file: "file" and its results, or "file" and "error"
Outcome: TypeAlias = dict[str, Any]

# of what is not printed on a terminal
_WIDTH = 120


def show(data: dict[str, Any], view: RenderableType, *, as_json: bool) -> None:
    """Print results on stdout, then one line on stderr for every file that failed.

    Text that is not for a terminal is never wrapped to its width.

    Args:
        data: what was found; ``files``, if it has them, are outcomes.
        view: the same, to read; plain text is written as it is.
        as_json: print ``data`` instead, as strict JSON: what is not a finite number becomes null.

    Raises:
        typer.Exit: with code 2, if a file failed.
    """
    if as_json:
        finite = json.loads(json.dumps(data), parse_constant=lambda name: None)
        view = json.dumps(finite, indent=2) + "\n"
    if isinstance(view, str):
        sys.stdout.write(view)
    else:
        Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH).print(view)
    failed = [outcome for outcome in data.get("files", ()) if "error" in outcome]
    for outcome in failed:
        note(f"{outcome['file']}: {outcome['error']}", style="red")
    if failed:
        raise typer.Exit(2)


def note(message: str, style: str = "yellow") -> None:
    """One line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(message, style=style))


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
