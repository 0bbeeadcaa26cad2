"""The cases of a GPU, run on whatever there is: every provider at small shapes, right results."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench import __main__ as command
from bench import cuda_peers, plot, record, report, roofline
from bench.case import Case, Point
from bench.cases import CASES, ON_CUDA
from bench.cases import attention_cuda as attention
from bench.cases.conv1d_cuda import CONV1D_CUDA
from bench.cases.conv_blocks_cuda import CONV_MODULE_CUDA, FRONT_END_CUDA, POSITIONAL_CUDA
from bench.cases.depthwise_cuda import DEPTHWISE_CUDA
from bench.cases.linear_cuda import LINEAR_BATCH1
from bench.cases.norm_cuda import NORM_CUDA
from bench.cases.training_cuda import TRAINING_CUDA
from bench.harness import run_case
from bench.timing import CudaTimer, host_seconds
from conftest import OPTIONAL
from tests.bench_cases import (
    CONV_POINTS,
    constant,
    rows_of,
    toy_case,
)

# the ladder's backends are those of a GPU alone: test_bench_tune.py
LINEAR_CASES = [
    replace(case, sets=2) for case in ON_CUDA
    if case.name.startswith("linear") and case.name != "linear_ladder"
]  # fmt: skip
CONV_CASES = (FRONT_END_CUDA, POSITIONAL_CUDA, CONV_MODULE_CUDA, DEPTHWISE_CUDA)
# which product int8 and fp8 have of 17 rows and more
PEER_POINT = Point("peers", {"M": 32, "K": 64, "N": 96, "gelu": 1}, "small")
ATTENTION_POINTS = [
    Point(f"{kind} {b}", {"B": 2, "H": 2, "T": 37, "D": 16, "backward": b, kind: 1}, "small")
    for kind in (
        "plain",
        "lengths",
        "dense bias",
        "transformer-xl",
        "relative key",
        "bucketed",
        "window",
    )
    for b in (0, 1)
]
NORM_POINTS = [
    Point("group norm", {"B": 2, "C": 8, "T": 50}, "small"),
    Point("layer norm", {"M": 9, "K": 48}, "small"),
]
POINTS = [
    *((case, point) for case in LINEAR_CASES for point in case.small[:2]),
    *((CONV1D_CUDA, point) for point in CONV_POINTS),
    *((case, point) for case in CONV_CASES for point in case.small),
    *((attention.ATTENTION_CUDA, point) for point in ATTENTION_POINTS),
    *((NORM_CUDA, point) for point in NORM_POINTS),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("bench.timing.SAMPLE_SECONDS", 0.0)
    # a compiler takes its time, and that it compiles is not asked here
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)


def problems(rows):
    """What is neither right nor missing."""
    fine = ("ok", "missing", "skipped")
    return {name: row for name, row in rows.items() if row["status"] not in fine}


@dtypes
@pytest.mark.parametrize(
    ("case", "point"), [pytest.param(c, p, id=f"{c.name}-{p.name}") for c, p in POINTS]
)
def test_every_provider_is_right(case, point, dtype):
    rows = rows_of(replace(case, device="cpu", dtype=dtype, points=(point,)))
    assert not problems(rows)
    ran = {row["status"] for name, row in rows.items() if name.startswith("lowbit")}
    assert {"ok"} <= ran <= {"ok", "skipped"}


def training_case(point):
    """On a CPU, without what is compiled."""
    providers = tuple(p for p in TRAINING_CUDA.providers if not p.gpu_only)
    options = {"device": "cpu", "dtype": torch.float32, "points": (point,)}
    return replace(TRAINING_CUDA, providers=providers, **options)


@pytest.mark.parametrize("point", TRAINING_CUDA.small, ids=lambda point: point.name)
def test_every_provider_of_the_training_case_is_right(point):
    pytest.importorskip("transformers")
    rows = rows_of(training_case(point))
    assert {row["status"] for row in rows.values()} == {"ok"}, problems(rows)
    frames = {row["frames"] for row in rows.values()}
    assert len(frames) == 1
    trained = {name: row["trained"] for name, row in rows.items()}
    assert (
        trained["lowbit w4 frozen, LoRA"] == trained["bf16 frozen, LoRA"] < trained["bf16 training"]
    )
    # learned scales are trained too
    assert trained["lowbit w4 QAT"] > trained["bf16 training"]


def test_lora_needs_no_package(monkeypatch):
    pytest.importorskip("peft")
    case = training_case(TRAINING_CUDA.small[0])
    with_peft = rows_of(case)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    without = rows_of(case)
    assert {row["status"] for row in without.values()} == {"ok"}, problems(without)
    for name, row in without.items():
        assert row["trained"] == with_peft[name]["trained"]


def test_attention_is_checked_with_its_mask():
    case = replace(attention.ATTENTION_CUDA, device="cpu", dtype=torch.float32)
    rows = {point.name: rows_of(replace(case, points=(point,))) for point in ATTENTION_POINTS}
    # the baseline fills padding, ours leaves zeros there, and neither is wrong
    assert rows["lengths 0"]["lowbit"]["error_vs_baseline"] > 0.1
    assert rows["lengths 1"]["lowbit"]["error_vs_baseline"] < 1e-5


def test_peers_are_listed_where_they_are_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows = rows_of(replace(LINEAR_BATCH1, device="cpu", points=LINEAR_BATCH1.small[:1]))
    missing = {name for name, row in rows.items() if row["status"] == "missing"}
    assert missing == {p.name for p in LINEAR_BATCH1.providers if p.needs or p.gpu_only}
    assert rows["gemlite w4"]["reason"] == "pip install gemlite"
    assert rows["_int_mm, int8"]["reason"] == "needs a CUDA GPU"


def test_what_pytorch_itself_has_is_right():
    cuda_peers.compiled.cache_clear()
    providers = tuple(
        replace(p, gpu_only=False, points=None) for p in LINEAR_BATCH1.providers if not p.needs
    )
    case = replace(LINEAR_BATCH1, device="cpu", points=(PEER_POINT,), providers=providers)
    rows = rows_of(case)
    cuda_peers.compiled.cache_clear()
    assert {row["status"] for row in rows.values()} == {"ok"}, problems(rows)
    assert rows["_int_mm, int8"]["error"] > rows["torch.compile max-autotune"]["error"]


def test_a_peer_that_writes_into_its_layer_leaves_ours_alone():
    linear = torch.nn.Linear(8, 4).bfloat16()
    twin = cuda_peers._copy(linear)
    assert torch.equal(twin.weight, linear.weight)
    twin.weight.data.zero_()
    assert linear.weight.any()


def test_the_roofline_is_the_slower_of_two(monkeypatch):
    ceilings = roofline.Roofline(flop_per_s=10.0, int8_op_per_s=20.0, byte_per_s=5.0)
    assert ceilings.seconds(100, 10, int8=False) == 10
    assert ceilings.seconds(100, 10, int8=True) == 5
    assert ceilings.seconds(100, 100, int8=True) == 20
    monkeypatch.setattr(roofline, "ROUNDS", 1)
    measured = roofline.measure_roofline.__wrapped__(torch.float32, "cpu")
    assert min(vars(measured).values()) > 0


def test_a_gpu_case_records_its_roofline_and_the_host_time(monkeypatch):
    ceilings = roofline.Roofline(1000 / 2.0, 1.0, 1e9)
    monkeypatch.setattr("bench.harness.measure_roofline", lambda dtype: ceilings)
    monkeypatch.setattr("bench.harness.time_side_by_side", lambda *args: {"float32": [4.0, 4.0]})
    monkeypatch.setattr("bench.harness.timer_for", lambda device: None)
    monkeypatch.setattr("bench.harness.host_seconds", lambda call: 0.5)
    done = run_case(toy_case(device="cuda", dtype=torch.bfloat16), 0.0)
    [row] = done["results"]
    assert (row["roofline_share"], row["host_seconds"]) == (0.5, 0.5)
    assert done["roofline"] == vars(ceilings)
    assert done["dtype"] == "bfloat16"


def test_all_means_the_cases_of_the_device(monkeypatch, capsys):
    for has_gpu, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert {CASES[name].device for name in command.everything()} == {device}
    assert "not run: ceilings, linear_batch1" in capsys.readouterr().err
    assert command.main(["list"]) == 0
    assert "speed against bfloat16 (cuda, needs a CUDA GPU)" in capsys.readouterr().out
    assert command.main(["norm_cuda"]) == 2
    assert "norm_cuda needs a CUDA GPU" in capsys.readouterr().err
    assert command.main(["norm_cuda", "--small"]) == 2
    assert "norm_cuda has no small shapes" in capsys.readouterr().err


def test_a_case_without_a_result_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    right = replace(toy_case(), name="right")
    wrong = replace(right, name="wrong", make_inputs=lambda *_: torch.ones(2) @ torch.ones(3))
    monkeypatch.setattr(command, "CASES", {"wrong": wrong, "right": right})
    assert command.main(["all", "--minutes", "0.1", "--results", str(tmp_path)]) == 1
    assert "wrong gave no result: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*/*.json")] == ["right.json"]


def test_the_tests_of_a_gpu_are_collected_without_the_extras():
    script = f"""
