"""The demo's findings, to read."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lowbit_kernels.cli.demo import SECONDS, Demo, Reading, Timing
from lowbit_kernels.cli.output import results


def show_demo(found: Demo) -> None:
    """Print the device, what the shipped model reads, and the times."""
    console = results()
    console.print(Text(f"Running on {found.device}\n", style="dim"))
    console.print("[bold]The shipped model reads digits, spoken by synthetic voices[/]")
    console.print(_reading_table(found.readings), "")
    console.print(_text_table(found.said, found.readings))
    console.print(f"[bold]{SECONDS} s of audio through wav2vec2-base's shapes, random weights[/]")
    console.print(_timing_table(found.timings))


def _reading_table(readings: Sequence[Reading]) -> Table:
    table = _table("word errors", "frames as float", "checkpoint", "of float")
    whole = readings[0].checkpoint_bytes
    for reading in readings:
        table.add_row(
            reading.variant,
            f"{reading.errors} of {reading.words}",
            f"{reading.agreement:.1%}",
            f"{reading.checkpoint_bytes / 1e6:.2f} MB",
            f"{reading.checkpoint_bytes / whole:.2f}",
        )
    return table


def _text_table(said: Sequence[str], readings: Sequence[Reading]) -> Table:
    """What was said, and below it each transcript with the variants that gave it."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for number, text in enumerate(said):
        table.add_row("said", Text(text, style="bold"))
        variants: dict[str, list[str]] = {}
        for reading in readings:
            variants.setdefault(reading.texts[number], []).append(reading.variant)
        for got, names in variants.items():
            style = "green" if got.split() == text.split() else "red"
            table.add_row(", ".join(names), Text(got or "(nothing)", style=style))
        table.add_row()
    return table


def _timing_table(timings: Sequence[Timing]) -> Table:
    table = _table("median time", "speed-up")
    for timing in timings:
        style = "green" if timing.speed_up >= 1 else "default"
        table.add_row(
            timing.variant,
            f"{timing.median_seconds * 1000:.0f} ms",
            f"[{style}]{timing.speed_up:.2f}x[/]",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None)
    table.add_column("variant", style="bold cyan")
    for column in columns:
        table.add_column(column, justify="right")
    return table
