"""The bench: no time without a right result, no table without its JSON, and README agrees."""

import copy
import json
import math
import re
import struct
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import plot, record, report
from bench.case import Case, Point, Prepared, Provider, ValueCase
from bench.cases import CASES, checkpoint_bytes, conv1d_cpu, encoder_cpu, import_time, linear_cpu
from bench.errors import float32_error, int8_input_error
from bench.harness import relative_error, run_case
from bench.memory import peak_memory
from bench.shapes import CONV1D, frames_out
from bench.timing import MAX_ROUNDS, MIN_ROUNDS, Sampler, Spread, time_side_by_side
from tests.bench_cases import (
    CONV_POINTS,
    ENCODER_POINT,
    LINEAR_POINT,
    broken,
    constant,
    rows_of,
    tiny_wav2vec2,
    toy_case,
)


@pytest.fixture(autouse=True)
def _quick_samples(monkeypatch):
    monkeypatch.setattr("bench.timing.SAMPLE_SECONDS", 0.0)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_cases_are_well_formed(case):
    assert CASES[case.name] is case
    assert case.layout in report.LAYOUTS
    if isinstance(case, ValueCase):
        return
    for names in ([p.name for p in case.points], [p.name for p in case.providers]):
        assert len(set(names)) == len(names)
    assert case.baseline in [provider.name for provider in case.providers]
    assert all(point.origin for point in case.points)
    assert not case.provider(case.baseline).needs
    if case.layout == "points":
        assert all(case.cost(p, 2).bytes < case.cost(p, 4).bytes for p in case.points)
        assert all(case.cost(p, 2).flops > 0 for p in case.points)


def test_a_wrong_result_gets_no_time():
    rows = rows_of(
        toy_case(
            Provider("right", constant(1.0 + 1e-7)),
            Provider("wrong", constant(1.1)),
            Provider("nan", constant(math.nan)),
            Provider("shape", lambda x: Prepared(lambda: x[1:], 1.0)),
            Provider("broken", broken),
        )
    )
    assert rows["right"]["status"] == rows["float32"]["status"] == "ok"
    for name in ("wrong", "nan", "shape"):
        assert rows[name]["status"] == "wrong"
    assert rows["wrong"]["error"] == pytest.approx(0.1)
    assert rows["wrong"]["reason"] == "relative error 1.00e-01, allowed 1.00e-06"
    assert rows["broken"]["reason"] == "RuntimeError: no such kernel"
    timed = {name for name, row in rows.items() if "seconds" in row or "ratio" in row}
    assert timed == {"float32", "right"}


def test_a_provider_is_checked_against_what_it_must_compute():
    twice = constant(2.0, expected=lambda: torch.full((3, 4), 2.0))
    row = rows_of(toy_case(Provider("twice", twice)))["twice"]
    assert (row["status"], row["error"], row["error_vs_baseline"]) == ("ok", 0.0, 1.0)


def test_a_case_without_a_right_baseline_stops():
    case = toy_case()
    bad = Case(**{**vars(case), "providers": (Provider("float32", constant(math.nan)),)})
    with pytest.raises(RuntimeError, match="the baseline failed"):
        run_case(bad, 0.0)


def test_missing_and_slow_providers_are_listed():
    case = toy_case(
        Provider("peer", broken, needs={"no_such_module": "no-such-package", "torch": "torch"}),
        Provider("compiled", constant(1.0), slow=True),
    )
    rows = rows_of(case)
    assert rows["peer"]["status"] == "missing"
    assert rows["peer"]["reason"] == "pip install no-such-package"
    assert rows["compiled"]["status"] == "skipped"
    assert rows_of(case, slow=True)["compiled"]["status"] == "ok"


def test_rates_come_from_cost_and_time():
    row = rows_of(toy_case(Provider("other", constant(1.0))))["other"]
    seconds = row["seconds"]["median"]
    assert row["seconds"]["q1"] <= seconds <= row["seconds"]["q3"]
    assert row["gflop_per_s"] == pytest.approx(1000 / seconds / 1e9)
    assert row["gb_per_s"] == pytest.approx((92 + 8) / seconds / 1e9)
    assert MIN_ROUNDS <= row["seconds"]["rounds"] <= MAX_ROUNDS


