"""Plots of the results, drawn from the JSON files alone."""

from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.case import Row
from bench.record import Record
from bench.report import SHORT, frames_per_second, without_time

# a color-blind safe palette (Okabe and Ito); ours stand out, the baseline recedes
OURS = ("#D55E00", "#0072B2", "#009E73", "#000000")
PEERS = ("#56B4E9", "#CC79A7", "#E69F00", "#F0E442")
BASELINE = "#8A8F98"
LEGEND_COLUMNS, PANEL_COLUMNS = 3, 2
INK, MUTED, FAINT = "#22262B", "#5B616A", "#D9DCE1"
# kinds of layers, as the profiler of a GPU tells them apart
KINDS = {
    "linear layers": "#0072B2", "attention": "#D55E00", "convolutions": "#009E73",
    "norms": "#E69F00", "activations, quantization": "#CC79A7", "copies": "#56B4E9",
    "rest": "#5B616A",
}  # fmt: skip

STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
}


def draw(record: Record, results: Path) -> Path | None:
    """Draw a record as PNG beside its JSON; None for a case of single values."""
    if record["layout"] == "values":
        return None
    with plt.rc_context(STYLE):
        figure = FIGURES[record["layout"]](record)
        path = results / record["device"]["slug"] / f"{record['case']}.png"
        figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
        plt.close(figure)
    return path


def colors(record: Record) -> dict[str, str]:
    """One color a provider, the same in every plot of the record."""
    ours, peers, chosen = cycle(OURS), cycle(PEERS), {}
    for name in dict.fromkeys(row["provider"] for row in record["results"]):
        if name == record["baseline"]:
            chosen[name] = BASELINE
        else:
            chosen[name] = next(ours if name.startswith("lowbit") else peers)
    return chosen


def _bar_colors(record: Record) -> dict[str, str]:
    """Bars are named at their side: a color only tells ours from the peers'."""
    return {
        name: BASELINE if name == record["baseline"]
        else OURS[0] if name.startswith("lowbit") else PEERS[0]
        for name in colors(record)
    }  # fmt: skip


def _timed(record: Record) -> list[Row]:
    return [row for row in record["results"] if row["status"] == "ok"]


def _title(figure: Figure, record: Record, top: float) -> None:
    device = record["device"]
    figure.text(0.0, top, record["title"], ha="left", va="bottom", size=12, weight="bold")
    subtitle = (
        f"{device['name']} ({device['slug']}), torch {record['versions']['torch']}, "
        f"commit {record['commit'][:10]}, {record['date'][:10]}"
    )
    below = top - 0.06 / figure.get_figheight()
    figure.text(0.0, below, subtitle, ha="left", va="top", size=7.5, color=MUTED)


def _footnote(figure: Figure, record: Record, top: float) -> None:
    figure.text(0.0, top, "\n".join(without_time(record)), va="top", size=7.5, color=MUTED)


def _bars(record: Record) -> Figure:
    """A row of panels a point: time with quartiles, where it goes if known, and peak memory."""
    palette, rows = _bar_colors(record), _timed(record)
    points = list(dict.fromkeys(row["point"] for row in rows))
    panel = 0.31 * len({row["provider"] for row in rows})
    kinds = [kind for kind in KINDS if any(kind in row.get("kinds", {}) for row in rows)]
    widths = (3, 2.6, 1.7) if kinds else (3, 2)
    figure, panels = plt.subplots(
        len(points), len(widths), figsize=(13 if kinds else 9, 1.3 + (panel + 0.6) * len(points)),
        squeeze=False,
        gridspec_kw={"wspace": 0.06, "hspace": 0.6 / panel, "width_ratios": widths},
    )  # fmt: skip
    for axes, point in zip(panels, points, strict=True):
        mine = [row for row in rows if row["point"] == point][::-1]
        _time_bars(axes[0], mine, palette, record["baseline"])
        if kinds:
            _kind_bars(axes[1], mine)
        _memory_bars(axes[-1], mine, palette)
        axes[0].set_title(point, loc="left", size=9.5, weight="bold")
    panels[-1][0].set_xlabel(
        f"milliseconds: median, quartiles, speed-up over {record['baseline']}", size=8
    )
    panels[-1][-1].set_xlabel("peak memory on top of the libraries, MB", size=8)
    inches, top = figure.get_figheight(), 1.15 if kinds else 0.9
    figure.subplots_adjust(left=0, right=1, top=1 - top / inches, bottom=0.4 / inches)
    if kinds:
        panels[-1][1].set_xlabel("milliseconds in kernels, by kind of layer", size=8)
        figure.legend(
            handles=[Patch(color=KINDS[kind], label=kind) for kind in kinds], loc="upper left",
            bbox_to_anchor=(0, 1 - 0.5 / inches), ncols=len(kinds), frameon=False, borderpad=0,
            handlelength=1.1, handleheight=0.9, handletextpad=0.5, borderaxespad=0, fontsize=8.5,
        )  # fmt: skip
    _title(figure, record, 1 - 0.25 / inches)
    _footnote(figure, record, -0.12 / inches)
    return figure


