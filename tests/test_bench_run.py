"""Running cases: what survives a dead process, what is timed how, and which goals are reached."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import record, report, roofline
from bench.case import BEST_PEER, FLOOR, READ_ONLY, Goal, Point, Prepared, Provider, ValueCase
from bench.cases import host_overhead
from bench.goals import write_page
from bench.harness import run_case
from bench.micro import IDS
from bench.run import DEVICE_LOST, FileWatch, Options, compile_slice, run
from bench.timing import Sampler, sampler
from tests.bench_cases import broken, constant, rows_of, toy_case


@pytest.fixture(autouse=True)
def _quick_samples(monkeypatch):
    monkeypatch.setattr("bench.timing.SAMPLE_SECONDS", 0.0)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU whose every way of timing is a stopwatch, and that captures all but one provider."""

    class Stopwatch:
        def seconds(self, call, repeats):
            call()
            return 2e-6

    def capture(calls):
        if any(getattr(call, "cannot_be_captured", False) for call in calls):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return lambda: [call() for call in calls]

    monkeypatch.setattr("bench.timing.WarmCudaTimer", Stopwatch)
    monkeypatch.setattr("bench.timing.capture", capture)
    monkeypatch.setattr("bench.harness.timer_for", lambda device: Stopwatch())
    monkeypatch.setattr("bench.harness.host_seconds", lambda call: 1e-6)
    ceilings = roofline.Roofline(1e9, 2e9, 1e9)
    monkeypatch.setattr("bench.harness.measure_roofline", lambda dtype: ceilings)


def gpu_case(*providers, goals=(), **kwargs):
    """A toy of three sets of inputs, each filled with the number of its seed plus one."""

    def make_inputs(point, device, dtype, seed):
        return torch.full((2, 2), float(seed + 1))

    point = Point("a", {"M": 2, "K": 2}, "a toy", tuple(goals))
    return replace(
        toy_case(*providers, **kwargs), points=(point,), make_inputs=make_inputs, device="cuda",
        layout="goals", sets=3, modes=("graph", "eager", "flushed"),
    )  # fmt: skip


def test_every_set_is_called_and_only_what_can_be_is_captured(fake_gpu):
    seen = []

    def uncaptured(x):
        def call():
            seen.append(float(x[0, 0]))
            return x.clone()

        call.cannot_be_captured = True
        return Prepared(call, 1e-6)

    rows = rows_of(gpu_case(Provider("lowbit", uncaptured)))
    assert seen[:3] == [1.0, 2.0, 3.0]  # each runs before a graph would record it
    ours, baseline = rows["lowbit"], rows["float32"]
    assert ours["no_graph"] == "operation not permitted when stream is capturing"
    assert set(ours["modes"]) == {"eager", "flushed"}
    assert set(baseline["modes"]) == {"graph", "eager", "flushed"}
    assert (ours["mode"], ours["ratio_mode"], baseline["mode"]) == ("eager", "eager", "graph")
    # a cycle of three is timed as a whole, a flushed call by itself
    assert baseline["modes"]["graph"]["median"] == pytest.approx(2e-6 / 3)
    assert baseline["modes"]["flushed"]["median"] == pytest.approx(2e-6)
    assert baseline["floor_seconds"] == pytest.approx(1e-6)


def test_a_flushed_call_takes_the_next_set():
    calls, seen = [lambda i=i: seen.append(i) for i in range(3)], []

    class Once:
        def seconds(self, call, repeats):
            call()
            return 1.0

    timed = sampler("flushed", calls, Once())
    assert [timed.seconds(1) for _ in range(4)] == [1.0] * 4
    assert seen == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("ours_us", "against", "verdict"),
    [
        (1.0, "peer", ("moonshot", "peer", 2.0)),
        (1.6, "peer", ("good", "peer", 1.25)),
        (4.0, "peer", ("no", "peer", 0.5)),
        (2.5, BEST_PEER, ("no", "peer", 0.8)),
        (1.0, READ_ONLY, ("no", READ_ONLY, 0.5)),
        (1.0, "absent", (None, "absent", None)),
        (1.0, FLOOR, ("good", FLOOR, 1.0)),
    ],
)
def test_goals_are_judged_by_the_ratio_to_the_peer(
    monkeypatch, fake_gpu, ours_us, against, verdict
):
    times = {"float32": 3e-6, "peer": 2e-6, READ_ONLY: 0.5e-6, "lowbit": 1e-6 * ours_us}
    monkeypatch.setattr(
        "bench.harness.time_side_by_side", lambda *_: {n: [t, t] for n, t in times.items()}
    )
    providers = [Provider(name, constant(1.0)) for name in times if name != "float32"]
    providers.append(Provider("absent", broken, needs={"no_such_module": "no-such"}))
    goal = Goal("lowbit", 1.0, 1.5, against)
    [judged] = rows_of(gpu_case(*providers, goals=[goal]))["lowbit"]["goals"]
    reached, peer, ratio = verdict
    assert (judged["reached"], judged["peer"]) == (reached, peer)
    assert judged["ratio"] == (None if ratio is None else pytest.approx(ratio))