def test_points_without_time_are_left_out():
    points = tuple(Point(name, {"M": 1, "K": 2}, "a toy") for name in "abc")
    done = run_case(replace(toy_case(), points=points), 0.0)
    assert {row["point"] for row in done["results"]} == {"a"}
    assert done["left_out"] == ["b", "c"]


def test_a_broken_point_keeps_the_others():
    asked = []

    def make_inputs(point, device, dtype):
        asked.append(point.name)
        return broken(0) if asked[-1] == "b" else torch.ones(1, 2)

    points = tuple(Point(name, {"M": 1, "K": 2}, "a toy") for name in "abc")
    done = run_case(replace(toy_case(), points=points, make_inputs=make_inputs), 0.3)
    assert asked == ["a", "b", "c"]
    assert {row["point"] for row in done["results"]} == {"a", "c"}
    assert done["broken"]["b"].startswith("no such kernel")


def test_a_ratio_above_one_is_faster(monkeypatch):
    samples = {"float32": [2.0, 4.0, 2.0], "other": [1.0, 2.0, 4.0]}
    monkeypatch.setattr("bench.harness.time_side_by_side", lambda *args: samples)
    rows = rows_of(toy_case(Provider("other", constant(1.0))))
    # round by round, so the slow round of both does not count
    assert rows["other"]["ratio"]["median"] == 2.0
    assert rows["float32"]["ratio"]["median"] == 1.0
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_facts_and_probes_reach_the_record():
    case = toy_case(
        Provider("other", constant(1.0, facts=lambda: {"resident_bytes": 7})),
        probe=lambda point, provider: {"peak_bytes": len(provider.name)},
    )
    row = rows_of(case)["other"]
    assert (row["resident_bytes"], row["peak_bytes"]) == (7, 5)
    row = rows_of(toy_case(probe=lambda point, provider: broken(point)))["float32"]
    assert "no such kernel" in row["probe_failed"]
    assert row["seconds"]


def test_providers_take_turns():
    order = []

    class Recorder:
        def seconds(self, call, repeats):
            call()
            return {"a": 1.0, "b": 2.0, "c": 3.0}[order[-1]]

    samplers = {name: Sampler(Recorder(), lambda name=name: order.append(name)) for name in "abc"}
    samples = time_side_by_side(samplers, end=0.0)
    turns = "".join(order[6:])  # after two warm-up calls each
    assert turns.startswith("abcbcacab")
    assert len(turns) == 3 * MIN_ROUNDS
    assert samples["b"] == [2.0] * MIN_ROUNDS


def test_error_bounds_let_rounding_pass_and_nothing_else():
    x, w = torch.randn(50, 96), torch.randn(32, 96)
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = (x / step).round() * step
    exact, bound = x.double() @ w.double().T, int8_input_error(x, 1)
    assert relative_error(rounded @ w.T, exact) <= bound
    assert relative_error(x @ w.T, exact) <= float32_error(96)
    # a scale a little off, one dropped feature of 96, four bits for eight
    assert relative_error(1.02 * x @ w.T, exact) > bound
    assert relative_error(x[:, 1:] @ w[:, 1:].T, exact) > bound
    assert relative_error((x / step / 16).round() * step * 16 @ w.T, exact) > bound


@pytest.mark.parametrize(
    ("case", "point"),
    [
        pytest.param(linear_cpu.LINEAR_CPU, LINEAR_POINT, id="linear"),
        *(pytest.param(conv1d_cpu.CONV1D_CPU, point, id=point.name) for point in CONV_POINTS),
    ],
)
def test_every_provider_of_the_layer_cases_is_right(case, point):
    rows = rows_of(Case(**{**vars(case), "points": (point,)}))
    problems = {name: row.get("reason") for name, row in rows.items() if row["status"] != "ok"}
    assert not problems


