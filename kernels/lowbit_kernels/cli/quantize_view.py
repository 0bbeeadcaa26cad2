"""A quantization report, to read: layers that repeat share a line."""

import re
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lowbit_kernels.cli.output import results
from lowbit_kernels.conversion import LayerReport, QuantizationReport

_NUMBER = re.compile(r"\d+")


def show_report(report: QuantizationReport) -> None:
    """Print the summary, the layers, and what deserves a look."""
    console = results()
    console.print(f"[bold]{report.summary}[/]")
    table = Table(box=None)
    table.add_column("layers", overflow="fold")
    table.add_column("", justify="right", style="dim")
    table.add_column("become")
    table.add_column("least SQNR", justify="right", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    for layers in _alike(report.layers):
        first = layers[0]
        left = first.spec is None
        decibels = [layer.sqnr_db for layer in layers if layer.sqnr_db is not None]
        before = sum(layer.bytes_before for layer in layers) / 1e6
        after = sum(layer.bytes_after for layer in layers) / 1e6
        table.add_row(
            _join([layer.name for layer in layers]),
            f"{len(layers)}x {first.kind}",
            Text("float: " + _reason(first.reason), style="yellow") if left else first.spec,
            f"{min(decibels):.1f} dB" if decibels else "",
            f"{before:.2f}" if left else f"{before:.2f} > {after:.2f}",
        )
    console.print(table)
    for layer in report.layers:
        if layer.note:
            console.print(Text(f"{layer.name}: {layer.note}", style="red"))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _alike(layers: Sequence[LayerReport]) -> list[list[LayerReport]]:
    """Layers whose names differ in numbers only and that became the same, in the model's order."""
    groups: dict[tuple[str | None, ...], list[LayerReport]] = {}
    for layer in layers:
        key = (_NUMBER.sub("*", layer.name), layer.kind, layer.spec, layer.reason)
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _join(names: Sequence[str]) -> str:
    """Names that differ in numbers as one: ``layers.0-11.k_proj``."""
    numbers = [_NUMBER.findall(name) for name in names]
    ranges = iter(
        column[0] if len(set(column)) == 1 else f"{column[0]}-{column[-1]}"
        for column in zip(*numbers, strict=True)
    )
    return _NUMBER.sub(lambda _: next(ranges), names[0])


def _reason(reason: str) -> str:
    """A reason without the pattern behind it, which the JSON has."""
    rule, quote, _ = reason.partition(" '")
    return {"skip": "left by default", "override": "left by an override"}.get(
        rule if quote else "", reason
    )
