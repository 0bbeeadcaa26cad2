"""The error of each kind of layer, block by block, as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from ssl_models.error_propagation.propagate import ALL, ErrorPropagation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# a color-blind safe palette (Okabe and Ito)
COLORS = {
    "attention": "#D55E00", "feed_forward": "#0072B2", "conv": "#009E73", "rate": "#CC79A7",
    "front_end": "#8A8F98", ALL: "#22262B",
}  # fmt: skip
LABELS = {"feed_forward": "feed-forward", "front_end": "front end", "conv": "convolution"}


def draw(found: ErrorPropagation, path: Path, title: str) -> None:
    """Draw ``error_propagation``'s result as PNG, SVG or PDF, by the path's ending.

    Args:
        found: what to draw.
        path: the file, replaced if it is there.
        title: what was measured, such as the model's name and its bits.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    blocks = range(1, len(found.blocks) + 1)
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    ends = []
    for kind, error in found.kinds.items():
        values, width = error.noise_to_signal_db, 2.2 if kind == ALL else 1.4
        axes.plot(blocks, values, color=COLORS[kind], linewidth=width, marker="o", markersize=3)
        ends.append((values[-1], kind))
    axes.set_xlabel("block")
    axes.set_ylabel("error to signal, dB")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#D9DCE1", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label_ends(axes, ends, len(found.blocks))
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)


def _label_ends(axes: "Axes", ends: list[tuple[float, str]], last: int) -> None:
    """Name each line at its end, the names far enough apart to be read."""
    low, high = axes.get_ylim()
    gap, place = (high - low) / 16, -float("inf")
    for value, kind in sorted(ends):
        place = max(value, place + gap)
        label = LABELS.get(kind, kind)
        axes.annotate(
            label, (last, value), (last + 0.02 * max(last, 4), place), color=COLORS[kind],
            va="center", annotation_clip=False,
        )  # fmt: skip
