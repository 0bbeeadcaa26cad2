"""Markdown tables for README, from the JSON files alone.

Between ``<!-- bench:CASE -->`` and ``<!-- /bench -->`` README holds the tables of a case, one a
device; ``<!-- bench:CASE POINT -->`` those of one point. ``write_report`` rewrites these blocks;
``stale_blocks`` says which of them no JSON gives.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from bench.case import Row
from bench.record import RESULTS, ROOT, Record, read_all

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- bench:(\w+)(?: ([^\n]+))? -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
# whether a goal was reached: and what we reach for, yes, no, not measured
SHORT = {"moonshot": "✓✓", "good": "✓", "no": "✗", None: "-"}
REQUIRED = ("commit", "device", "command", "date", "versions")


class ReportError(ValueError):
    """A table that cannot be made from the results there are."""


def write_report(results: Path = RESULTS, readme: Path | None = None) -> list[Path]:
    """Draw the plots, write a page of each device with goals, and rewrite README's blocks in place.

    Args:
        results: folder of the JSON files, or of an unpacked sitting.
        readme: None: README where ``results`` is where the committed results are, else nothing.

    Returns:
        The files written.

    Raises:
        ReportError: if README asks for a case that has no result.
    """
    # needed for reports alone, and slow to import
    from bench.goals import write_page
    from bench.plot import draw

    records = read_all(results)
    if not records:
        raise ReportError(f"no results under {results}: run python -m bench all")
    written = [path for record in records if (path := draw(record, results)) is not None]
    state = results / "sitting.json"
    sitting = json.loads(state.read_text()) if state.exists() else {}
    for slug in sorted({record["device"]["slug"] for record in records}):
        mine = [record for record in records if record["device"]["slug"] == slug]
        if any(record["layout"] == "goals" for record in mine):
            written.append(write_page(results / slug, mine, sitting))
    if readme is None and results.resolve() != RESULTS:
        return written
    readme = readme or README
    text = readme.read_text()
    fresh = BLOCK.sub(lambda m: m[1] + case_tables(m[2], records, results, m[3]) + m[5], text)
    if fresh != text:
        # renamed whole, so that a kill leaves a README
        scratch = readme.with_suffix(".md.new")
        scratch.write_text(fresh)
        os.replace(scratch, readme)
        written.append(readme)
    return written


def stale_blocks(text: str, results: Path = RESULTS) -> list[str]:
    """What is wrong with each block of ``text`` that holds anything else than the JSON files give.

    An empty block, waiting for its first measurement, is not wrong.
    """
    records = read_all(results)
    problems = []
    for _, name, point, body, _ in BLOCK.findall(text):
        if not body.strip():
            continue
        try:
            if case_tables(name, records, results, point or None) != body:
                problems.append(f"{name}: differs from the JSON; run python -m bench report")
        except ReportError as error:
            problems.append(str(error))
    return problems


def case_tables(
    name: str, records: list[Record], results: Path = RESULTS, point: str | None = None
) -> str:
    """The tables of a case, or of one point of it, one for each device it was run on.

    Raises:
        ReportError: if there is no such result.
    """
    chosen = [record for record in records if record["case"] == name]
    if not chosen:
        raise ReportError(f"{name}: no result under {results}; run python -m bench {name}")
    if point is not None:
        chosen = [_only(record, point) for record in chosen]
    return "\n".join(_table(record) for record in chosen)


def _only(record: Record, point: str) -> Record:
    rows = [row for row in record["results"] if row.get("point") == point]
    if not rows:
        raise ReportError(f"{record['case']}: no point {point!r} in the JSON")
    return record | {"results": rows}


def _table(record: Record) -> str:
    if absent := [field for field in REQUIRED if not record.get(field)]:
        raise ReportError(f"{record['case']}: the JSON has no {', '.join(absent)}")
    rows = LAYOUTS[record["layout"]](record)
    head, *body = [f"| {' | '.join(cells)} |" for cells in rows]
    # names to the left, numbers to the right
    names = {"values": 1, "goals": 3}.get(record["layout"], 2)
    rule = "| " + " | ".join(["---"] * names + ["---:"] * (len(rows[0]) - names)) + " |"
    return "\n".join([head, rule, *body, "", _caption(record), ""])


def _caption(record: Record) -> str:
    device, versions = record["device"], record["versions"]
    parts = [f"{record['title']}. {device['name']} (`{device['slug']}`)"]
    parts.append(f"torch {versions['torch']}")
    parts.append(
        f"commit `{record['commit'][:10]}{'-dirty' * record['commit'].endswith('-dirty')}`"
    )
    parts.append(f"{record['date'][:10]}")
    path = f"bench/results/{device['slug']}/{record['case']}.json"
    caption = f"{', '.join(parts)}: `{record['command']}` ([JSON]({path}))."
    left = [f"Not run yet: {', '.join(record['left_out'])}."] if "left_out" in record else []
    left += [f"No result at {name}: {why}." for name, why in record.get("broken", {}).items()]
    return " ".join([caption, *without_time(record), *left])


def without_time(record: Record) -> list[str]:
    """A sentence for each provider that has no time at any point, and why."""
    rows = record["results"] if record["layout"] != "values" else []
    timed = {row["provider"] for row in rows if row["status"] == "ok"}
    why = {
        row["provider"]: f"{row['status']} ({row['reason']})"
        for row in rows
        if row["provider"] not in timed
    }
    return [f"No time for {name}: {reason}." for name, reason in why.items()]


def _providers(record: Record) -> list[list[str]]:
    """A row a provider and point; those that never ran are named in the caption."""
    timed = {row["provider"] for row in record["results"] if row["status"] == "ok"}
    rows = [row for row in record["results"] if row["provider"] in timed]
    against = {"error_vs_float32": "float32"} if _any("error_vs_float32", rows) else {}
    names = {"frames": "frames/s", "ratio": "speed-up", "launches": "launches"}
    names |= {"peak_bytes": "peak memory", "weight_bytes": "weights"}
    names |= against or {"error_vs_baseline": record["baseline"]}
    fields = [f for f in names if f not in ("frames", "launches") or _any(f, rows)]
    head = ["", "provider", "median (quartiles)"]
    head += [f"error against {names[f]}" if f.startswith("error") else names[f] for f in fields]
    return [head, *([row["point"], row["provider"], *_measured(row, fields)] for row in rows)]


def _any(field: str, rows: list[Row]) -> bool:
    return any(field in row for row in rows)


def frames_per_second(row: Row) -> str:
    """Of a row that says how many frames a call makes."""
    return f"{row['frames'] / row['seconds']['median']:,.0f}"


def _measured(row: Row, fields: list[str]) -> list[str]:
    if row["status"] != "ok":
        return [f"{row['status']}: {row['reason']}", *[""] * len(fields)]
    weights = megabytes(row["weight_bytes"])
    if resident := row.get("resident_bytes"):
        weights += f" stored, {megabytes(resident)} in use"
    error = row.get("error_vs_float32", row.get("error_vs_baseline"))
    cells = {
        "frames": frames_per_second(row) if "frames" in row else "",
        "ratio": f"{row['ratio']['median']:.2f}x",
        "launches": f"{row.get('launches', '')}",
        "peak_bytes": megabytes(row["peak_bytes"]) if "peak_bytes" in row else "",
        "weight_bytes": weights,
    }
    return [
        f"{milliseconds(row['seconds']['median'])} "
        f"({milliseconds(row['seconds']['q1'], '')} to {milliseconds(row['seconds']['q3'], '')})",
        *(cells.get(field, "" if error is None else percent(error)) for field in fields),
    ]


def _points(record: Record) -> list[list[str]]:
    """A row a point: the baseline's time, and the others' speed-up over it."""
    baseline = record["baseline"]
    names = list(dict.fromkeys(row["provider"] for row in record["results"]))
    others = [name for name in names if name != baseline]
    points: dict[str, dict[str, Row]] = {}
    for row in record["results"]:
        points.setdefault(row["point"], {})[row["provider"]] = row
    rows = [["shape", "layer", baseline, *others]]
    for point, by_name in points.items():
        base = by_name[baseline]
        cells = [point, base["origin"], milliseconds(base["seconds"]["median"])]
        rows.append(cells + [_ratio(by_name[name]) for name in others])
    return rows


def _ratio(row: Row) -> str:
    return f"{row['ratio']['median']:.2f}x" if row["status"] == "ok" else row["status"]


def _values(record: Record) -> list[list[str]]:
    rows = [["", "value", "goal"]]
    for row in record["results"]:
        goal = f"at most {_value(row['goal'], row['unit'])}" if "goal" in row else ""
        if "moonshot" in row:
            goal += f", reach for {_value(row['moonshot'], row['unit'])}"
        rows.append([row["name"], _value(row["value"], row["unit"]), goal])
    return rows


def _value(value: float, unit: str) -> str:
    if unit == "bytes":
        return megabytes(value)
    return f"{value:.3g} {unit}".rstrip()


def microseconds(seconds: float) -> str:
    """Seconds as microseconds with three digits."""
    us = 1e6 * seconds
    return f"{us:,.0f}" if us >= 100 else f"{us:.3g}"


def _goals(record: Record) -> list[list[str]]:
    """A row a point and provider: every way it was timed, its floor, its goals."""
    modes = list(dict.fromkeys(m for row in record["results"] for m in row.get("modes", {})))
    head = ["shape", "provider", "backend", *([f"{mode}, us" for mode in modes] or ["time, us"])]
    rows = [[*head, "floor, us", "of the floor", f"speed-up over {record['baseline']}", "goals"]]
    for row in record["results"]:
        if row["status"] == "ok":
            times = [row["modes"].get(mode) for mode in modes] if modes else [row["seconds"]]
            cells = [row["point"], row["provider"], row.get("backend", "")]
            cells += ["not captured" if t is None else microseconds(t["median"]) for t in times]
            floor, share = row.get("floor_seconds"), row.get("roofline_share")
            cells.append("" if floor is None else microseconds(floor))
            cells.append("" if share is None else f"{100 * share:.0f} %")
            cells.append(f"{row['ratio']['median']:.2f}x")
            rows.append([*cells, "; ".join(map(_goal, row.get("goals", [])))])
        elif row["status"] in ("wrong", "failed"):
            blank = [""] * (len(modes or ["us"]) + 3)
            rows.append([row["point"], row["provider"], "", *blank, f"{row['status']}"])
    return rows


def _goal(goal: Row) -> str:
    ratio = "" if goal["ratio"] is None else f", is {goal['ratio']:.2f}x"
    return f"{SHORT[goal['reached']]} {goal['good']:g}x {goal['against']}{ratio}"


LAYOUTS: dict[str, Callable[[Record], list[list[str]]]] = {
    "goals": _goals,
    "providers": _providers,
    "points": _points,
    "values": _values,
}


def milliseconds(seconds: float, unit: str = " ms") -> str:
    """Seconds as milliseconds with three digits."""
    ms = 1000 * seconds
    return (f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}") + unit


def megabytes(count: float) -> str:
    """Bytes as megabytes with three digits."""
    mb = count / 1e6
    return f"{mb:.0f} MB" if mb >= 100 else f"{mb:.3g} MB"


def percent(fraction: float) -> str:
    """A relative error in percent with two digits."""
    return f"{100 * fraction:.2g} %"
