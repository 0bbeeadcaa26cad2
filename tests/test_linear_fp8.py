"""Linear layers with inputs="fp8": reference, kernels, dispatch, modules.

Dimension key: M rows, N output features, K input features.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lowbit_kernels import (
    QConv1d,
    QLinear,
    QuantConfig,
    load_quantized,
    low_bit_linear,
    quantize,
    save_quantized,
)
from lowbit_kernels.checks import EPILOGUES
from lowbit_kernels.conv1d import low_bit_conv1d
from lowbit_kernels.formats import QuantSpec, quantize_weight
from lowbit_kernels.matmul import cuda as cuda_linear
from lowbit_kernels.matmul import linear_reference, low_bit_linear_int8
from lowbit_kernels.matmul.dispatch import Choice, Gpu, LinearConfig, choose_config, choose_linear
from lowbit_kernels.matmul.kernel import linear_triton
from lowbit_kernels.matmul.op import flatten
from lowbit_kernels.matmul.quantize_kernel import quantize_rows_triton
from lowbit_kernels.matmul.reference import (
    apply_epilogue,
    epilogue_backward_reference,
    input_scale_rows,
    preactivation_reference,
    quantize_rows,
)
from lowbit_kernels.testing import assert_as_accurate
from tests.linear_cases import check, make_inputs

SPECS = {
    "w8": QuantSpec(8, inputs="fp8"),
    "w4g64": QuantSpec(4, inputs="fp8"),
    "w4": QuantSpec(4, None, inputs="fp8"),
    "w2g64": QuantSpec(2, inputs="fp8"),
    "w1g32": QuantSpec(1, 32, inputs="fp8"),
}
W4 = SPECS["w4g64"]
HOPPER = Gpu("a GPU", (9, 0), 132, 227 * 1024)

specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
shapes = pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        pytest.param(32, 64, 512, id="whole-tiles"),
        pytest.param(7, 38, 101, id="ragged"),
        pytest.param(1, 70, 260, id="one-row"),
    ],
)
real_shapes = pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        pytest.param(499, 4096, 1024, id="wav2vec2-large"),
        pytest.param(1499, 768, 3072, id="wav2vec2-base"),
        pytest.param(33, 196, 324, id="squeezeformer"),
    ],
)


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="fp8 needs capability 8.9",
)


@pytest.fixture
def hopper(monkeypatch):
    """The CUDA path, with the numbers of an H100, on whatever device the tests have."""
    monkeypatch.setattr(cuda_linear, "gpu_of", lambda device: HOPPER)


def to_e4m3(v):
    """fp64 to the nearest of e4m3's numbers, written from its definition."""
    exponent = v.abs().clamp_min(2.0**-6).log2().floor()
    step = torch.exp2(exponent - 3)
    return ((v / step).round() * step).clamp(-448, 448)


@specs
@pytest.mark.parametrize("epilogue", [None, "gelu", "glu"])
def test_the_reference_does_what_the_format_says(spec, epilogue):
    x, weight, bias, residual = make_inputs(6, 38, 101, spec, torch.float64, "cpu", epilogue)
    # a scale that is a power of two has an exact reciprocal
    x = x.float().double().clamp(-3, 3)
    x[:, 0] = 448 / 128
    levels = to_e4m3(weight.integers().double())
    z = to_e4m3(x * 128) @ levels.t() * (weight.scale / 128).double() + bias
    y = linear_reference(x, weight, bias, residual, epilogue)
    assert torch.equal(y, apply_epilogue(z, epilogue) + residual)
    assert_as_accurate(low_bit_linear(x.float(), weight), (z - bias).float(), z - bias)


def test_small_integers_are_exact_and_others_nearly():
    levels = torch.arange(-128, 128).double()
    rounded = levels.float().to(torch.float8_e4m3fn).double()
    assert torch.equal(rounded, to_e4m3(levels))
    small = levels.abs() <= 16
    assert torch.equal(rounded[small], levels[small])
    assert ((rounded - levels).abs() <= levels.abs() / 16).all()


