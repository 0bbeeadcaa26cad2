"""The experiment as pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.experiment.arms import WIDTHS
from bench.experiment.measure import NOISE_LEVELS
from bench.experiment.statistics import BAND
from ssl_models.error_propagation.measures import decibels
from ssl_models.error_propagation.plot import COLORS, LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, FAINT = "#22262B", "#5B616A", "#D9DCE1"
# a color-blind safe palette (Okabe and Ito)
MODELS = {
    "AC": "#D55E00", "AA": "#0072B2", "CC": "#009E73", "T": "#E69F00", "T-win": "#CC79A7",
    "DN": "#56B4E9", "SW": "#8A8F98", "Squeezeformer": "#22262B",
}  # fmt: skip


def draw_all(summary: Mapping[str, Any], cells: Mapping[Any, Any], folder: Path) -> list[Path]:
    """Draw every picture whose numbers there are.

    Args:
        summary: of ``summarize``.
        cells: what it was made of.
        folder: for the PNG files.

    Returns:
        Their paths.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    paths = []
    if summary["mixing"]:
        paths.append(_save(_mixing(summary["mixing"]), folder / "mixing.png"))
    if summary["models"]:
        paths.append(_save(_blocks(summary["models"]), folder / "blocks.png"))
    measured = {cell: each for cell, each in cells.items() if cell.stage == "ptq"}
    if measured:
        paths.append(_save(_branches(measured), folder / "branches.png"))
    if summary["read"]:
        paths.append(_save(_read(summary["read"]), folder / "word_errors.png"))
    return paths


def _mixing(found: Mapping[str, Any]) -> Any:
    """M of each width and level of noise: its replicates, mean and interval."""
    figure, axes = _figure(6.4, 3.4)
    names = [*(f"w{bits}" for bits in WIDTHS), *(f"noise{level}" for level in NOISE_LEVELS)]
    axes.axvspan(-BAND, BAND, color=FAINT, alpha=0.6, linewidth=0)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for row, name in enumerate(reversed(names)):
        each, strong = found[name], "verdict" in found[name]
        color = MODELS["AC"] if strong else MUTED
        axes.plot(each["bootstrap_interval"], [row] * 2, color=color, linewidth=4, alpha=0.35)
        axes.plot(each["t_interval"], [row] * 2, color=color, linewidth=1.2)
        axes.plot(each["replicates"], [row] * len(each["replicates"]), "o", color=color, ms=3.5)
        axes.plot([each["mean"]], [row], "D", color=color, ms=6)
    axes.set_yticks(range(len(names)), [_label(name) for name in reversed(names)])
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_xlabel(
        "M, dB: how much more than independently errors of attention and\n"
        "convolution add up, against the mean of the two controls"
    )
    _title(axes, "Errors of unlike modules: replicates, mean, t and bootstrap intervals")
    return figure


def _label(name: str) -> str:
    return f"noise at {name[5:]} dB" if name.startswith("noise") else f"{name[1:]}-bit weights"


def _blocks(models: Mapping[str, Any]) -> Any:
    """Error to signal after each block, a panel a width."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(WIDTHS), figsize=(9.6, 3.2), sharey=False)
    for axes, bits in zip(panels, WIDTHS, strict=True):
        for name, each in ((name, models[name]) for name in MODELS if name in models):
            values = each[f"w{bits}"]["blocks_nsr_db"]
            places = [(i + 1) / len(values) for i in range(len(values))]
            axes.plot(places, values, color=MODELS[name], marker="o", ms=2.5, lw=1.4, label=name)
        _title(axes, f"{bits}-bit weights, 8-bit inputs")
        _plain(axes)
        axes.set_xlabel("depth")
    panels[0].set_ylabel("error to signal, dB")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="lower center",
        ncols=len(models),
        frameon=False,
        fontsize=8.5,
        bbox_to_anchor=(0.5, -0.1),
    )
    return figure


def _branches(cells: Mapping[Any, Any]) -> Any:
    """Own error and gain of each branch of AC, AA and CC at 4 bits."""
    import matplotlib.pyplot as plt

    names = [name for name in ("AC", "AA", "CC") if any(cell.model == name for cell in cells)]
    figure, panels = plt.subplots(
        1, max(len(names), 1), figsize=(9.6, 3.2), sharey=True, sharex=True, squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        own = [each for cell, each in cells.items() if cell.model == name]
        for kind in dict.fromkeys(own[0]["kinds"]):
            points = [point for each in own for point in _points(each, kind)]
            axes.plot(
                *zip(*points, strict=True),
                "o",
                color=COLORS[kind],
                ms=4,
                alpha=0.8,
                label=LABELS.get(kind, kind),
            )
        _title(axes, name)
        _plain(axes)
        axes.set_xlabel("own error to signal, dB")
    panels[0][0].set_ylabel("gain to the last block, dB")
    handles = {
        label: h
        for axes in panels[0]
        for h, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        bbox_to_anchor=(0.5, -0.1),
    )
    return figure


def _points(content: Mapping[str, Any], kind: str) -> list[tuple[float, float]]:
    sources = content["sources"]
    rows = zip(content["kinds"], sources["w4/local"], sources["gain"], strict=True)
    return [(decibels(local), decibels(gain)) for each, local, gain in rows if each == kind]


def _read(read: Mapping[str, Any]) -> Any:
    """Word error rates of every model and seed."""
    figure, axes = _figure(7.2, 3.6)
    stages = [
        stage
        for stage in ("float", "w8", "w4", "w2", "w4a8", "w2a8", "w1a1")
        if any(stage in seed for model in read.values() for seed in model.values())
    ]
    step = 0.8 / max(len(read), 1)
    for index, (name, seeds) in enumerate((n, read[n]) for n in MODELS if n in read):
        for place, stage in enumerate(stages):
            values = _rates(seeds.values(), stage)
            x = place - 0.4 + step * (index + 0.5)
            axes.plot(
                [x] * len(values),
                values,
                "o",
                color=MODELS[name],
                ms=4,
                label=name if place == 0 else None,
            )
    axes.set_xticks(range(len(stages)), [_stage(stage) for stage in stages])
    axes.set_ylabel("word error rate")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.legend(
        frameon=False,
        ncols=len(read),
        loc="lower center",
        bbox_to_anchor=(0.5, -0.28),
        fontsize=8.5,
        columnspacing=1.2,
    )
    _title(axes, "Digits of a speaker never heard, one dot a replicate")
    return figure


def _rates(seeds: Any, stage: str) -> list[float]:
    found = (seed[stage] for seed in seeds if stage in seed)
    return [each if isinstance(each, float) else each["wer"] for each in found]


def _stage(stage: str) -> str:
    return f"{stage}\ntrained" if "a" in stage[1:] and stage != "float" else stage


def _figure(width: float, height: float) -> tuple[Any, "Axes"]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height))
    _plain(axes)
    return figure, axes


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_fontsize(9)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)


def _title(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9.5, color=INK)


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)
    return path
