"""``python -m bench static``: compile the kernels for every GPU and tabulate what came out."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.record import RESULTS
from bench.static.cases import load_cases
from bench.static.compile import Row, compile_case
from bench.static.gpus import GPUS
from bench.static.table import RESOURCES, cells, read_table, write_table

KEPT = RESULTS / "static"
# beyond as many, cases are lines and not columns, of which these have room
MAX_SIDE_BY_SIDE = 6
SHORT = ("case", "registers", "spill", "programs", "loop", *RESOURCES, "best", "fill")
# where a line of all of them would not fit
SHORTEST = ("case", "registers", "spill", "loop", "bound", "best")
WIDE = 150


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench static", description=__doc__.split(": ")[1]
    )
    parser.add_argument(
        "--target", nargs="+", choices=GPUS, default=list(GPUS), metavar="TARGET",
        help=f"out of {', '.join(GPUS)}; all unless given",
    )  # fmt: skip
    parser.add_argument(
        "--kernel", default="", help="show the cases with this in their name, keep no table"
    )
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", type=_part,
        help="every N-th case from the I-th on: neighbors are variants of one kernel",
    )  # fmt: skip
    parser.add_argument(
        "--against", default="", metavar="TRITON", help="kept table to compare with"
    )
    parser.add_argument("--results", type=Path, default=KEPT, help="folder of the tables")
    return parser


def _part(text: str) -> tuple[int, int]:
    numbers = text.split("/")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise argparse.ArgumentTypeError(f"must be like 1/2, got {text!r}")
    first, step = map(int, numbers)
    if not 1 <= first <= step:
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r}")
    return first, step


def main(arguments: Sequence[str]) -> int:
    """Run the command line; 1 if a kernel breaks a rule, 2 for a wrong command."""
    options = parser().parse_args(arguments)
    # an interpreted kernel cannot be compiled; each worker compiles alone
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    import triton

    first, step = options.part
    if step > 1 and not options.kernel and options.results == KEPT:
        print("bench: a part of the cases makes no table to keep: add --results", file=sys.stderr)
        return 2
    jobs = [
        (target, i)
        for target in options.target
        for i in range(first - 1, len(load_cases(target, options.kernel)), step)
    ]
    if not jobs:
        print(f"bench: no case has {options.kernel!r} in its name", file=sys.stderr)
        return 2
    lacking = [t for t in options.target if not read_table(t, options.against, options.results)]
    if options.against and lacking:
        where = f"of Triton {options.against} under {options.results}"
        print(f"bench: no table {where} for {', '.join(lacking)}", file=sys.stderr)
        return 2
    version, console, failed = triton.__version__, Console(), False
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            done = [pool.submit(_compile, *job, options.kernel) for job in jobs]
            for target in options.target:
                rows = [d.result() for d, job in zip(done, jobs, strict=True) if job[0] == target]
                failed |= _report(rows, target, version, options, console)
    return int(failed)


def _compile(target: str, index: int, part: str) -> Row:
    return compile_case(load_cases(target, part)[index], target)


def _report(
    rows: list[Row], target: str, version: str, options: argparse.Namespace, console: Console
) -> bool:
    """Show or keep the rows of one target; whether any breaks a rule."""
    for row in rows:
        # differs from run to run
        seconds = row.pop("compile_seconds", 0)
        for problem in row["problems"]:
            print(f"{target} {row['name']}: {problem} ({seconds} s)", file=sys.stderr)
    if options.kernel:
        before = read_table(target, options.against or version, options.results)
        title = f"{target} ({GPUS[target].name}), Triton {version}"
        title += f", {options.against} → {version}" if options.against else ""
        shown = [changes(row, before.get(row["name"]), target) for row in rows]
        console.print(_view(shown, title, console.width))
    else:
        table = {"target": target, "gpu": GPUS[target].name, "triton": version, "kernels": rows}
        print(write_table(table, options.results), flush=True)
    return any(row["problems"] for row in rows)


def changes(row: Row, before: Row | None, target: str) -> dict[str, str]:
    """The cells of a row; where a kept one differs, both."""
    new = cells(row, target)
    old = new if before is None else cells(before, target)
    return {
        k: v if v == old[k] else f"{old[k] or '-'} [bold]→ {v or '-'}[/]" for k, v in new.items()
    }


def _view(rows: list[dict[str, str]], title: str, width: int) -> Table:
    """Cases side by side or, where there are many, one below the other."""
    is_long = len(rows) > MAX_SIDE_BY_SIDE
    wanted = rows[0] if not is_long else SHORT if width >= WIDE else SHORTEST
    names = [n for n in wanted if any(row[n] for row in rows)]
    lines: Iterable[Sequence[str]] = [[_cell(row, name) for name in names] for row in rows]
    head: Sequence[str] = names
    if not is_long:
        head, *lines = zip(names, *lines, strict=True)
    table = Table(title=title, title_justify="left", header_style="bold", row_styles=["", "dim"])
    for i, name in enumerate(head):
        table.add_column(name, overflow="fold", no_wrap=i == 0)
    for line in lines:
        table.add_row(*line)
    return table


def _cell(row: dict[str, str], name: str) -> str:
    """A cell, marked if it is the busiest resource."""
    return f"[bold yellow]{row[name]}[/]" if name == row["bound"] else row[name]
