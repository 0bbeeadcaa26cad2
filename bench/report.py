"""Markdown tables for README, from the JSON files alone.

Between ``<!-- bench:CASE -->`` and ``<!-- /bench -->`` README holds the tables of a case, one a
device; ``<!-- bench:CASE POINT -->`` those of one point. ``write_report`` rewrites these blocks;
``stale_blocks`` says which of them no JSON gives.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from bench.harness import Row
from bench.record import RESULTS, ROOT, Record, read_all

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- bench:(\w+)(?: ([^\n]+))? -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
REQUIRED = ("commit", "device", "command", "date", "versions")


class ReportError(ValueError):
    """A table that cannot be made from the results there are."""


def write_report(results: Path = RESULTS, readme: Path = README) -> list[Path]:
    """Draw the plots and rewrite README's blocks in place.

    Returns:
        The files written.

    Raises:
        ReportError: if README asks for a case that has no result.
    """
    # needed for reports alone, and slow to import
    from bench.plot import draw

    records = read_all(results)
    if not records:
        raise ReportError(f"no results under {results}: run python -m bench all")
    text = readme.read_text()
    fresh = BLOCK.sub(lambda m: m[1] + case_tables(m[2], records, results, m[3]) + m[5], text)
    written = [path for record in records if (path := draw(record, results)) is not None]
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
    names = 1 if record["layout"] == "values" else 2
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
    return " ".join([caption, *without_time(record)])


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
    head = ["", "provider", "median (quartiles)", "speed-up", "peak memory", "weights"]
    return [[*head, f"error against {record['baseline']}"]] + [
        [row["point"], row["provider"], *_measured(row)]
        for row in record["results"]
        if row["provider"] in timed
    ]


def _measured(row: Row) -> list[str]:
    if row["status"] != "ok":
        return [f"{row['status']}: {row['reason']}", "", "", "", ""]
    weights = megabytes(row["weight_bytes"])
    if resident := row.get("resident_bytes"):
        weights += f" stored, {megabytes(resident)} in use"
    error = row.get("error_vs_baseline")
    return [
        f"{milliseconds(row['seconds']['median'])} "
        f"({milliseconds(row['seconds']['q1'], '')} to {milliseconds(row['seconds']['q3'], '')})",
        f"{row['ratio']['median']:.2f}x",
        megabytes(row["peak_bytes"]) if "peak_bytes" in row else "",
        weights,
        "" if error is None else percent(error),
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
        rows.append([row["name"], _value(row["value"], row["unit"]), goal])
    return rows


def _value(value: float, unit: str) -> str:
    if unit == "bytes":
        return megabytes(value)
    return f"{value:.3g} {unit}".rstrip()


LAYOUTS: dict[str, Callable[[Record], list[list[str]]]] = {
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
