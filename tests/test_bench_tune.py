"""Backends by force, and the table that dispatch reads; without a GPU in the interpreter."""

import json
from dataclasses import replace

import pytest
import torch

from bench import ladder, record, tune
from bench.cases.linear_ladder_cuda import LINEAR_LADDER
from lowbit_kernels import QuantSpec
from lowbit_kernels.conv1d import Geometry, conv1d_reference
from lowbit_kernels.conv1d import cuda as cuda_conv1d
from lowbit_kernels.conv1d.dispatch import choose_conv1d
from lowbit_kernels.matmul import cuda as cuda_linear
from lowbit_kernels.matmul import tuned
from lowbit_kernels.matmul.dispatch import (
    Choice,
    Gpu,
    LinearConfig,
    choose_config,
    choose_linear,
)
from lowbit_kernels.testing import assert_as_accurate
from tests.bench_cases import rows_of

H200 = Gpu("NVIDIA H200", (9, 0), 132, 232_448)


@pytest.fixture
def gpu(monkeypatch, device):
    """The GPU, or what dispatch shall take the CPU for."""
    monkeypatch.setattr("bench.timing.SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr("bench.timing.MIN_ROUNDS", 1)
    if device == "cuda":
        return ladder.gpu_of(torch.device("cuda", 0))
    for module in (cuda_linear, cuda_conv1d, ladder):
        monkeypatch.setattr(module, "gpu_of", lambda device: H200)
    # other tiles compute the same, and the interpreter takes its time for each
    monkeypatch.setattr(ladder, "candidates", _first_candidates)
    return H200


def _first_candidates(*args):
    return CANDIDATES(*args)[:2]


CANDIDATES = ladder.candidates


def test_every_backend_of_the_ladder_is_right(gpu, device):
    providers = tuple(replace(p, gpu_only=False) for p in LINEAR_LADDER.providers)
    point = LINEAR_LADDER.small[0]
    case = replace(
        LINEAR_LADDER, device="cpu", dtype=torch.float16, points=(point,), providers=providers
    )
    rows = rows_of(case) if device == "cpu" else rows_of(replace(case, device="cuda"))
    status = {name.rpartition(", ")[2]: row["status"] for name, row in rows.items()}
    assert {status[name] for name in ("fused", "dequant_cublas", "resident_int8")} == {"ok"}, rows
    assert status["csrc"] in ("ok", "missing")
    assert rows["lowbit w4, float inputs, fused"]["backend"] == "fused (chosen)"


def test_a_forced_choice_holds_for_one_call(gpu, device):
    job = tune.LinearJob(5, 96, 64, "gelu", QuantSpec(bits=4))
    layer, x = job.data(device, torch.float16, 0)
    asked = []

    def choose(*args):
        asked.append(args)
        return Choice("dequant_cublas")

    before = cuda_linear.choose_linear
    with torch.inference_mode():
        out = ladder.forced(layer, x, "gelu", choose())()
    assert cuda_linear.choose_linear is before
    assert out.shape == (5, 96)
    assert ladder.default_choice(5, 96, 64, job.spec, x.dtype, "gelu", gpu).backend == "fused"


@pytest.mark.parametrize(("k", "stride", "groups"), [(3, 2, 1), (2, 2, 1), (8, 1, 2)])
@pytest.mark.parametrize("spec", tune.SPECS, ids=str)
def test_a_convolution_by_force(gpu, device, k, stride, groups, spec):
    job = tune.Conv1dJob(12, 2, 32, k, stride, groups, "gelu", spec)
    layer, x = job.data(device, torch.float16, 0)
    before, weight = cuda_conv1d.choose_conv1d, layer.quantized_weight()
    padding = k // 2 if stride == 1 else 0
    geometry = Geometry(k, stride, padding, padding, groups=groups)
    low, high = (
        conv1d_reference(x.to(wide), weight, layer.bias.to(wide), geometry, "gelu")
        for wide in (x.dtype, torch.float64)
    )
    for choice in job.choices(gpu, x.dtype):
        with torch.inference_mode():
            y = job.call(layer, x, choice)()
        assert y.shape == (2, 32, 6)
        assert_as_accurate(y, low, high)
    assert cuda_conv1d.choose_conv1d is before
    libraries = [c for c in job.choices(gpu, x.dtype) if c == Choice("dequant_cublas")]
    assert len(libraries) == (spec.inputs is None and groups == 1)


def test_tiles_of_groups_are_those_of_one_launch():
    layer = tune.Conv1dJob(16384, 32, 1024, 128, 1, 16, "gelu", tune.SPECS[0])
    tiles = [choice.config for choice in layer.choices(H200, torch.bfloat16)]
    assert tiles[0] == choose_config(16384, 64, 8192, 4, 2, H200, 16)
    assert len(tiles) == len(set(tiles)) > 2
    assert not any(config.persistent for config in tiles)
    dense = tune.Conv1dJob(131072, 32, 512, 3, 2, 1, "gelu", tune.SPECS[0])
    found = dense.choices(H200, torch.bfloat16)
    assert any(choice.config and choice.config.persistent for choice in found)
    assert found[-1] == Choice("dequant_cublas")


def test_convolutions_come_after_a_third_of_the_linear_layers():
    kinds = [job.kind for job in tune.jobs()]
    linear, convs = kinds.count("linear"), kinds.count("conv1d")
    assert kinds[linear // 3 : linear // 3 + convs] == ["conv1d"] * convs
    entries = [(job.kind, job.M, *job.layer.values()) for job in tune.jobs()]
    assert len(entries) == len(set(entries)) == linear + convs


def test_large_inputs_need_no_others(gpu, device, small_jobs, monkeypatch):
    seeds, data = [], tune.LinearJob.data

    def remember(job, device, dtype, seed):
        seeds.append(seed)
        return data(job, device, dtype, seed)

    monkeypatch.setattr(tune, "SETS", 3)
    monkeypatch.setattr(tune.LinearJob, "data", remember)
    monkeypatch.setattr(tune.LinearJob, "choices", lambda *_: [])
    assert tune.measure(tune.jobs()[0], device, torch.float16, gpu) is None
    monkeypatch.setattr(tune, "SETS_BYTES", 1)
    assert tune.measure(tune.jobs()[0], device, torch.float16, gpu) is None
    assert seeds == [0, 1, 2, 0]


@pytest.fixture
def small_jobs(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "LAYERS", ((96, 64, "gelu"), (64, 96, None)))
    monkeypatch.setattr(tune, "CONVS", ((2, 32, 3, 2, 1, (16,)), (1, 64, 3, 1, 2, (16,))))
    monkeypatch.setattr(tune, "ROWS", (16,))
    monkeypatch.setattr(tune, "SETS", 1)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    caches = (tuned.load_table, choose_linear, choose_conv1d)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_dispatch_takes_what_was_measured(gpu, device, small_jobs, tmp_path):
    current = []

    def remember(forced):
        def call(layer, x, epilogue, choice):
            current.append(choice)
            return forced(layer, x, epilogue, choice)

        return call

    class Fake:
        """The fused kernel is slow, all else is fast."""

        def __init__(self):
            self.time = 1.0 if current[-1].backend in ("fused", "matmul") else 1e-3

        def seconds(self, repeats):
            return self.time

    with pytest.MonkeyPatch.context() as patch:
        for name in ("forced", "forced_conv1d"):
            patch.setattr(tune, name, remember(getattr(tune, name)))
        patch.setattr(tune, "_sampler", lambda *_: Fake())
        path = tune.run(tmp_path, float("inf"), gpu, device, torch.float16)
    table = json.loads(path.read_text())
    assert (len(table["linear"]), len(table["conv1d"])) == (4, 4)
    assert table["code"] == record.code_digest()
    assert set(table["versions"]) >= {"triton", "torch"}
    backends = {row["backend"] for layer in table["linear"] for row in layer["rows"]}
    assert backends == {"dequant_cublas", "resident_int8"}
    shipped = json.loads(tuned.table_path(gpu.name).read_text())
    [copy] = tmp_path.glob("*/tuned/*.json")
    assert json.loads(copy.read_text()) == shipped
    for kind in ("linear", "conv1d"):
        assert "microseconds" not in shipped[kind][0]["rows"][0]
    job = tune.jobs()[0]
    layer_is = (job.N, job.K, job.spec, torch.float16)
    assert ladder.default_choice(16, *layer_is, "gelu", gpu) == Choice("dequant_cublas")
    # more rows than were measured, and a layer that was not
    assert ladder.default_choice(17, *layer_is, "gelu", gpu).backend == "fused"
    assert ladder.default_choice(16, *layer_is, None, gpu).backend == "fused"
    geometry, spec = Geometry(3, 2), tune.SPECS[0]
    conv_is = (32, 96, geometry, False, spec, torch.float16, gpu, False)
    assert choose_conv1d(16, *conv_is) == Choice("dequant_cublas")
    assert choose_conv1d(17, *conv_is).backend == "matmul"
    assert {layer["groups"] for layer in shipped["conv1d"]} == {1, 2}
    # what is there is not measured again
    measured = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "measure", lambda *args: measured.append(args))
        tune.run(tmp_path, float("inf"), gpu, device, torch.float16)
        assert measured == []
        patch.setattr(record, "code_digest", lambda: "another")
        patch.setattr(tune, "code_digest", lambda: "another")
        tune.run(tmp_path, float("inf"), gpu, device, torch.float16)
    assert len(measured) == 8


def test_wrong_tiles_are_no_candidates(gpu, device, small_jobs, monkeypatch):
    calls = []

    def forced(layer, x, epilogue, choice):
        calls.append(choice)
        wrong = choice.backend == "dequant_cublas"
        return lambda: torch.ones(3) * (2 if wrong else 1)

    monkeypatch.setattr(tune, "forced", forced)
    monkeypatch.setattr(
        tune, "_sampler", lambda *_: type("S", (), {"seconds": lambda self, repeats: 1.0})()
    )
    entry = tune.measure(tune.jobs()[0], device, torch.float16, gpu)
    assert entry["backend"] == "fused"
    assert LinearConfig(**entry["config"]) in [choice.config for choice in calls]
    assert [f for f in entry["failures"] if "a wrong result" in f]


def test_each_kernel_is_compiled_in_one_part(gpu, device, small_jobs, monkeypatch):
    ran = []
    monkeypatch.setattr(tune, "ROWS", (16, 15))

    def remember(layer, x, epilogue, choice):
        kernel = (choice, layer.spec, epilogue, getattr(layer, "groups", None))
        return lambda: ran.append(kernel)

    monkeypatch.setattr(tune, "forced", remember)
    monkeypatch.setattr(tune, "forced_conv1d", remember)
    for i in range(3):
        tune.compile_part(i, 3, gpu, device, torch.float16)
    assert len(ran) == len(set(ran)) >= 8
    assert {groups for *_, groups in ran} == {None, 1, 2}


def test_the_cuda_kernel_is_measured_where_it_serves(monkeypatch):
    def backends(M, bits=4, inputs=None, epilogue="gelu"):
        spec = QuantSpec(bits=bits, inputs=inputs)
        return ladder.choices(M, 1024, 1024, spec, torch.bfloat16, epilogue, H200)

    assert "csrc" not in backends(16)
    monkeypatch.setattr(ladder.csrc, "is_available", lambda: True)
    tiles = [choice.config for choice in backends(16)["csrc"]]
    assert len(tiles) == len(set(tiles)) > 4
    assert all(config.block_m == 16 for config in tiles)
    for other in (backends(65), backends(16, bits=8), backends(16, inputs="int8")):
        assert "csrc" not in other
