"""A comparison, to read."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from lowbit_kernels.cli.compare import Comparison
from lowbit_kernels.cli.layer_errors import LayerError
from lowbit_kernels.cli.output import Outcome
from lowbit_kernels.cli.words import WordErrors
from lowbit_kernels.conversion.layer_names import LayerTable

_WORST_LAYERS = 10
_SHOWN_TEXTS = 10


def view_comparison(found: Comparison) -> RenderableType:
    """The figures, the transcripts that differ, and the layers with the most noise."""
    if all("error" in file for file in found.files):
        return ""  # nothing was compared; what failed is said on stderr
    parts: list[RenderableType] = [_figures(found)]
    if changed := [file for file in found.files if file.get("float") != file.get("quantized")]:
        more = f", {_SHOWN_TEXTS} of {len(changed)}" if len(changed) > _SHOWN_TEXTS else ""
        parts += [f"\n[bold]Transcripts that differ[/]{more}", _texts(changed[:_SHOWN_TEXTS])]
    if found.layers:
        more = ", all in --json" if len(found.layers) > _WORST_LAYERS else ""
        title = f"\n[bold]Noisiest of {len(found.layers)} layers[/]{more}"
        parts += [title, _layers(sorted(found.layers, key=_noise)[:_WORST_LAYERS])]
    return Group(*parts)


def _figures(found: Comparison) -> Table:
    table = Table.grid(Column(style="bold cyan", no_wrap=True), "", padding=(0, 2, 0, 0))
    frames = found.frames
    if frames.disagreement is not None:
        table.add_row(
            "frame disagreement",
            f"{frames.disagreement:.2%} [dim]({frames.different} of {frames.count} frames)[/]",
        )
    if frames.error is not None:
        table.add_row("output error", f"{frames.error:.2%} [dim](of the float outputs' norm)[/]")
    if found.words:
        table.add_row("word disagreement", _rate(found.words))
    if found.float_wer and found.quantized_wer:
        table.add_row("WER, float", _rate(found.float_wer))
        table.add_row("WER, low-bit", _rate(found.quantized_wer))
    return table


def _rate(errors: WordErrors) -> str:
    return (
        f"{errors.rate:.2%} [dim]({errors.errors} of {errors.words} words, in "
        f"{errors.changed} of {errors.transcripts} transcripts)[/]"
    )


def _texts(files: Sequence[Outcome]) -> Table:
    table = Table.grid(
        Column(style="dim", overflow="fold", max_width=30),
        Column(style="dim", no_wrap=True),
        Column(overflow="fold"),
        padding=(0, 2, 0, 0),
    )
    for file in files:
        name = Path(file["file"]).name
        table.add_row(name, "float", Text(file["float"] or "(nothing)"))
        table.add_row("", "low-bit", Text(file["quantized"] or "(nothing)"))
    return table


def _layers(worst: Sequence[LayerError]) -> LayerTable:
    right = partial(Column, justify="right", no_wrap=True)
    rows = []
    for layer in worst:
        output = layer.output_sqnr_db
        shown = "" if output is None else f"{output:.1f} dB"
        rows.append(([layer.name], (layer.spec, f"{layer.weight_sqnr_db:.1f} dB", shown)))
    columns = ("spec", right("weight\nSQNR"), right("output\nSQNR"))
    return LayerTable(columns, rows, [layer.spec for layer in worst], others=22)


def _noise(layer: LayerError) -> float:
    worst = layer.weight_sqnr_db
    if layer.output_sqnr_db is not None and math.isfinite(layer.output_sqnr_db):
        worst = min(worst, layer.output_sqnr_db)
    return worst
