"""Names of layers, to read: layers that repeat share a line, and a long name breaks at its dots."""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

T = TypeVar("T")

_NUMBER = re.compile(r"\d+")
_LEAST_NAME_WIDTH = 24


def alike(
    layers: Iterable[T], name: Callable[[T], str], facts: Callable[[T], Hashable]
) -> list[list[T]]:
    """Layers whose names differ in numbers only and whose facts are the same, in their order."""
    groups: dict[tuple[str, Hashable], list[T]] = {}
    for layer in layers:
        groups.setdefault((_NUMBER.sub("*", name(layer)), facts(layer)), []).append(layer)
    return list(groups.values())


def join_names(names: Sequence[str]) -> str:
    """Names that differ in numbers as one: ``layers.0-1,4-11.k_proj``."""
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    ranges = iter([_ranges(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(ranges), names[0])


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers, runs as ``first-last``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def fold_name(name: str, width: int) -> str:
    """A name in lines of at most ``width``, broken after dots; a single part may be longer."""
    lines: list[str] = []
    for part in re.findall(r"[^.]*\.|[^.]+", name):
        if lines and len(lines[-1]) + len(part) <= width:
            lines[-1] += part
        else:
            lines.append("  " * bool(lines) + part)
    return "\n".join(lines)


def name_width(width: int, specs: Sequence[str], others: int) -> int:
    """What a table has left for names beside its longest spec.

    Args:
        width: of the console.
        specs: texts of another column.
        others: the width of all other columns and of the gaps.
    """
    return max(width - others - max(map(len, specs), default=0), _LEAST_NAME_WIDTH)


@dataclass(frozen=True)
class LayerTable:
    """A table of layers, whose names take the width that the other columns leave.

    Args:
        columns: those after the names and how many they are.
        rows: names that share a row, with the row's other cells.
        specs, others: see ``name_width``.
    """

    columns: Sequence[Column | str]
    rows: Sequence[tuple[Sequence[str], Sequence[str | Text]]]
    specs: Sequence[str]
    others: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = name_width(options.max_width, self.specs, self.others)
        count = Column(justify="right", style="dim", no_wrap=True)
        columns = (Column("layers", overflow="fold"), count, *self.columns)
        table = Table(*columns, box=None, pad_edge=False, header_style="dim")
        for layers, cells in self.rows:
            shown = f"{len(layers)}x" if len(layers) > 1 else ""
            table.add_row(fold_name(join_names(layers), width), shown, *cells)
        yield table