@pytest.fixture
def tiny_encoder(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(encoder_cpu, "float32_model", tiny_wav2vec2)
    return tiny_wav2vec2


def test_every_provider_of_the_encoder_case_is_right(tiny_encoder):
    case = encoder_cpu.ENCODER_CPU
    # the peers' exporters take a minute: they are run by the bench alone
    providers = tuple(p for p in case.providers if not p.needs)
    changes = {"points": (ENCODER_POINT,), "probe": None, "providers": providers}
    rows = rows_of(Case(**{**vars(case), **changes}))
    skipped = {name for name, row in rows.items() if row["status"] == "skipped"}
    assert skipped == {"float32 torch.compile"}
    assert {row["status"] for name, row in rows.items() if name not in skipped} == {"ok"}
    fast, small = rows["lowbit fast()"], rows["lowbit small()"]
    # fast() stores input offsets too
    assert small["weight_bytes"] < fast["weight_bytes"] < rows["float32 eager"]["weight_bytes"]
    assert fast["resident_bytes"] >= fast["weight_bytes"]
    assert small["error"] < fast["error"]


def test_values_have_units_and_goals(tiny_encoder, monkeypatch):
    monkeypatch.setattr(checkpoint_bytes, "float32_model", tiny_encoder)
    before, after, ratio = checkpoint_bytes.measure()
    assert ratio["value"] == after["value"] / before["value"] < 1
    assert ratio["goal"] == 0.16
    monkeypatch.setattr(import_time, "ROUNDS", 1)
    torch_row, ours = import_time.measure()
    assert 0 < ours["value"] < torch_row["value"]
    assert (ours["unit"], ours["goal"], ours["rounds"]) == ("ms", 50, 1)


def test_the_encoder_check_sees_a_swapped_scale(tiny_encoder):
    model = tiny_encoder()
    audio = torch.randn(1, 1600)
    prepared = encoder_cpu.ours(
        audio, encoder_cpu.QuantConfig.small(), encoder_cpu.FLOAT_ERROR[audio.dtype]
    )
    expected = prepared.expected()
    twin = copy.deepcopy(model)
    encoder_cpu.quantize(twin, encoder_cpu.QuantConfig.small())
    layer = twin.encoder.layers[0].feed_forward.intermediate_dense
    layer.scale.copy_(layer.scale.flip(0))
    assert relative_error(twin(audio).last_hidden_state, expected) > prepared.max_error


def test_the_front_end_has_the_frames_of_ten_seconds():
    assert [frames_out(point.sizes) for point in CONV1D[:7]][-1] == 499


def test_peak_memory_holds_at_least_the_layer():
    row = peak_memory("linear_cpu", "499x512x768", "float32")
    assert row["peak_bytes"] >= 4 * (499 * 512 + 512 * 768 + 499 * 768)


def test_a_record_says_where_it_comes_from():
    about = record.environment("cpu", 2, "python -m bench toy")
    assert re.fullmatch(r"cpu-[a-z0-9-]+-2t", about["device"]["slug"])
    assert about["versions"].keys() == {"python", *record.PACKAGES}
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", about["commit"])
    assert all(about[field] for field in report.REQUIRED)


def test_a_copy_without_git_is_told_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit() == "unknown"
    monkeypatch.setenv("BENCH_COMMIT", "0" * 40)
    assert record.commit() == "0" * 40


def test_the_command_line_lists_runs_and_refuses(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "CASES", {"toy": toy_case(Provider("right", constant(1.0)))})
    arguments = ["toy", "--minutes", "0.001", "--threads", "1", "--results", str(tmp_path)]
    assert command.main(["list"]) == 0
    assert "toy: A toy (cpu)" in capsys.readouterr().out
    assert command.main(arguments) == 0
    [written] = tmp_path.glob("*/toy.json")
    saved = json.loads(written.read_text())
    # where it was written is nobody's business
    assert saved["command"] == "python -m bench toy --minutes 0.001 --threads 1"
    assert command.without_results(["a", "--results=x", "b"]) == ["a", "b"]
    assert [row["provider"] for row in saved["results"]] == ["float32", "right"]
    assert command.main(["nothing"]) == 2
    said = capsys.readouterr().err
    assert "CASE must be one of list, report, static, sitting, tune, compile, all, toy" in said
    assert command.main(["toy", "--minutes", "0"]) == 2


@pytest.fixture
def results(tmp_path):
    """Results of a case in each layout, in a folder of their own."""
    ours = Provider("lowbit a", constant(1.0))
    value = {"name": "n", "value": 0.131, "unit": "", "goal": 0.16}
    cases = [
        toy_case(ours, Provider("peer", broken, needs={"no_x": "x"})),
        toy_case(ours, Provider("bad", constant(2.0))),
        ValueCase("size", "Sizes", lambda: [value]),
    ]  # fmt: skip
    about = record.environment("cpu", 1, "python -m bench all")
    for case, name, layout in zip(
        cases, ("bars", "dots", "size"), ("providers", "points", "values"), strict=True
    ):
        done = run_case(case, 0.0) | {"case": name, "layout": layout}
        record.write(done | about, tmp_path / "results")
    return tmp_path / "results"


MARKED = "# Title\n<!-- bench:{} -->\nold 3.9x\n<!-- /bench -->\nThe end.\n"


@pytest.mark.parametrize("name", ["bars", "dots", "size"])
def test_report_rewrites_the_marked_tables_alone(results, tmp_path, name):
    readme = tmp_path / "README.md"
    readme.write_text(MARKED.format(name))
    assert report.stale_blocks(readme.read_text(), results)
    assert readme in report.write_report(results, readme)
    text = readme.read_text()
    assert text.startswith(f"# Title\n<!-- bench:{name} -->\n|")
    assert text.endswith("<!-- /bench -->\nThe end.\n")
    assert "old" not in text
    assert report.stale_blocks(text, results) == []
    # a second run has nothing to do
    assert readme not in report.write_report(results, readme)


def test_an_edited_number_is_stale(results):
    text = "<!-- bench:size -->\n" + report.case_tables("size", record.read_all(results), results)
    text += "<!-- /bench -->"
    assert report.stale_blocks(text, results) == []
    [problem] = report.stale_blocks(text.replace("0.131", "0.113"), results)
    assert "differs from the JSON" in problem


def test_tables_need_a_whole_result(results, tmp_path):
    [problem] = report.stale_blocks(MARKED.format("nothing"), results)
    assert problem.startswith("nothing: no result under")
    [path] = results.glob("*/size.json")
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in saved.items() if k != "command"}))
    [problem] = report.stale_blocks(MARKED.format("size"), results)
    assert problem == "size: the JSON has no command"
    with pytest.raises(report.ReportError, match="no results under"):
        report.write_report(tmp_path / "empty", tmp_path / "README.md")