def _kind_bars(axes: Axes, rows: list[Row]) -> None:
    """What the kernels of a call take; the rest of its time the device waits for the host."""
    ends = []
    for y, row in enumerate(rows):
        end = 0.0
        for kind in KINDS:
            ms = 1000 * row.get("kinds", {}).get(kind, 0.0)
            axes.barh(y, ms, 0.66, end, color=KINDS[kind], edgecolor="white", linewidth=0.6)
            end += ms
        ends.append(end)
        label = f"  {end:.3g} ms   {row['launches']:,} kernels" if end else "  not measured"
        weight = "bold" if row["provider"].startswith("lowbit") else "normal"
        axes.text(end, y, label, va="center", size=8, weight=weight)
    axes.set_yticks([])
    axes.set_xlim(0, 1.45 * max(*ends, 1e-9))


def _time_bars(axes: Axes, rows: list[Row], palette: dict[str, str], baseline: str) -> None:
    ms = [1000 * row["seconds"]["median"] for row in rows]
    low = [m - 1000 * row["seconds"]["q1"] for m, row in zip(ms, rows, strict=True)]
    high = [1000 * row["seconds"]["q3"] - m for m, row in zip(ms, rows, strict=True)]
    names = [row["provider"] for row in rows]
    axes.barh(
        names, ms, height=0.66, color=[palette[name] for name in names],
        xerr=(low, high), error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
    )  # fmt: skip
    for y, (row, value, up) in enumerate(zip(rows, ms, high, strict=True)):
        note = "" if row["provider"] == baseline else f"   {row['ratio']['median']:.2f}x"
        if "frames" in row:
            note += f"   {frames_per_second(row)} frames/s"
        weight = "bold" if row["provider"].startswith("lowbit") else "normal"
        label = f"  {value:,.0f} ms{note}" if value >= 100 else f"  {value:.3g} ms{note}"
        axes.text(value + up, y, label, va="center", size=8, weight=weight)
    room = 1.5 if any("frames" in row for row in rows) else 1.3
    axes.set_xlim(0, room * max(m + h for m, h in zip(ms, high, strict=True)))
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row["provider"].startswith("lowbit") else "normal")


def _memory_bars(axes: Axes, rows: list[Row], palette: dict[str, str]) -> None:
    mb = [row.get("peak_bytes", 0) / 1e6 for row in rows]
    axes.barh(range(len(rows)), mb, height=0.66, color=[palette[r["provider"]] for r in rows])
    for y, value in enumerate(mb):
        axes.text(
            value, y, f"  {value:,.0f} MB" if value else "  not measured", va="center", size=8
        )
    axes.set_yticks([])
    axes.set_xlim(0, 1.3 * max([*mb, 1]))


def _panels(record: Record) -> Figure:
    """A panel a point: a bar a provider, the floor, and the time that each goal asks for."""
    palette, rows = _bar_colors(record), _timed(record)
    points = list(dict.fromkeys(row["point"] for row in rows))
    bars = max(sum(row["point"] == point for row in rows) for point in points)
    lines, panel = -(-len(points) // PANEL_COLUMNS), 0.24 * bars
    figure, panels = plt.subplots(
        lines, PANEL_COLUMNS, figsize=(13, 1.2 + (panel + 0.55) * lines), squeeze=False,
        gridspec_kw={"wspace": 0.5, "hspace": 0.55 / panel},
    )  # fmt: skip
    for axes, point in zip(panels.flat, points, strict=False):
        _goal_bars(axes, [row for row in rows if row["point"] == point][::-1], palette)
    for axes in panels.flat[len(points) :]:
        axes.set_visible(False)
    inches = figure.get_figheight()
    figure.subplots_adjust(left=0, right=1, top=1 - 1.0 / inches, bottom=0.3 / inches)
    figure.legend(
        handles=_panel_legend(record), loc="upper right", bbox_to_anchor=(1, 1 - 0.3 / inches),
        ncols=5, frameon=False, borderpad=0, handletextpad=0.5,
    )  # fmt: skip
    how = {row.get("mode", "wall") for row in rows}
    label = f"microseconds a call ({', '.join(sorted(how))}); speed-up over {record['baseline']}"
    figure.text(0, -0.12 / inches, f"{label}; ✓ goal reached, ✗ not", size=8, color=MUTED)
    _title(figure, record, 1 - 0.3 / inches)
    _footnote(figure, record, -0.25 / inches)
    return figure


def _goal_bars(axes: Axes, rows: list[Row], palette: dict[str, str]) -> None:
    us = {row["provider"]: 1e6 * row["seconds"]["median"] for row in rows}
    spread = [
        [us[row["provider"]] - 1e6 * row["seconds"]["q1"] for row in rows],
        [1e6 * row["seconds"]["q3"] - us[row["provider"]] for row in rows],
    ]
    axes.barh(
        list(us), us.values(), height=0.7, color=[palette[name] for name in us],
        xerr=spread, error_kw={"ecolor": INK, "elinewidth": 0.8},
    )  # fmt: skip
    for y, (row, up) in enumerate(zip(rows, spread[1], strict=True)):
        name, goals = row["provider"], row.get("goals", [])
        marks = "  ".join(SHORT[goal["reached"]] for goal in goals if goal["reached"])
        value = us[name]
        text = f"  {value:,.0f}" if value >= 100 else f"  {value:.3g}"
        text += f"   {row['ratio']['median']:.2f}x {marks}"
        weight = "bold" if name.startswith("lowbit") else "normal"
        asked = [us[g["peer"]] / g["good"] for g in goals if g["peer"] in us]
        axes.text(max([value + up, *asked]), y, text, va="center", size=7.5, weight=weight)
        axes.plot(asked, [y] * len(asked), "d", color=INK, markersize=4.5, markerfacecolor="white")
        if "floor_seconds" in row:
            floor = 1e6 * row["floor_seconds"]
            axes.plot([floor, floor], [y - 0.42, y + 0.42], color=INK, linewidth=1.6)
    ends = [value + up for value, up in zip(us.values(), spread[1], strict=True)]
    axes.set_xlim(0, 1.4 * max(ends))
    axes.set_title(f"{rows[0]['point']}   {rows[0]['origin']}", loc="left", size=9, weight="bold")
    for tick in axes.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text().startswith("lowbit") else "normal")