import sys
for name in {sorted(OPTIONAL - {"matplotlib"})}:
    sys.modules[name] = None  # any import of it raises
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "--gpu", "-p", "no:cacheprovider"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=record.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    collected = done.stdout.split("\n\n")[0].splitlines()
    files = {line.split("::")[0].removeprefix("tests/") for line in collected}
    kernels = {path.name for path in (record.ROOT / "tests").glob("test_*_kernels.py")}
    assert files >= kernels | {"test_attention.py", "test_deterministic.py", "test_graphs.py"}
    assert not any("cli" in name or "digits" in name for name in files)


@pytest.mark.parametrize("case", [c for c in ON_CUDA if isinstance(c, Case)], ids=lambda c: c.name)
def test_a_gpu_case_has_a_table_and_a_plot(case, tmp_path, monkeypatch):
    """With as many providers and points as the real one."""
    providers = tuple(replace(p, prepare=constant(1.0), needs={}) for p in case.providers)
    changes = {"name": case.name, "providers": providers, "baseline": case.baseline}
    toy = replace(toy_case(layout=case.layout), points=case.points, **changes)
    toy = replace(toy, make_inputs=lambda *_: torch.ones(2))
    done = run_case(toy, 60.0) if len(case.points) < 3 else _quickly(toy, monkeypatch)
    record.write(done | record.environment("cpu", 1, "python -m bench all"), tmp_path)
    [saved] = record.read_all(tmp_path)
    table = report.case_tables(case.name, [saved], tmp_path)
    assert table.count("\n|") >= len(case.points)
    assert plot.draw(saved, tmp_path).stat().st_size > 10_000


def _quickly(case, monkeypatch):
    monkeypatch.setattr("bench.timing.MAX_ROUNDS", 5)
    return run_case(case, 60.0)


@pytest.mark.gpu
def test_cuda_events_see_the_work():
    x = torch.randn(4096, 4096, device="cuda")
    timer = CudaTimer()
    timer.seconds(lambda: x @ x, 1)
    assert timer.seconds(lambda: [x @ x for _ in range(8)], 4) > timer.seconds(lambda: x @ x, 4)
    # launching is not waiting
    assert host_seconds(lambda: [x @ x for _ in range(8)]) < timer.seconds(
        lambda: [x @ x for _ in range(8)], 4
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "point"), [pytest.param(c, p, id=f"{c.name}-{p.name}") for c, p in POINTS]
)
def test_every_provider_is_right_on_a_gpu(case, point, monkeypatch):
    ceilings = roofline.Roofline(1e15, 2e15, 4e12)
    monkeypatch.setattr("bench.harness.measure_roofline", lambda dtype: ceilings)
    rows = rows_of(replace(case, points=(point,)))
    assert not problems({name: row for name, row in rows.items() if name.startswith("lowbit")})
