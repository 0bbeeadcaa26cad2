"""A comparison, to read."""

import math

from rich.table import Table
from rich.text import Text

from lowbit_kernels.cli.compare import Comparison
from lowbit_kernels.cli.layer_errors import LayerError
from lowbit_kernels.cli.output import results
from lowbit_kernels.cli.words import WordErrors

_WORST_LAYERS = 10


def show_comparison(found: Comparison) -> None:
    """Print the figures, the transcripts that differ, and the layers with the most noise."""
    console = results()
    console.print(_figures(found))
    if (texts := _changed(found)).row_count:
        console.print("\n[bold]Transcripts that differ[/]")
        console.print(texts)
    if found.layers:
        console.print(_layers(found.layers))


def _figures(found: Comparison) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    frames = found.frames
    if frames.disagreement is not None:
        table.add_row(
            "frame disagreement",
            f"{frames.disagreement:.2%} [dim]({frames.different} of {frames.count} frames)[/]",
        )
    if frames.count:
        table.add_row("output error", f"{frames.error:.2%} [dim](of the float outputs' norm)[/]")
    if found.words:
        table.add_row("word disagreement", _rate(found.words))
    if found.float_wer and found.quantized_wer:
        table.add_row("WER, float", _rate(found.float_wer))
        table.add_row("WER, low-bit", _rate(found.quantized_wer))
    return table


def _rate(errors: WordErrors) -> str:
    return (
        f"{errors.rate:.2%} [dim]({errors.errors} errors in {errors.words} words, "
        f"{errors.changed} of {errors.transcripts} transcripts)[/]"
    )


def _changed(found: Comparison) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", overflow="fold", max_width=30)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for file in found.files:
        if file.get("float") == file.get("quantized"):
            continue
        table.add_row(file["file"], "float", Text(file["float"] or "(nothing)"))
        table.add_row("", "low-bit", Text(file["quantized"] or "(nothing)"))
    return table


def _layers(layers: tuple[LayerError, ...]) -> Table:
    worst = sorted(layers, key=_noise)[:_WORST_LAYERS]
    more = len(layers) - len(worst)
    title = f"\nNoisiest layers of {len(layers)}" + (", all in --json" if more else "")
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("layer", overflow="fold")
    table.add_column("spec")
    table.add_column("weight SQNR", justify="right")
    table.add_column("output SQNR", justify="right")
    for layer in worst:
        output = layer.output_sqnr_db
        table.add_row(
            layer.name,
            layer.spec,
            f"{layer.weight_sqnr_db:.1f} dB",
            "" if output is None else f"{output:.1f} dB",
        )
    return table


def _noise(layer: LayerError) -> float:
    worst = layer.weight_sqnr_db
    if layer.output_sqnr_db is not None and math.isfinite(layer.output_sqnr_db):
        worst = min(worst, layer.output_sqnr_db)
    return worst
