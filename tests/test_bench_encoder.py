"""The encoder cases of a GPU, on a CPU with stand-ins for graphs and peers; kinds of kernels."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._device import _device_constructors

from bench import __main__ as command
from bench import kernels, plot, record, report
from bench.case import Provider
from bench.cases import CASES, cold_start, encoder_cuda
from bench.harness import run_case
from lowbit_kernels.conversion.graphs import _capture_all
from tests.bench_cases import constant, rows_of, toy_case

# torch.device as a context remembers torch.empty as it is at first: not while a test poisons it
_device_constructors()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("bench.timing.SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)


@pytest.fixture
def tiny_encoder(monkeypatch):
    """Peers that change nothing, and graphs that call the model."""
    pytest.importorskip("transformers")

    def call_again(call, pool):
        output = call()

        def replay():
            output.last_hidden_state.copy_(call().last_hidden_state)

        return replay, output, pool

    def capture(model, seconds, batch):
        sizes = {(b, round(16_000 * s)) for b in batch for s in seconds}
        with torch.no_grad():
            return _capture_all(model, sizes, call_again)

    monkeypatch.setattr(encoder_cuda, "capture_graphs", capture)
    configs = {
        f"{kind}Config": dict for kind in
        ("Int8DynamicActivationInt8Weight", "Float8DynamicActivationFloat8Weight", "Int4WeightOnly")
    }  # fmt: skip
    torchao = SimpleNamespace(quantize_=lambda model, config: None, **configs)
    monkeypatch.setitem(sys.modules, "torchao.quantization", torchao)
    monkeypatch.setattr(encoder_cuda, "bitsandbytes_nf4", lambda linear: linear)


def on_cpu(case, dtype):
    providers = tuple(replace(p, gpu_only=False, slow=False, needs={}) for p in case.providers)
    return replace(case, device="cpu", dtype=dtype, points=case.small[:1], providers=providers)


@pytest.mark.parametrize("case", encoder_cuda.ENCODER_MODELS, ids=lambda case: case.name)
def test_every_provider_of_an_encoder_is_right(case, tiny_encoder):
    dtype = torch.float32 if "large" in case.name else torch.bfloat16
    rows = rows_of(on_cpu(case, dtype))
    graphs = {name for name, row in rows.items() if row["status"] == "missing"}
    whisper = {"lowbit small(), graphs", "lowbit fast(), graphs"}
    assert graphs == (whisper if "whisper" in case.name else set())
    failed = {n: row for n, row in rows.items() if row["status"] not in ("ok", "missing")}
    assert not failed
    ran = [row for row in rows.values() if row["status"] == "ok"]
    assert len({row["frames"] for row in ran}) == 1
    assert all(row["error_vs_float32"] < row["max_error"] + 0.5 for row in ran)
    assert rows["lowbit fast()"]["weight_bytes"] < rows["bf16 eager"]["weight_bytes"]
    assert rows["lowbit fast()"]["resident_bytes"] > rows["lowbit fast()"]["weight_bytes"]


def test_what_is_not_there_is_listed_for_an_encoder():
    pytest.importorskip("transformers")
    case = encoder_cuda.ENCODER_MODELS[0]
    rows = rows_of(replace(case, device="cpu", dtype=torch.float32, points=case.small))
    ran = {name for name, row in rows.items() if row["status"] == "ok"}
    assert ran == {"bf16 eager", "lowbit small()", "lowbit fast()"}
    assert rows["torchao fp8"]["reason"] == "pip install torchao"


def test_the_first_sitting_has_twelve_cells():
    case = encoder_cuda.ENCODER_CUDA
    assert len(case.points) * len(case.providers) == 12
    assert list(CASES).index(case.name) < list(CASES).index("linear_large")
    grid = [point.name for other in encoder_cuda.ENCODER_MODELS for point in other.points]
    assert len(set(grid)) == len(grid) == 5 * 9 + 3
    assert {point.name for point in case.points} <= set(grid)
    # the others are named, and go on from sitting to sitting
    assert [name for name in command.everything(small=True) if "encoder" in name] == [case.name]


def test_packed_tensors_are_counted_as_they_are_stored():
    packed = SimpleNamespace(
        q=torch.zeros(8, dtype=torch.uint8), scale=torch.zeros(2), nbytes=999,
        __tensor_flatten__=lambda: (["q", "scale"], None),
    )  # fmt: skip
    assert encoder_cuda._nbytes(packed) == 16


def test_memory_of_graphs_is_counted(monkeypatch):
    segments = [
        {"segment_pool_id": pool, "total_size": 100, "allocated_size": 30}
        for pool in ((0, 0), (0, 1), (2, 0))
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    assert encoder_cuda._held(SimpleNamespace(is_cuda=True)) == 1140


def test_what_only_a_gpu_tells_is_recorded(tiny_encoder, monkeypatch):
    used, seen = iter(range(0, 10_000, 100)), []

    def profiled(call):
        seen.append(call().shape)
        return {"launches": len(seen), "kinds": {"rest": float(len(seen))}}

    monkeypatch.setattr(encoder_cuda, "_on_gpu", lambda x: True)
    monkeypatch.setattr(encoder_cuda, "_held", lambda x: next(used))
    monkeypatch.setattr(encoder_cuda, "_transient", lambda call: 7)
    monkeypatch.setattr(encoder_cuda, "profiled", profiled)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    rows = rows_of(on_cpu(encoder_cuda.ENCODER_CUDA, torch.float32))
    assert {row["peak_bytes"] % 100 for row in rows.values()} == {7}
    # a graph's kernels are counted in its replay, and told apart without it
    fast = rows["lowbit fast(), graphs"]
    assert (fast["launches"], fast["kinds"]) == (3, {"rest": 4.0})
    assert rows["bf16 eager"]["kinds"] == {"rest": 1.0}


@pytest.mark.parametrize(
    ("kernel", "operators", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16", (), "convolutions"),
        ("nvjet_hsh_128x128_64x4", ("aten::linear", "aten::addmm"), "linear layers"),
        ("nvjet_hsh_128x128_64x4", ("aten::conv1d", "aten::convolution"), "convolutions"),
        ("cutlass_80_tensorop_bf16_s16816gemm", (), "linear layers"),
        ("fmha_cutlassF_bf16_aligned", (), "attention"),
        ("nvjet_hsh_64x8", ("aten::matmul", "aten::bmm"), "linear layers"),
        ("triton_poi_fused_addmm_gelu_view_3", (), "activations, quantization"),
        ("triton_per_fused_addmm_native_layer_norm_1", (), "norms"),
        ("triton_tem_fused_addmm_4", (), "linear layers"),
        ("_linear_kernel", ("lowbit::conv1d",), "convolutions"),
        ("_linear_kernel", ("lowbit::linear_int8",), "linear layers"),
        ("_quantize_rows_kernel", ("lowbit::linear",), "linear layers"),
        ("_norm_quantize_fwd_kernel", ("lowbit::norm_quantize",), "norms"),
        ("_flash_attention_fwd_kernel", ("lowbit::flash_attention",), "attention"),
        ("void at::native::vectorized_elementwise_kernel", ("aten::add",), "rest"),
        ("Memcpy DtoD", ("aten::copy_",), "copies"),
    ],
)
def test_a_kernel_has_a_kind(kernel, operators, kind):
    assert kernels.kind_of(kernel, operators) == kind


def _event(name, microseconds=0.0, cuda=False, launched=(), parent=None, annotation=False):
    return SimpleNamespace(
        name=name, is_user_annotation=annotation, cpu_parent=parent,
        device_type=torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU,
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
        kernels=[SimpleNamespace(name=name, duration=us) for name, us in launched],
    )  # fmt: skip


def test_kernels_are_counted_and_their_time_is_given_to_layers():
    linear = _event("aten::linear")
    device = [_event("gemm", 30.0, cuda=True), _event("Memcpy DtoD", 2.0, cuda=True)]
    region = _event("## Call ##", 50.0, cuda=True, annotation=True)
    conv = _event("aten::conv1d", launched=[("gemm", 30.0)])
    row = kernels.summary([linear, conv, _event("aten::copy_", launched=[("x", 2.0)]), *device])
    assert row == {"launches": 1, "kinds": {"convolutions": 30e-6, "copies": 2e-6}}
    # a graph's kernels have no operator
    row = kernels.summary([linear, region, *device])
    assert row == {"launches": 1, "kinds": {"linear layers": 30e-6, "copies": 2e-6}}
    inner = _event("aten::addmm", launched=[("gemm", 30.0)], parent=linear)
    assert kernels.summary([linear, inner, device[0]])["kinds"] == {"linear layers": 30e-6}


def test_the_kinds_of_layers_are_drawn(tmp_path):
    kinds = dict.fromkeys(kernels.KINDS, 1e-3)
    assert set(plot.KINDS) == set(kinds)
    facts = {"kinds": kinds, "launches": 12, "error_vs_float32": 0.01}
    fast = Provider("lowbit", constant(1.0, facts=lambda: facts))
    case = replace(toy_case(fast, layout="providers"), name="kinds")
    sizes = []
    for shown in (case, replace(case, providers=case.providers[:1])):
        done = run_case(shown, 0.0) | record.environment("cpu", 1, "python -m bench all")
        sizes.append(plot.draw(done, record.write(done, tmp_path).parents[1]).stat().st_size)
        table = report.case_tables("kinds", [done])
        assert ("| launches |" in table) == (shown is case)
    assert sizes[0] > sizes[1]


@pytest.mark.gpu
def test_a_profiler_sees_kernels_and_their_layers():
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    seen = kernels.profiled(lambda: torch.nn.functional.linear(x, x).softmax(-1))
    assert seen["launches"] == 2
    assert {"linear layers", "attention"} == set(seen["kinds"])
    from bench.timing import capture

    assert kernels.profiled(capture([lambda: x @ x] * 3))["launches"] == 3


def test_without_transformers_no_encoder_has_a_result(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    case = encoder_cuda.ENCODER_CUDA
    with pytest.raises(RuntimeError, match=r"every point is broken: .*transformers"):
        run_case(replace(case, device="cpu", points=case.small), 0.0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert len(cold_start.measure("cpu")) == 4


def test_a_stored_encoder_starts_in_a_fresh_process():
    pytest.importorskip("transformers")
    rows = cold_start.measure("cpu")
    values = [row for row in rows if row["name"].startswith("wav2vec2-large") and "goal" in row]
    assert len(values) == 2
    assert all(row["value"] > 0 for row in values)