def awkward_rows(device):
    """Values of every size, carries into the exponent, ties, a silent row, NaN, infinity."""
    ties = torch.tensor([17, 19, 15.5, 31, 127, 464, 465, 2**-9, 1.5 * 2**-9, 2**-10, 2**-11, -0.0])
    x = torch.cat([torch.randn(8, 90) * 100, torch.randn(8, 90) * 0.01, ties.expand(8, -1)], 1)
    x *= torch.tensor([1, 1e-30, 1e30, 1e-3, 1, 1, 0, 1])[:, None]
    x[4, 7], x[5, 3], x[7, 0] = torch.nan, -torch.inf, 448
    return x.to(device)


@pytest.mark.parametrize("kind", ["token", "utterance", "static"])
def test_quantized_rows_have_the_references_bits(kind, device):
    x = awkward_rows(device).view(2, 4, -1)
    rows = input_scale_rows(x, kind, torch.tensor(0.02, device=device), "fp8")
    q, scale = quantize_rows_triton(x, None if kind == "token" else rows, "fp8")
    torch.testing.assert_close(scale, rows, rtol=0, atol=0, equal_nan=True)
    wanted = quantize_rows(x.flatten(0, 1), rows, "fp8").view(x.shape)
    torch.testing.assert_close(q.float(), wanted.float(), rtol=0, atol=0, equal_nan=True)
    if kind == "token":
        assert torch.isfinite(scale).tolist() == [True] * 4 + [False] * 2 + [True] * 2


@specs
@pytest.mark.parametrize("splits", [1, 2])
def test_products_of_small_integers_are_exact(spec, splits, device):
    M, N, K = 5, 38, 300
    weight = quantize_weight(torch.randn(N, K, device=device), spec)
    weight.scale.fill_(1)
    x = torch.randint(-1, 2, (M, K), device=device)
    config = LinearConfig(block_n=32, block_m=16, splits=splits)
    y, _ = linear_triton(
        x.to(torch.float8_e4m3fn)[None], weight, None, None, None, config,
        x_scale=torch.ones(M, device=device), dtype=torch.float32,
    )  # fmt: skip
    levels = to_e4m3(weight.integers().double())
    assert torch.equal(y, (x.double() @ levels.t()).float())


def run_kernel(x, weight, bias, residual, epilogue, splits=1, **options):
    q, scale = quantize_rows_triton(x[None], None, "fp8")
    config = LinearConfig(block_n=32, block_m=16, splits=splits)
    return linear_triton(
        q, weight, bias, residual, epilogue, config, x_scale=scale, dtype=x.dtype, **options
    )


@specs
@shapes
def test_kernel_is_as_accurate_as_the_reference(M, N, K, spec, device):
    args = make_inputs(M, N, K, spec, torch.float16, device)
    y, _ = run_kernel(*args, None)
    check(y, *args, None)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_and_split_sums(epilogue, splits, device):
    args = make_inputs(5, 38, 300, W4, torch.float16, device, epilogue)
    y, z = run_kernel(*args, epilogue, splits, want_preactivation=True)
    check(y, *args, epilogue)
    x, weight, bias, _ = args
    low = preactivation_reference(x, weight, bias)
    high = preactivation_reference(x.double(), weight, bias.double())
    assert_as_accurate(z, low, high, "preactivation")


@pytest.mark.parametrize("kind", ["token", "utterance", "static"])
@pytest.mark.parametrize("epilogue", [None, "silu", "glu"])
@pytest.mark.usefixtures("hopper")
def test_cuda_path_forward_and_backward(epilogue, kind, device):
    spec = replace(W4, input_scale=kind)
    x, weight, bias, residual = make_inputs(6, 38, 101, spec, torch.float16, device, epilogue)
    weight = replace(weight, input_scale=torch.tensor(0.01, device=device))
    # neither x nor the residual is contiguous
    x, residual = x.t().contiguous().t().view(2, 3, 101), residual.t().contiguous().t()
    y, z = cuda_linear.linear_cuda(
        x, weight, bias, residual.view(2, 3, -1), epilogue, want_preactivation=True
    )
    rows = input_scale_rows(x, kind, weight.input_scale, "fp8")
    low, high = (
        linear_reference(
            x.to(dtype).reshape(6, -1), weight, bias.to(dtype), residual.to(dtype), epilogue,
            x_scale_rows=rows,
        )
        for dtype in (torch.float16, torch.float64)
    )  # fmt: skip
    assert_as_accurate(y.view(6, -1), low, high)
    dy = torch.randn_like(y)
    dx, _ = cuda_linear.linear_backward_cuda(dy, z, weight, epilogue, needs_bias_grad=True)
    low, high = (
        epilogue_backward_reference(dy.to(dtype), z.to(dtype), epilogue) @ weight.dequantize(dtype)
        for dtype in (torch.float16, torch.float64)
    )
    assert_as_accurate(dx, low, high, "dx")


