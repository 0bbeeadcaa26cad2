"""The experiment's cells: run, resumed, summarized, drawn."""

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from bench.experiment.__main__ import app, read_cells
from bench.experiment.cells import PRETRAINED, STAGES, TUNED, Cell, all_cells
from bench.experiment.grid import run_grid
from bench.experiment.models import CONFIGS
from bench.experiment.plan import Plan
from bench.experiment.record import columns
from bench.experiment.run import run_cell
from bench.experiment.summary import errors_of, summarize
from bench.experiment.tables import tables

SMALL = {
    name: dataclasses.replace(
        config, hidden_size=32, position_groups=32, feed_forward_size=64, num_layers=2,
        reduce_layer=None, recover_layer=None,
    )
    for name, config in CONFIGS.items()
}  # fmt: skip


class Here(ThreadPoolExecutor):
    """In this process, where the models are small."""

    def __init__(self, jobs: int, context: Any, **options: Any) -> None:
        super().__init__(jobs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of two speakers and read speech, of noise."""
    root = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    for name in ("digits", "speech"):
        (root / name).mkdir()
    for speaker in ("theo", "jackson"):
        for digit in range(10):
            for index in range(5):
                noise = rng.normal(0, 0.1, 1500 + 50 * digit)
                path = root / "digits" / f"{digit}_{speaker}_{index}.flac"
                soundfile.write(path, noise, 8000)
    for name in "ab":
        soundfile.write(root / "speech" / f"{name}.flac", rng.normal(0, 0.1, 12_000), 16_000)
    return root


def make_plan(folders: Path, out: Path) -> Plan:
    return Plan(
        folders / "digits", folders / "speech", out / "cells", out / "work",
        float_steps=2, qat_steps=2, strings=2, speeches=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A small model through all stages, and the three of the primary endpoint measured twice."""
    plan = make_plan(folders, tmp_path_factory.mktemp("experiment"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.experiment.models.CONFIGS", SMALL)
        for stage in (*STAGES, PRETRAINED, *TUNED):
            run_cell(Cell("SW", 0, stage), plan)
        for seed in range(2):
            for name in ("AA", "AC", "CC"):
                for stage in ("float", "ptq"):
                    run_cell(Cell(name, seed, stage), plan)
    return plan


def read(plan: Plan, cell: Cell) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(plan.path(cell).read_text())
    return content


def test_cells_are_in_order_of_importance() -> None:
    cells = list(all_cells())
    # 3 x 3 replicates and 5 models of one, five stages each; five of pre-training, three times
    assert len(cells) == len(set(cells)) == 14 * 5 + 15
    assert {cell.model for cell in cells[:18]} == {"AA", "AC", "CC"}
    assert {cell.stage for cell in cells[:28]} == {"float", "ptq"}
    assert [cells[0].speaker, Cell("T", 1, "ptq").speaker] == ["theo", "jackson"]
    for place, cell in enumerate(cells):
        assert cell.needs is None or cell.needs in cells[:place]
    assert len(list(all_cells(10))) == 8 * 10 * 5 + 50


def test_a_measured_cell_holds_everything(done: Plan) -> None:
    content = read(done, Cell("AC", 1, "ptq"))
    assert content["cell"] == {"model": "AC", "seed": 1, "stage": "ptq", "speaker": "jackson"}
    assert content["commit"]
    assert len(content["digits"]) == 3
    assert content["digits"][2] is None
    for values in content["utterances"].values():
        assert len(values) == 3
    # gains of every third utterance
    assert [value is None for value in content["utterances"]["w4/account"]] == [False, True, True]
    assert len(content["sources"]["gain"]) == len(content["kinds"]) == 8
    assert len(content["blocks"]["w4/all/nsr"]) == len(content["blocks_of"]) == 2


def test_a_trained_cell_packs_what_it_trained(done: Plan) -> None:
    for stage in ("w4a8", "w2a8", "w1a1"):
        content = read(done, Cell("SW", 0, stage))
        assert set(content["read"]) == {"float", "before convert", stage}
        assert len(content["blocks_nsr_db"]) == 2
        assert len(content["losses"]) == 1
    errors = [read(done, Cell("SW", 0, s))["blocks_nsr_db"][-1] for s in ("w4a8", "w2a8", "w1a1")]
    assert errors == sorted(errors)


def test_tuning_begins_with_what_was_pretrained(done: Plan) -> None:
    found = read(done, Cell("SW", 0, PRETRAINED))
    assert 0 <= found["accuracy"] <= 1
    assert 0 < found["majority"] < 1
    assert found["masked_frames"] > 0
    for stage in TUNED:
        content = read(done, Cell("SW", 0, stage))
        assert set(content["read"]) == {stage}
        assert len(content["read"][stage]) == len(content["digits"]) == 2
    scratch, tuned = (read(done, Cell("SW", 0, s))["losses"] for s in ("scratch", "tuned"))
    assert scratch != tuned


def test_what_is_done_is_not_done_again(done: Plan) -> None:
    path = done.path(Cell("SW", 0, "float"))
    before = path.stat().st_mtime_ns
    run_cell(Cell("SW", 0, "float"), done)
    assert path.stat().st_mtime_ns == before


def test_weights_that_are_gone_are_trained_again(done: Plan, tmp_path: Path) -> None:
    for name in ("cells", "work"):
        shutil.copytree(done.out.parent / name, tmp_path / name)
    plan = dataclasses.replace(done, out=tmp_path / "cells", work=tmp_path / "work")
    trained, cell = Cell("SW", 0, "float"), Cell("SW", 0, "w4a8")
    before, content = read(plan, cell), plan.path(trained).read_bytes()
    assert before["weights_sha256"] == read(plan, trained)["weights_sha256"]
    plan.weights(trained).unlink()
    plan.path(cell).unlink()
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.experiment.models.CONFIGS", SMALL)
        patch.setattr("bench.experiment.grid.ProcessPoolExecutor", Here)
        run_grid([trained, cell], plan, 1, 5.0, lambda each, found: said.append(each.name))
    assert said == ["SW-0-float", "SW-0-w4a8"]
    assert plan.path(trained).read_bytes() == content
    after = read(plan, cell)
    assert [after[key] for key in ("weights_sha256", "losses", "read")] == [
        before[key] for key in ("weights_sha256", "losses", "read")
    ]


def test_a_cell_says_what_it_needs(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"DN-0-ptq needs .*DN-0-float.safetensors, which DN-0-float"
    ):
        run_cell(Cell("DN", 0, "ptq"), make_plan(folders, tmp_path))


def test_grid_runs_what_is_ready_and_reports_what_failed(folders: Path, tmp_path: Path) -> None:
    plan, said = make_plan(folders, tmp_path), []
    cells = [Cell("SW", 0, "float"), Cell("none", 0, "float"), Cell("none", 0, "ptq")]
    left = run_grid(cells, plan, 1, 5.0, lambda cell, found: said.append((cell, found)))
    assert left == cells[1:]
    assert plan.path(cells[0]).exists()
    assert isinstance(dict(said)[cells[1]], ValueError)
    # nothing is begun when the time is over
    late = [Cell("SW", 1, "float")]
    assert run_grid(late, plan, 1, 0.0, lambda cell, found: None) == late


def test_summary_tables_and_pictures(done: Plan, tmp_path: Path) -> None:
    cells = read_cells(done.out)
    assert len(cells) == 5 + 5 + 12
    summary = summarize(cells)
    assert summary["replicates"] == {"primary": [0, 1], "any": [0, 1]}
    each = summary["mixing"]["w4"]
    # computed again, from the definition
    wanted = []
    for seed in range(2):
        ac, aa, cc = (
            np.array(read(done, Cell(m, seed, "ptq"))["utterances"]["w4/J(X,Y)"])
            for m in ("AC", "AA", "CC")
        )
        wanted.append(float((ac - (aa + cc) / 2).mean()))
    assert each["replicates"] == pytest.approx(wanted)
    assert summary["mixing"]["verdict"] in (
        "for",
        "against",
        "undecided",
        "conv fragile, not mixing",
    )
    assert summary["models"]["SW"]["checks"]["same_noise_twice_db"] == pytest.approx(3.01, abs=0.05)
    result = CliRunner().invoke(app, ["report", "--out", str(done.out), "--plots", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Checks of the measures" in result.output
    for name in ("mixing.png", "blocks.png", "branches.png", "word_errors.png"):
        assert (tmp_path / name).stat().st_size > 10_000, name
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["mixing"]["w4"]["mean"] == each["mean"]
    text = (tmp_path / "tables.md").read_text()
    assert f"Verdict: **{summary['mixing']['verdict']}**" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.count("|") > 4 for row in rows)
    # the descriptive models alone have no verdict
    some = {cell: content for cell, content in cells.items() if cell.model == "SW"}
    assert summarize(some)["mixing"] == {}
    assert "Verdict" not in tables(summarize(some))


def test_the_loss_of_training_in_low_bits_is_compared_among_models() -> None:
    cells: dict[Cell, dict[str, Any]] = {}
    # one word of two more is wrong in AC, none in AA, half of one in CC
    for seed in range(2):
        for model, read in (("AC", [[1, 9], [4]]), ("AA", [[1, 2], [4]]), ("CC", [[1, 2], [5]])):
            cells[Cell(model, seed, "w2a8")] = {
                "digits": [[1, 2], [4]], "read": {"float": [[1, 2], [4]], "w2a8": read}
            }  # fmt: skip
    found = summarize(cells)["trained_drop"]
    # (1/2 + 0) / 2 less the mean of 0 and (0 + 1) / 2
    assert found["w2a8"]["replicates"] == pytest.approx([0.0, 0.0])
    cells[Cell("AC", 1, "w2a8")]["read"]["w2a8"] = [[8, 9], [4]]
    found = summarize(cells)["trained_drop"]
    assert found["w2a8"]["replicates"] == pytest.approx([0.0, 0.25])
    assert set(found) == {"w2a8"}


def test_what_pretraining_is_worth_is_reported(done: Plan) -> None:
    found = summarize(read_cells(done.out))["pretraining"]["SW"]
    pretrained = read(done, Cell("SW", 0, PRETRAINED))
    assert found["accuracy"] == {"0": pretrained["accuracy"]}
    assert found["majority"] == {"0": pretrained["majority"]}
    rates = {}
    for stage in TUNED:
        content = read(done, Cell("SW", 0, stage))
        errors, words = errors_of(content["digits"], content["read"][stage])
        rates[stage] = float(errors.sum() / words.sum())
        assert found["wer"][stage] == {"0": rates[stage]}
    for bits in ("", "-w4a8"):
        change, low, high = found["change"][f"tuned{bits}"]["0"]
        assert change == pytest.approx(rates[f"tuned{bits}"] - rates[f"scratch{bits}"])
        assert low <= change <= high
    text = tables(summarize(read_cells(done.out)))
    assert f"{pretrained['accuracy']:.1%}" in text


def test_errors_are_of_strings_with_digits() -> None:
    errors, words = errors_of([[1, 2, 3], None, [4]], [[1, 3], [9], [4, 4]])
    assert errors.tolist() == [1, 1]
    assert words.tolist() == [3, 1]


def test_columns_keep_numbers_that_json_has() -> None:
    rows = [
        {"digits": (1,), "a": 1.23456789, "blocks/b": [1.0, float("-inf")], "read/x": (1, 2)},
        {"digits": None, "a": float("inf"), "blocks/b": [3.0, float("-inf")], "read/x": ()},
    ]
    found = columns(rows)
    assert found["utterances"] == {"a": [1.23457, None]}
    assert found["blocks"] == {"b": [2.0, None]}
    assert found["read"] == {"x": [[1, 2], []]}
    json.dumps(found, allow_nan=False)