def test_a_page_says_which_goals_are_reached(fake_gpu, tmp_path):
    goals = [Goal("lowbit", 1.0, 3.0, "float32"), Goal("lowbit", 2.0, 3.0, "absent")]
    absent = Provider("absent", broken, needs={"no_such_module": "no-such"})
    case = gpu_case(
        Provider("lowbit", constant(1.0, facts=lambda: {"backend": "fused"})), absent,
        Provider("slow peer", broken), goals=goals,
    )  # fmt: skip
    about = record.environment("cpu", 1, "python -m bench sitting")
    values = ValueCase("v", "V", lambda: [{"name": "n", "value": 4.0, "unit": "us", "goal": 3.0}])
    done = [run_case(case, 0.0) | about, run_case(values, 0.0) | about]
    sitting = {
        "steps": {"tests": {"status": "done", "passed": 7, "failed_tests": ["tests/a.py::b"]}},
        "sanitizer": {"status": "refused", "reason": "Device not supported"},
        "wheels": {"x.whl": "installed"},
    }
    page = write_page(tmp_path, done, sitting).read_text()
    for said in (
        "1 of 2 goals reached, 1 not measured.",
        "| toy | a | lowbit | float32 | 1x | 3x | 1.00x | **reached** |",
        "| toy | a | lowbit | absent | 2x | 3x |  | not measured |",
        "* v, n: 4 us (at most 3): not reached",
        "| tests | done |  | 7 passed, 1 failed<br>`tests/a.py::b` |",
        "| compute-sanitizer | refused | | Device not supported |",
        "✓ 1x float32, is 1.00x",
        "| a | lowbit | fused |",
        "No time for absent: missing (pip install no-such).",
        "No time for slow peer: failed (RuntimeError: no such kernel).",
    ):
        assert said in page


def three_points(make_inputs=None, **kwargs):
    points = tuple(Point(name, {"M": 1, "K": 2}, "a toy") for name in "abc")
    case = replace(toy_case(**kwargs), points=points)
    return case if make_inputs is None else replace(case, make_inputs=make_inputs)


def test_points_that_are_done_are_not_run_again(tmp_path):
    asked = []

    def make_inputs(point, device, dtype):
        asked.append(point.name)
        return torch.ones(2)

    case = three_points(make_inputs)
    options = Options(tmp_path, resume=True)
    for _ in range(4):  # no time: one point each
        assert run([case], 0.0, options, "python -m bench toy") == 0
    [path] = tmp_path.glob("*/toy.json")
    saved = json.loads(path.read_text())
    assert asked == ["a"]
    assert saved["left_out"] == ["b", "c"]
    assert run([case], float("inf"), options, "python -m bench toy") == 0
    assert asked == ["a", "b", "c"]
    assert [row["point"] for row in json.loads(path.read_text())["results"]] == ["a", "b", "c"]
    # of other code nothing is kept
    path.write_text(json.dumps(saved | {"code": "another"}))
    assert run([case], float("inf"), options, "python -m bench toy") == 0
    assert asked == ["a", "b", "c"] * 2
    assert not (tmp_path / "running").exists()


def test_what_killed_a_process_is_left_out_the_next_time(tmp_path):
    class Killed(BaseException):
        pass

    def deadly(x):
        raise Killed

    case = three_points()
    case = replace(case, providers=(*case.providers, Provider("deadly", deadly)))
    options = Options(tmp_path, resume=True)
    for _ in range(3):
        with pytest.raises(Killed):
            run([case], float("inf"), options, "toy")
    assert run([case], float("inf"), options, "toy") == 0
    assert json.loads((tmp_path / "died.json").read_text()) == [
        ["toy", point, "deadly"] for point in "abc"
    ]
    [path] = tmp_path.glob("*/toy.json")
    rows = json.loads(path.read_text())["results"]
    reasons = {row["reason"] for row in rows if row["provider"] == "deadly"}
    assert reasons == {"the process died of it"}
    assert sum(row["status"] == "ok" for row in rows) == 3


def test_a_lost_device_ends_the_process_and_not_the_sitting(tmp_path):
    def lose(x):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    case = three_points()
    case = replace(case, providers=(*case.providers, Provider("bad", lose)))
    options = Options(tmp_path, resume=True)
    assert run([case], float("inf"), options, "toy") == DEVICE_LOST
    watch = FileWatch(tmp_path)
    assert watch.died("toy", "a", "bad")
    assert not watch.died("toy", "a", "float32")