def test_a_marker_may_name_one_point(results):
    records = record.read_all(results)
    text = "<!-- bench:bars 3x4 -->\n" + report.case_tables("bars", records, results, "3x4")
    assert report.stale_blocks(text + "<!-- /bench -->", results) == []
    [problem] = report.stale_blocks("<!-- bench:bars 9x9 -->\n1.0x\n<!-- /bench -->", results)
    assert problem == "bars: no point '9x9' in the JSON"


def test_an_empty_block_waits(results):
    assert report.stale_blocks("<!-- bench:nothing -->\n<!-- /bench -->", results) == []


def test_who_got_no_time_is_named(results):
    records = record.read_all(results)
    bars = report.case_tables("bars", records, results)
    assert "No time for peer: missing (pip install x)." in bars
    dots = report.case_tables("dots", records, results)
    assert "| wrong |" in dots
    assert "No time for bad: wrong (relative error 1.00e+00" in dots


def test_plots_are_drawn_for_comparisons_only(results):
    for saved in record.read_all(results):
        path = plot.draw(saved, results)
        if saved["layout"] == "values":
            assert path is None
            continue
        header = path.read_bytes()[:24]
        width, height = struct.unpack(">II", header[16:24])
        assert header[:4] == b"\x89PNG"
        assert min(width, height) > 200


def test_every_number_in_the_marked_tables_of_the_readme_has_its_json():
    text = report.README.read_text()
    assert report.stale_blocks(text) == []
    blocks = report.BLOCK.findall(text)
    cited = {name for _, name, _, body, _ in blocks if body.strip()}
    for saved in record.read_all():
        if saved["case"] in cited:
            # a dirty tree is nobody's commit
            assert re.fullmatch(r"[0-9a-f]{40}", saved["commit"])
            assert saved["command"].startswith("python -m bench ")
            assert saved["device"]["slug"]
    assert text.count("<!-- bench:") == len(blocks)