def _panel_legend(record: Record) -> list[Patch | Line2D]:
    handles = [Patch(color=OURS[0], label="ours"), Patch(color=PEERS[0], label="peers")]
    handles.append(Patch(color=BASELINE, label=record["baseline"]))
    if any("floor_seconds" in row for row in record["results"]):
        handles.append(Line2D([], [], color=INK, marker="|", linestyle="", label="its floor"))
    if any("goals" in row for row in record["results"]):
        handles.append(
            Line2D([], [], color=INK, marker="d", linestyle="", markerfacecolor="white",
                   label="time that a goal asks for")
        )  # fmt: skip
    return handles


def _dots(record: Record) -> Figure:
    """A line a point, a dot a provider, at its speed-up over the baseline."""
    palette, rows = colors(record), _timed(record)
    points = list(dict.fromkeys(row["point"] for row in rows))[::-1]
    names = [name for name in palette if name in {row["provider"] for row in rows}]
    legend = 0.2 * max(0, (len(names) - 2) // LEGEND_COLUMNS - 1)
    inches = 1.7 + legend + 0.33 * len(points)
    figure, axes = plt.subplots(figsize=(9, inches))
    for name in names:
        if name == record["baseline"]:
            continue
        mine = [row for row in rows if row["provider"] == name]
        x = [row["ratio"]["median"] for row in mine]
        y = [points.index(row["point"]) for row in mine]
        spread = [
            [m - row["ratio"]["q1"] for m, row in zip(x, mine, strict=True)],
            [row["ratio"]["q3"] - m for m, row in zip(x, mine, strict=True)],
        ]
        ours = name.startswith("lowbit")
        axes.errorbar(
            x, y, xerr=spread, fmt="o" if ours else "D", markersize=7 if ours else 5,
            color=palette[name], elinewidth=1.2, label=name, markeredgecolor="white", zorder=3,
        )  # fmt: skip
    axes.hlines(range(len(points)), 0, 1e3, color=FAINT, linewidth=0.5, zorder=0)
    axes.axvline(1, color=BASELINE, linewidth=1.4, zorder=1)
    axes.text(1, len(points) - 0.45, f" {record['baseline']}", size=8, color=MUTED)
    origin = {row["point"]: row["origin"] for row in rows}
    axes.set_yticks(range(len(points)), [f"{origin[p]}   {p}" for p in points])
    axes.set_ylim(-0.6, len(points) - 0.1)
    axes.set_xscale("log", base=2)
    _log_ticks(axes, [row["ratio"]["median"] for row in rows])
    axes.set_xlabel("speed-up (log scale; right of the line is faster)", size=8)
    axes.legend(
        frameon=False, ncols=LEGEND_COLUMNS, loc="lower left", bbox_to_anchor=(0, 1.0), borderpad=0,
        handletextpad=0.3,
    )  # fmt: skip
    figure.subplots_adjust(left=0, right=1, top=1 - (1.0 + legend) / inches, bottom=0)
    _title(figure, record, 1 - 0.35 / inches)
    return figure


def _log_ticks(axes: Axes, ratios: list[float]) -> None:
    ticks = [2.0**i for i in range(-6, 7)]
    low, high = min([*ratios, 1]) / 1.25, max([*ratios, 1]) * 1.25
    shown = [tick for tick in ticks if low / 1.6 <= tick <= high * 1.6]
    axes.set_xticks(shown, [f"{tick:g}x" for tick in shown])
    axes.minorticks_off()
    axes.set_xlim(low, high)


FIGURES = {"providers": _bars, "points": _dots, "goals": _panels}
