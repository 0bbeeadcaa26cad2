"""Goals as Markdown: one page a device on which every goal is reached or not."""

from pathlib import Path

from bench.case import Row
from bench.record import Record
from bench.report import case_tables

HOW = """\
Times are medians. *graph*: a CUDA graph that calls the layer once for each of several sets of
inputs and weights, so that no cache holds them; *eager*: the same calls, launched one by one;
*flushed*: a call by itself, after something else filled the L2 cache; *warm*: a graph of calls on
one set. Speed-ups and goals are those of *graph* where both sides can be captured. The floor is the
larger of operations over the rate of a large matrix product and bytes over that of a large copy,
both measured here.
"""
VERDICTS = {
    "moonshot": "**reached, and what we reach for**", "good": "**reached**", "no": "not reached",
    None: "not measured",
}  # fmt: skip


def write_page(folder: Path, records: list[Record], sitting: Row) -> Path:
    """``report.md`` of one device: goals first, then the tables, with losses and all.

    Args:
        folder: of the device's results.
        records: of this device.
        sitting: what the steps of a sitting said; empty without one.
    """
    device = records[0]["device"]
    kind = "A trial, no result" if device["slug"].endswith("-small") else "Measured"
    lines = [f"# {kind}: {device['name']} (`{device['slug']}`)", "", HOW]
    lines += _sitting(sitting) + _goals(records) + _values(records)
    for record in records:
        lines += [f"## {record['title']}", "", case_tables(record["case"], [record])]
        if (folder / f"{record['case']}.png").exists():
            lines += [f"![{record['title']}]({record['case']}.png)", ""]
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path


def _sitting(sitting: Row) -> list[str]:
    if not sitting:
        return []
    lines = ["## The sitting", "", "| step | outcome | seconds | |", "| --- | --- | ---: | --- |"]
    for name, step in sitting["steps"].items():
        note = step.get("reason", "")
        if name == "tests" and "passed" in step:
            failed = step["failed_tests"]
            note = f"{step['passed']} passed, {len(failed)} failed"
            note += "".join(f"<br>`{test}`" for test in failed)
        lines.append(f"| {name} | {step['status']} | {step.get('seconds', '')} | {note} |")
    if checked := sitting.get("sanitizer"):
        reason = checked.get("reason", "")
        lines.append(f"| compute-sanitizer | {checked['status']} | | {reason} |")
    for wheel, outcome in sitting.get("wheels", {}).items():
        lines.append(f"| {wheel} | {outcome} | | |")
    return [*lines, ""]


def _goals(records: list[Record]) -> list[str]:
    rows = [
        (record, row, goal) for record in records
        for row in record["results"] for goal in row.get("goals", [])
    ]  # fmt: skip
    if not rows:
        return []
    count = sum(goal["reached"] in ("good", "moonshot") for *_, goal in rows)
    missing = sum(goal["reached"] is None for *_, goal in rows)
    text = f"{count} of {len(rows)} goals reached, {missing} not measured."
    lines = ["## Goals", "", text, ""]
    lines += ["| case | shape | provider | against | goal | reach for | measured | |"]
    lines += ["| --- | --- | --- | --- | ---: | ---: | ---: | --- |"]
    for record, row, goal in rows:
        ratio = "" if goal["ratio"] is None else f"{goal['ratio']:.2f}x"
        peer = goal["peer"] if goal["peer"] == goal["against"] else f"{goal['against']}: "
        peer += "" if goal["peer"] == goal["against"] else goal["peer"]
        cells = [record["case"], row["point"], row["provider"], peer, f"{goal['good']:g}x"]
        cells += [f"{goal['moonshot']:g}x", ratio, VERDICTS[goal["reached"]]]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _values(records: list[Record]) -> list[str]:
    """Values with a goal: at most as much."""
    rows = [
        (record, row) for record in records if record["layout"] == "values"
        for row in record["results"] if "goal" in row
    ]  # fmt: skip
    lines = []
    for record, row in rows:
        reach = row.get("moonshot", row["goal"])
        good = row["value"] <= row["goal"]
        reached = "moonshot" if row["value"] <= reach and "moonshot" in row else "good"
        lines.append(
            f"* {record['case']}, {row['name']}: {row['value']:.3g} {row['unit']} "
            f"(at most {row['goal']:g}): {VERDICTS[reached if good else 'no']}"
        )
    return [*lines, ""] if lines else []