@pytest.mark.usefixtures("hopper")
def test_cuda_path_without_rows(device):
    weight = quantize_weight(torch.randn(8, 40, device=device), W4)
    x = torch.randn(2, 0, 40, device=device, dtype=torch.float16)
    y, z = cuda_linear.linear_cuda(x, weight, None, None, "gelu", want_preactivation=True)
    assert y.shape == z.shape == (2, 0, 8)


@pytest.mark.usefixtures("hopper")
def test_a_row_that_is_not_finite_is_not_hidden(device):
    x, weight, bias, _ = make_inputs(3, 38, 101, W4, torch.float16, device)
    x[1, 7] = torch.inf
    for y in (cuda_linear.linear_cuda(x, weight, bias, None, "gelu")[0], low_bit_linear(x, weight)):
        assert y.isnan().all(1).tolist() == [False, True, False]
        assert not y[::2].isnan().any()


@pytest.mark.usefixtures("hopper")
def test_deterministic_rows_have_the_same_bits_alone(device):
    x, weight, *_ = make_inputs(70, 38, 300, replace(W4, deterministic=True), torch.float16, device)
    together = cuda_linear.linear_cuda(x, weight, None, None, "gelu")[0]
    assert torch.equal(
        cuda_linear.linear_cuda(x[3:5], weight, None, None, "gelu")[0], together[3:5]
    )
    assert torch.equal(low_bit_linear(x[3:5], weight), low_bit_linear(x, weight)[3:5])


@pytest.mark.parametrize("epilogue", EPILOGUES)
@specs
def test_op_equals_its_meaning(spec, epilogue, device):
    x, weight, bias, residual = make_inputs(6, 38, 101, spec, torch.float16, device, epilogue)
    y = low_bit_linear(x, weight, bias, epilogue=epilogue, residual=residual)
    check(y, x, weight, bias, residual, epilogue)


@pytest.mark.parametrize("epilogue", [None, "glu"])
def test_ops_are_registered_correctly(epilogue, device):
    x, weight, bias, residual = make_inputs(6, 16, 70, W4, torch.float32, device, epilogue)
    x, residual = x.view(2, 3, 70), residual.view(2, 3, -1)
    tensors = [t.requires_grad_() for t in (x, bias, residual)]
    name = "linear" if epilogue is None else "linear_train"
    op = getattr(torch.ops.lowbit, name).default
    torch.library.opcheck(op, (*tensors, epilogue, *flatten(weight)))


def test_compiles_to_one_graph_for_three_lengths(device):
    x, weight, bias, _ = make_inputs(30, 16, 70, W4, torch.float32, device)

    def run(x):
        return low_bit_linear(x, weight, bias, epilogue="gelu")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    for T in (4, 7, 11):
        assert torch.equal(compiled(x[None, :T]), run(x[None, :T]))


@pytest.mark.parametrize("epilogue", [None, "gelu"])
def test_inputs_pass_the_gradient_straight_through(epilogue):
    x, weight, bias, _ = make_inputs(4, 6, 70, W4, torch.float64, "cpu")
    low_bit_linear(x.requires_grad_(), weight, bias, epilogue=epilogue).sum().backward()
    z = preactivation_reference(x.detach(), weight, bias)
    dz = epilogue_backward_reference(torch.ones_like(z), z, epilogue)
    torch.testing.assert_close(x.grad, dz @ weight.dequantize(torch.float64))


