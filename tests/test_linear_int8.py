"""low_bit_linear_int8, what it gets from the kernels before it, and the resident int8 weight.

Dimension key: B batch, T frames, M = B * T rows, N output features, K input features.
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.formats import QuantSpec, quantize_weight
from lowbit_kernels.matmul import cuda as cuda_linear
from lowbit_kernels.matmul import low_bit_linear, low_bit_linear_int8, tuned
from lowbit_kernels.matmul.dispatch import Gpu, choose_linear
from lowbit_kernels.matmul.op import flatten
from lowbit_kernels.matmul.reference import linear_reference, quantize_rows
from lowbit_kernels.norm import norm_quantize
from lowbit_kernels.testing import assert_as_accurate
from tests.linear_cases import make_inputs

H200 = Gpu("NVIDIA H200", (9, 0), 132, 227 * 1024)
SPECS = {
    "w8": QuantSpec(8, inputs="int8"),
    "w4g64": QuantSpec(4, inputs="int8"),
    "w2g64": QuantSpec(2, inputs="int8"),
    "w1": QuantSpec(1, inputs="int8"),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
epilogues = pytest.mark.parametrize("epilogue", [None, "gelu", "glu"])


def make_levels(B, T, N, K, spec, dtype, device, epilogue):
    """q, its scale, and the other arguments."""
    _, weight, bias, residual = make_inputs(B * T, N, K, spec, dtype, device, epilogue)
    q = torch.randint(-127, 128, (B, T, K), device=device).to(torch.int8)
    scale = torch.rand(B, T, 1, device=device) / 50 + 1e-3
    return q, scale, weight, bias, residual.view(B, T, -1)


def references(q, scale, weight, bias, residual, epilogue):
    """In the layer's dtype, and in fp64."""
    rows, row_scale = q.flatten(0, 1), scale.flatten()
    results = []
    for dtype in (bias.dtype, torch.float64):
        # quantized by its own scale again, a row of whole numbers stays what it is
        x = (rows * row_scale[:, None].double()).to(torch.float64)
        y = linear_reference(
            x, weight, bias.to(dtype).double(), None, None, x_scale_rows=row_scale.double()
        )
        y = {None: y, "gelu": F.gelu(y), "glu": F.glu(y) if epilogue == "glu" else None}[epilogue]
        y = y.to(dtype) + residual.flatten(0, 1).to(dtype)
        results.append(y.view(*q.shape[:2], -1))
    return results


@specs
@epilogues
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_as_accurate_as_the_reference(dtype, epilogue, spec, device):
    q, scale, weight, bias, residual = make_levels(2, 3, 38, 101, spec, dtype, device, epilogue)
    y = low_bit_linear_int8(
        q, scale, weight, bias, epilogue=epilogue, residual=residual, dtype=dtype
    )
    assert_as_accurate(y, *references(q, scale, weight, bias, residual, epilogue))


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(cuda_linear, "gpu_of", lambda device: H200)


@specs
@epilogues
@pytest.mark.usefixtures("hopper")
def test_kernel_is_as_accurate_as_the_reference(epilogue, spec, device):
    args = make_levels(2, 3, 38, 101, spec, torch.float16, device, epilogue)
    y = cuda_linear.linear_int8_cuda(*args, epilogue, torch.float16, None)
    assert_as_accurate(y, *references(*args, epilogue))


@pytest.mark.parametrize("K", [101, 700])  # one sum, and one in parts
@pytest.mark.usefixtures("hopper")
def test_the_result_is_rounded_to_int8_by_a_static_scale(K, device):
    """By what the fp32 result rounds to: the same integers but for ties at the last bit of fp32."""
    args = make_levels(1, 5, 38, K, SPECS["w4g64"], torch.float32, device, None)
    out_scale = torch.tensor(0.02, device=device)
    wide = cuda_linear.linear_int8_cuda(*args, None, torch.float32, None)
    for levels in (
        cuda_linear.linear_int8_cuda(*args, None, torch.int8, out_scale),
        low_bit_linear_int8(
            *args[:4], residual=args[4], dtype=torch.float32, out_scale=out_scale
        ),
    ):  # fmt: skip
        assert levels.dtype == torch.int8
        assert levels.abs().max() == 127  # some are clamped
        assert levels.unique().numel() > 50
        expected = quantize_rows(wide[0], out_scale.expand(5))
        difference = (levels[0].int() - expected.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_norm_and_layer_together(dtype, device):
    """A fused block gives what quantizing inside of the layer gives, with one rounding less."""
    x, weight, bias, _ = make_inputs(6, 38, 96, SPECS["w4g64"], dtype, device)
    gain, shift = torch.rand(96, device=device) + 0.5, torch.randn(96, device=device)
    q, scale, _ = norm_quantize(x, gain, shift)
    y = low_bit_linear_int8(q, scale, weight, bias, dtype=dtype)
    normalized = F.layer_norm(x.double(), (96,), gain.double(), shift.double())
    low = low_bit_linear(F.layer_norm(x, (96,), gain.to(dtype), shift.to(dtype)), weight, bias)
    high = F.linear(normalized, weight.dequantize(torch.float64), bias.double())
    assert_as_accurate(y, low, high)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,)])
def test_any_number_of_rows(shape, device):
    weight = quantize_weight(torch.randn(8, 40, device=device), SPECS["w4g64"])
    q = torch.ones(shape, dtype=torch.int8, device=device)
    y = low_bit_linear_int8(
        q, torch.ones(*shape[:-1], 1, device=device), weight, dtype=torch.float32
    )
    assert y.shape == (*shape[:-1], 8)


