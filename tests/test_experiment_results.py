"""What the committed results of the experiment say is what is written about them."""

import json
from pathlib import Path

import pytest

from bench.experiment.__main__ import read_cells
from bench.experiment.summary import summarize
from bench.experiment.tables import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "experiment"


def test_report_and_page_hold_what_the_cells_give() -> None:
    cells = read_cells(RESULTS / "cells")
    summary = summarize(cells)
    written = json.loads((RESULTS / "report" / "summary.json").read_text())
    for arm, each in summary["mixing"].items():
        if arm != "verdict":
            assert written["mixing"][arm]["replicates"] == pytest.approx(each["replicates"]), arm
    assert tables(summary) in (RESULTS / "report" / "tables.md").read_text()
    page = (ROOT / "ssl_models" / "README.md").read_text()
    assert f"**Verdict: {summary['mixing']['verdict']}.**" in page
    for name, arm in (("4-bit weights", "w4"), ("noise at 15 dB", "noise15")):
        row = next(line for line in page.splitlines() if line.startswith(f"| **{name}** |"))
        each = summary["mixing"][arm]
        assert f"| **{each['mean']:+.2f}** |" in row
        assert ", ".join(f"{value:+.2f}" for value in each["replicates"]) in row


def test_all_cells_have_one_plan() -> None:
    contents = read_cells(RESULTS / "cells").values()
    assert len({json.dumps(each["plan"]) for each in contents}) == 1