def choose(gpu, M=499):
    return choose_linear(M, 4096, 1024, 4, 64, "fp8", torch.bfloat16, False, False, gpu)


def test_gpus_with_e4m3_operands_are_served():
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        gpu = replace(HOPPER, capability=capability)
        assert choose(gpu) == Choice("fused", choose_config(499, 4096, 1024, 4, 1, gpu))
    for gpu in (replace(HOPPER, capability=(8, 0)), replace(HOPPER, is_hip=True)):
        with pytest.raises(NotImplementedError, match=r"8\.9 and later, got a GPU .*inputs='int8'"):
            choose(gpu)


def test_sums_of_one_bit_fit_in_tensor_memory():
    gpu = Gpu("a B200", (10, 0), 148, 227 * 1024)
    for itemsize in (1, 2):
        assert choose_config(2000, 4096, 1024, 1, itemsize, gpu).block_m == 64


def test_what_is_not_served_is_named():
    x, weight, *_ = make_inputs(2, 6, 70, replace(W4, deterministic=True), torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match="None and 'relu' on a CPU, got 'gelu'"):
        low_bit_linear(x, weight, epilogue="gelu")
    q, scale = torch.zeros(2, 70, dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(ValueError, match="inputs must be 'int8', got 'fp8'"):
        low_bit_linear_int8(q, scale, weight, dtype=torch.float32)
    static = quantize_weight(torch.randn(6, 70), replace(W4, input_scale="static"))
    with pytest.raises(ValueError, match=r"weight\.input_scale must be a tensor"):
        low_bit_linear(x, static)
    with pytest.raises(NotImplementedError, match=r"one of \(None, 'int8'\) .* got 'fp8'"):
        low_bit_conv1d(torch.randn(1, 70, 9), quantize_weight(torch.randn(6, 70), W4))
    with pytest.raises(NotImplementedError, match=r"one of \(None, 'int8', .* got 'fp8'"):
        QConv1d(8, 8, 3, spec=W4)


@pytest.mark.parametrize("kind", ["token", "static"])
def test_models_are_quantized_saved_and_loaded(kind, tmp_path):
    def build():
        return nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Linear(40, 12), nn.Linear(12, 4))

    x, model = torch.randn(2, 8, 40), build()
    plain = model(x)
    calibration = [x] if kind == "static" else None
    report = quantize(model, QuantConfig(default=SPECS["w8"]), calibration=calibration)
    assert [layer.spec for layer in report.layers] == [None] + 2 * [str(model[1].spec)]
    assert "convolutions take no fp8 inputs" in str(report.layers[0])
    assert type(model[0]) is nn.Conv1d
    assert isinstance(model[1], QLinear)
    assert model[1].spec == replace(SPECS["w8"], input_scale=kind)
    y = model(x)
    # of a rounding to 2 ** -4 there is half at most, and signs differ
    assert (y - plain).norm() < 2**-4 * plain.norm()
    save_quantized(model, tmp_path / "saved")
    again = load_quantized(tmp_path / "saved", build())
    assert again[1].spec == model[1].spec
    assert torch.equal(again(x), y)


@pytest.mark.gpu
@specs
@real_shapes
def test_real_shapes_on_a_gpu(M, N, K, spec):
    for epilogue in (None, "gelu", "glu"):
        args = make_inputs(M, N, K, spec, torch.bfloat16, "cuda", epilogue)
        x, weight, bias, residual = args
        y = low_bit_linear(x, weight, bias, epilogue=epilogue, residual=residual)
        check(y, *args, epilogue)
        assert torch.equal(y, low_bit_linear(x, weight, bias, epilogue=epilogue, residual=residual))


@pytest.mark.gpu
def test_graph_replays_equal_eager_on_a_gpu():
    x, weight, bias, _ = make_inputs(16, 1024, 1024, W4, torch.bfloat16, "cuda")
    low_bit_linear(x, weight, bias)  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = low_bit_linear(x, weight, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, low_bit_linear(x, weight, bias))
