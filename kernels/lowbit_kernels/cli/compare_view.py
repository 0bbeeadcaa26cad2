"""A comparison, to read."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from lowbit_kernels.cli.compare import Comparison
from lowbit_kernels.cli.layer_errors import LayerError
from lowbit_kernels.cli.output import Outcome, results
from lowbit_kernels.cli.words import WordErrors
from lowbit_kernels.conversion.layer_names import fold_name, name_width

_WORST_LAYERS = 10
_SHOWN_TEXTS = 10


def show_comparison(found: Comparison) -> None:
    """Print the figures, the transcripts that differ, and the layers with the most noise."""
    if all("error" in file for file in found.files):
        return  # nothing was compared; what failed is said on stderr
    console = results()
    console.print(_figures(found))
    if changed := [file for file in found.files if file.get("float") != file.get("quantized")]:
        more = f", {_SHOWN_TEXTS} of {len(changed)}" if len(changed) > _SHOWN_TEXTS else ""
        console.print(f"\n[bold]Transcripts that differ[/]{more}")
        console.print(_texts(changed[:_SHOWN_TEXTS]))
    if found.layers:
        more = ", all in --json" if len(found.layers) > _WORST_LAYERS else ""
        console.print(f"\n[bold]Noisiest of {len(found.layers)} layers[/]{more}")
        console.print(_layers(found.layers, console.width))


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
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", overflow="fold", max_width=30)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for file in files:
        name = Path(file["file"]).name
        table.add_row(name, "float", Text(file["float"] or "(nothing)"))
        table.add_row("", "low-bit", Text(file["quantized"] or "(nothing)"))
    return table


def _layers(layers: tuple[LayerError, ...], width: int) -> Table:
    worst = sorted(layers, key=_noise)[:_WORST_LAYERS]
    width = name_width(width, [layer.spec for layer in worst], others=20)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("layer", overflow="fold")
    table.add_column("spec")
    table.add_column("weight\nSQNR", justify="right", no_wrap=True)
    table.add_column("output\nSQNR", justify="right", no_wrap=True)
    for layer in worst:
        output = layer.output_sqnr_db
        table.add_row(
            fold_name(layer.name, width),
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