def test_time_that_a_case_leaves_is_given_to_another(tmp_path):
    cases = [three_points(), replace(toy_case(), name="other", weight=1e9)]
    end = time.perf_counter() + 6.0  # enough for a busy machine
    assert run(cases, end, Options(tmp_path, resume=True), "toy") == 0
    [path] = tmp_path.glob("*/toy.json")
    assert [row["point"] for row in json.loads(path.read_text())["results"]] == ["a", "b", "c"]
    assert "left_out" not in json.loads(path.read_text())


def test_compile_runs_ours_once_a_point_and_says_what_is_wrong(tmp_path, capsys):
    ran = []

    def ours(x):
        ran.append(len(x))
        return constant(1.0 if len(ran) < 3 else 2.0)(x)

    case = three_points()
    peer = Provider("peer", broken)
    case = replace(case, providers=(*case.providers, Provider("lowbit", ours), peer))
    values = ValueCase("v", "V", lambda: [])
    assert compile_slice([case, values], 0, 2, tmp_path) == 0
    assert len(ran) == 2  # the points a and c
    assert compile_slice([case], 1, 2, tmp_path) == 1
    assert "lowbit': 'relative error 1.00e+00" in capsys.readouterr().out


def test_small_trials_have_a_folder_of_their_own(monkeypatch, tmp_path, capsys):
    case = replace(toy_case(device="cuda"), small=(Point("s", {"M": 1, "K": 2}, "small"),))
    monkeypatch.setattr(command, "CASES", {"toy": case})
    assert command.everything(small=True) == ["toy"]
    if not torch.cuda.is_available():
        arguments = ["toy", "--small", "--minutes", "0.001", "--results", str(tmp_path)]
        assert command.main(arguments) == 0
        [path] = tmp_path.glob("*-small/toy.json")
        assert [row["point"] for row in json.loads(path.read_text())["results"]] == ["s"]
        assert command.main(["toy"]) == 2
        assert "toy needs a CUDA GPU (or --small)" in capsys.readouterr().err


def test_the_host_time_of_ours_is_compared_round_by_round(monkeypatch):
    monkeypatch.setattr(host_overhead, "ROUNDS", 2)
    monkeypatch.setattr(host_overhead, "REPEATS", 1)
    rows = {row["name"]: row for row in host_overhead.measure("cpu")}
    assert len(rows) == 1 + 2 * len(host_overhead.SPECS)
    over = rows["QLinear w4, float inputs, over nn.Linear"]
    assert (over["goal"], over["moonshot"], over["unit"]) == (15.0, 3.0, "us")
    table = report.LAYOUTS["values"]({"results": list(rows.values())})
    assert table[-1][2] == "at most 15 us, reach for 3 us"


def test_the_microbenchmarks_cover_every_op_in_both_directions_at_three_sizes():
    assert len(IDS) == len(set(IDS)) >= 40
    ops = {op.partition("-")[0] for op, *_ in IDS}
    assert ops == {
        "linear", "conv1d", "flash_attention", "masked_group_norm", "masked_batch_norm",
        "norm_quantize", "norm_activation", "fake_quantize",
    }  # fmt: skip
    groups = {}
    for op, direction, size, provider in IDS:
        groups.setdefault((op, direction, size), []).append(provider)
    assert all(who[0] == "pytorch" and len(who) > 1 for who in groups.values())
    assert len(groups) == 6 * len({op for op, *_ in IDS})


def test_the_bare_command_compares_members_of_a_group(tmp_path):
    result = tmp_path / "micro.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--benchmark", "-q", "-p", "no:cacheprovider",
         "-k", "fake_quantize-forward-odd", f"--benchmark-json={result}"],
        cwd=record.ROOT, capture_output=True, text=True,
        # a worker of a parallel run tells its children that nothing is to be timed
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    saved = json.loads(result.read_text())["benchmarks"]
    assert len({row["group"] for row in saved}) == 1
    providers = {row["extra_info"]["provider"] for row in saved}
    assert providers == {"pytorch", "lowbit"}
    assert all(row["extra_info"]["error_checked"] for row in saved)


def test_one_set_again_and_again_is_warm(fake_gpu):
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    assert sampler("warm", calls, None).seconds(1) == pytest.approx(2e-6 / 3)
    assert seen == [0, 0, 0]


def test_a_sampler_counts_calls():
    class Twice:
        def seconds(self, call, repeats):
            return 6.0

    assert Sampler(Twice(), lambda: None, 3).seconds(1) == 2.0