@pytest.mark.parametrize("out_scale", [None, torch.tensor(0.1)], ids=["float", "int8"])
def test_op_is_registered_correctly(out_scale, device):
    q, scale, weight, bias, residual = make_levels(
        2, 3, 16, 70, SPECS["w4g64"], torch.float32, device, "glu"
    )
    out_scale = None if out_scale is None else out_scale.to(device)
    args = (q, scale, bias, residual, "glu", torch.float32, out_scale, *flatten(weight))
    torch.library.opcheck(torch.ops.lowbit.linear_int8.default, args)


def test_flops_are_those_of_a_matmul(device):
    from torch.utils.flop_counter import FlopCounterMode

    q, scale, weight, bias, _ = make_levels(2, 3, 16, 70, SPECS["w4g64"], torch.half, device, None)
    with FlopCounterMode(display=False) as counter:
        low_bit_linear_int8(q, scale, weight, bias, dtype=torch.float16)
    assert counter.get_total_flops() == 2 * 6 * 16 * 70


def test_wrong_arguments_are_named(device):
    spec = SPECS["w4g64"]
    q, scale, weight, bias, residual = make_levels(2, 3, 16, 70, spec, torch.float16, device, None)
    good = {"q": q, "q_scale": scale, "weight": weight, "bias": bias, "dtype": torch.float16}
    floating = quantize_weight(torch.randn(16, 70, device=device), QuantSpec(4))
    for change, message in (
        ({"q": q.float()}, r"q must be int8 \[\.\.\., K\] with K = 70, got torch\.float32"),
        ({"q": q[..., :64]}, r"q must be int8 .* got torch\.int8 \[2, 3, 64\]"),
        ({"q_scale": scale[..., 0]}, r"q_scale must be \[2, 3, 1\], got \[2, 3\]"),
        ({"q_scale": scale.half()}, r"q_scale must be torch\.float32"),
        ({"weight": floating}, r"weight\.spec\.inputs must be 'int8', got None"),
        ({"bias": bias.float()}, r"bias must be torch\.float16"),
        ({"residual": residual[:1]}, r"residual must be \[2, 3, 16\], got \[1, 3, 16\]"),
        ({"dtype": torch.float64}, r"dtype must be one of .* got torch\.float64"),
        ({"out_scale": scale[0, 0]}, r"out_scale must be \[\], got \[1\]"),
        ({"epilogue": "tanh"}, r"epilogue must be one of .* got 'tanh'"),
    ):
        with pytest.raises(ValueError, match=message):
            low_bit_linear_int8(**(good | change))


@pytest.mark.usefixtures("hopper")
def test_the_resident_int8_weight_gives_the_same_bits(tmp_path, monkeypatch, device):
    """Where a table names it; it is made once, and again when the weight changes."""
    M, N, K, spec = 6, 38, 101, SPECS["w4g64"]
    x, weight, bias, residual = make_inputs(M, N, K, spec, torch.float16, device)
    args = (weight, bias, residual, "gelu")
    expected, _ = cuda_linear.linear_cuda(x, *args)
    tiles = {"block_n": 32, "block_m": 16}
    rows = [{"up_to": 64, "backend": "resident_int8", "config": tiles}]
    layer = {"N": N, "K": K, "bits": 4, "group_size": 64, "inputs": "int8", "is_plain": False}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps({"linear": [layer | {"rows": rows}]}))
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    launched = []
    launch = cuda_linear.linear_triton

    def record(rows, weight, *args, **kwargs):
        launched.append(weight)
        return launch(rows, weight, *args, **kwargs)

    monkeypatch.setattr(cuda_linear, "linear_triton", record)
    for cached in (tuned.load_table, choose_linear):
        cached.cache_clear()
    try:
        assert torch.equal(cuda_linear.linear_cuda(x, *args)[0], expected)
        assert torch.equal(cuda_linear.linear_cuda(x, *args)[0], expected)
        weight.qweight.add_(1)
        changed, _ = cuda_linear.linear_cuda(x, *args)
    finally:
        monkeypatch.undo()
        for cached in (tuned.load_table, choose_linear):
            cached.cache_clear()
    first, second, third = launched
    assert first.spec == replace(spec, bits=8, group_size=None)
    assert first.qweight.data_ptr() == second.qweight.data_ptr() != third.qweight.data_ptr()
    monkeypatch.setattr(cuda_linear, "gpu_of", lambda device: H200)
    assert torch.equal(changed, cuda_linear.linear_cuda(x, *args)[0])


def test_no_copy_is_made_while_a_graph_is_captured(monkeypatch, device):
    """Nothing is computed then: the copy would be garbage for every later call."""
    weight = quantize_weight(torch.randn(8, 70, device=device), SPECS["w4g64"])
    monkeypatch.setattr(cuda_linear, "_is_capturing", lambda: True)
    assert cuda_linear._resident(weight) is weight
    monkeypatch.setattr(cuda_linear, "_is_capturing", lambda: False)
    made = cuda_linear._resident(weight)
    assert torch.equal(made.integers(), weight.integers())
    monkeypatch.setattr(cuda_linear, "_is_capturing", lambda: True)
    assert cuda_linear._resident(weight).qweight is made.qweight
    weight.qweight.add_(1)
    assert cuda_linear._resident(weight) is weight


@pytest.mark.gpu
@specs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_real_shapes_on_a_gpu(dtype, spec):
    for M, N, K in ((499, 4096, 1024), (1499, 768, 3072), (33, 196, 324)):
        args = make_levels(1, M, N, K, spec, dtype, "cuda", "gelu")
        y = low_bit_linear_int8(*args[:4], epilogue="gelu", residual=args[4], dtype=dtype)
        assert_as_accurate(y, *references(*args, "gelu"))
