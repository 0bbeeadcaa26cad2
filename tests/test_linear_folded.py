"""A LayerNorm folded into the linear layers around it: kernels, ops, modules.

Dimension key: M rows, N output features, K input features.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit_kernels.checks import EPILOGUES
from lowbit_kernels.formats import QuantSpec, quantize_weight
from lowbit_kernels.matmul import cuda as cuda_linear
from lowbit_kernels.matmul import (
    linear_reference,
    low_bit_linear_normed,
    low_bit_linear_with_stats,
    row_statistics,
)
from lowbit_kernels.matmul.dispatch import Gpu, LinearConfig
from lowbit_kernels.matmul.kernel import linear_triton
from lowbit_kernels.matmul.op import flatten
from lowbit_kernels.matmul.reference import STATS_WIDTH, InputNorm, merge_statistics
from lowbit_kernels.modules import FoldedLinear, QLinear
from lowbit_kernels.testing import assert_as_accurate
from tests.interpreter_memory import checked_memory
from tests.linear_cases import check, make_inputs

W4 = QuantSpec(4)
SPECS = {"w8": QuantSpec(8), "w4g64": W4, "w2g64": QuantSpec(2), "w1": QuantSpec(1)}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
SHAPES = [  # M, N, K
    pytest.param(32, 128, 256, id="whole-tiles"),
    pytest.param(7, 150, 101, id="ragged"),
    pytest.param(1, 70, 260, id="one-row"),
]
shapes = pytest.mark.parametrize(("M", "N", "K"), SHAPES)
splits = pytest.mark.parametrize("splits", [1, 3])
H200 = Gpu("NVIDIA H200", (9, 0), 132, 227 * 1024)


def check_statistics(stats, y):
    """Of y as it is stored: against fp32 arithmetic and fp64."""
    M, N = y.shape
    assert stats.shape == (-(-N // STATS_WIDTH), 2, M)
    results = []
    for dtype in (torch.float32, torch.float64):
        parts = y.to(dtype).split(STATS_WIDTH, 1)
        squares = [(p - p.mean(1, keepdim=True)).square() for p in parts]
        # one after the other, as an interpreted kernel adds
        results.append([torch.stack([sum(p.unbind(1)) for p in v]) for v in (parts, squares)])
    for i, name in enumerate(("sums", "squares")):
        assert_as_accurate(stats[:, i], results[0][i], results[1][i], name)


def check_normed(y, x, weight, bias, residual, epilogue, eps=1e-5):
    """Against LayerNorm and the layer, each rounded to y's dtype, and against fp64."""
    args, K = (residual, epilogue), (weight.K,)
    low = linear_reference(F.layer_norm(x, K, eps=eps), weight, bias, *args)
    wide = F.layer_norm(x.double(), K, eps=eps)
    residual = None if residual is None else residual.double()
    high = linear_reference(wide, weight, bias.double(), residual, epilogue)
    assert_as_accurate(y, low, high)


def norm_of(x, weight, eps=1e-5):
    return InputNorm(row_statistics(x), weight_sum(weight), weight.K, eps)


def weight_sum(weight):
    return weight.integers().sum(1, dtype=torch.int32)


def stream(M, K, dtype, device, mean=50.0):
    """Rows as of a residual stream: a mean of many deviations, and a feature that stands out."""
    x = torch.randn(M, K, device=device) + mean * torch.randn(M, 1, device=device).sign()
    x[:, K // 3] += 40
    return x.to(dtype)


@shapes
@splits
@pytest.mark.parametrize("block_n", [64, 128])
@pytest.mark.parametrize("epilogue", [None, "gelu"])
def test_kernel_finds_the_statistics_of_its_rows(epilogue, block_n, splits, M, N, K, device):
    args = make_inputs(M, N, K, W4, torch.float16, device)
    x, weight, bias, residual = args
    bias += 20  # far from zero, where sums of squares would cancel
    stats = torch.empty(-(-N // STATS_WIDTH), 2, M, device=device)
    config = LinearConfig(block_n, 16, splits=splits)
    y, _ = linear_triton(x[None], weight, bias, residual, epilogue, config, stats=stats)
    check(y, *args, epilogue)
    check_statistics(stats, y)


def test_statistics_of_a_wide_split_sum(device):
    """Wider than what one program adds up."""
    x, weight, bias, residual = make_inputs(2, 1100, 128, W4, torch.float16, device)
    stats = torch.empty(18, 2, 2, device=device)
    config = LinearConfig(128, 16, splits=2)
    y, _ = linear_triton(x[None], weight, bias, residual, None, config, stats=stats)
    check_statistics(stats, y)


@specs
@shapes
@splits
def test_kernel_normalizes_its_input(splits, M, N, K, spec, device):
    _, weight, bias, residual = make_inputs(M, N, K, spec, torch.float16, device)
    x = stream(M, K, torch.float16, device)
    config = LinearConfig(32, 16, splits=splits)
    y, _ = linear_triton(x[None], weight, bias, residual, None, config, norm=norm_of(x, weight))
    check_normed(y, x, weight, bias, residual, None)


@splits
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_kernel_normalizes_before_the_epilogue(epilogue, splits, device):
    _, weight, bias, residual = make_inputs(37, 38, 300, W4, torch.float16, device, epilogue)
    x = stream(37, 300, torch.float16, device)
    config = LinearConfig(32, 64, splits=splits)  # rows are written in two parts
    y, z = linear_triton(
        x[None], weight, bias, residual, epilogue, config, norm=norm_of(x, weight),
        want_preactivation=True,
    )  # fmt: skip
    check_normed(y, x, weight, bias, residual, epilogue)
    check_normed(z, x, weight, bias, None, None)


@splits
@pytest.mark.parametrize("eps", [1e-5, 0.25])
def test_eps_of_nearly_constant_rows(eps, splits, device):
    _, weight, bias, _ = make_inputs(5, 38, 100, W4, torch.float16, device)
    x = torch.randn(5, 100, device=device) * torch.logspace(-4, 0, 5, device=device)[:, None] + 1
    x = x.half()
    x[0] = 3
    config = LinearConfig(32, 16, splits=splits)
    norm = norm_of(x, weight, eps)
    y, _ = linear_triton(x[None], weight, bias, None, None, config, norm=norm)
    check_normed(y, x, weight, bias, None, None, eps)


@pytest.mark.parametrize("K", [1, 64, 150, 1000])
def test_merged_statistics_do_not_cancel(K, device):
    x = torch.randn(9, K, device=device) + 50
    mean, rstd = merge_statistics(row_statistics(x), K, 1e-5)
    results = {}
    for dtype in (torch.float32, torch.float64):
        wide = x.to(dtype)
        variance = wide.var(1, correction=0)
        results[dtype] = wide.mean(1), (variance + 1e-5).rsqrt()
    (mean_low, rstd_low), (mean_high, rstd_high) = results.values()
    assert_as_accurate(mean, mean_low, mean_high)
    assert_as_accurate(rstd, rstd_low, rstd_high)


def producer_and_consumer(device, dtype=torch.float16, spec=W4, M=6, N=150, hidden=70):
    """Arguments of a layer that makes [2, M / 2, N], and weight and bias of one that reads it."""
    x, weight, bias, residual = make_inputs(M, N, hidden, spec, dtype, device)
    _, after, after_bias, _ = make_inputs(M, hidden, N, spec, dtype, device)
    shape = (2, M // 2)
    return (x.view(*shape, -1), weight, bias + 5, residual.view(*shape, -1)), (after, after_bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@specs
def test_ops_in_a_row(spec, dtype, device):
    (x, weight, bias, residual), (after, after_bias) = producer_and_consumer(device, dtype, spec)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    h, stats = low_bit_linear_with_stats(strided, weight, bias, residual=residual)
    rows = h.flatten(0, 1)
    check(rows, x.flatten(0, 1), weight, bias, residual.flatten(0, 1), None)
    check_statistics(stats, rows)
    y = low_bit_linear_normed(
        h, stats, after, weight_sum(after), after_bias, epilogue="gelu", residual=x
    )
    check_normed(y.flatten(0, 1), rows, after, after_bias, x.flatten(0, 1), "gelu")


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(cuda_linear, "gpu_of", lambda device: H200)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("M", [1, 80])
@pytest.mark.parametrize("N", [70, 600])
def test_kernels_in_a_row(M, N, device):
    """With the tiles of dispatch; 600 features are a sum in parts. Memory is checked."""
    x, weight, bias, residual = make_inputs(M, N, 300, W4, torch.float16, device)
    _, after, after_bias, _ = make_inputs(M, 38, N, W4, torch.float16, device)
    stats = torch.empty(-(-N // STATS_WIDTH), 2, M, device=device)

    def run():
        h = cuda_linear.linear_folded_cuda(x, weight, bias, residual, None, stats=stats)
        norm = InputNorm(stats, weight_sum(after), N, 1e-5)
        return h, cuda_linear.linear_folded_cuda(h, after, after_bias, None, "gelu", norm=norm)

    if device == "cuda":
        h, y = run()
    else:
        with checked_memory():
            h, y = run()
    check_statistics(stats, h)
    check_normed(y, h, after, after_bias, None, "gelu")


@pytest.mark.parametrize("shape", [(0, 70), (2, 0, 70), (70,)])
def test_any_number_of_rows(shape, device):
    _, (weight, bias) = producer_and_consumer(device, N=70, hidden=8)
    x = torch.randn(shape, device=device).half()
    stats = row_statistics(x.reshape(-1, 70))
    y = low_bit_linear_normed(x, stats, weight, weight_sum(weight), bias)
    assert y.shape == (*shape[:-1], 8)
    h, made = low_bit_linear_with_stats(x, weight, bias)
    assert h.shape == y.shape
    assert made.shape == (1, 2, x.numel() // 70)


def test_ops_are_registered_correctly(device):
    (x, weight, bias, residual), (after, after_bias) = producer_and_consumer(device)
    args = (x, bias, residual, "silu", *flatten(weight))
    torch.library.opcheck(torch.ops.lowbit.linear_with_stats.default, args)
    stats = row_statistics(residual.flatten(0, 1))
    args = (residual, stats, weight_sum(after), 1e-5, after_bias, x, None, *flatten(after))
    torch.library.opcheck(torch.ops.lowbit.linear_normed.default, args)


def test_wrong_arguments_are_named(device):
    (_, _, _, x), (weight, bias) = producer_and_consumer(device)
    stats, sums = row_statistics(x.flatten(0, 1)), weight_sum(weight)
    good = {"x": x, "stats": stats, "weight": weight, "weight_sum": sums, "bias": bias}
    asymmetric = quantize_weight(torch.randn(70, 150, device=device), QuantSpec(4, symmetric=False))
    int8 = quantize_weight(torch.randn(70, 150, device=device), QuantSpec(4, inputs="int8"))
    for change, error, message in (
        ({"x": x.float()}, ValueError, r"x must be fp16 or bf16, got torch\.float32"),
        ({"x": x[..., :64]}, ValueError, r"x must be \[\.\.\., K\] with K = 150"),
        ({"stats": stats[:2]}, ValueError, r"stats must be \[3, 2, 6\], got \[2, 2, 6\]"),
        ({"stats": stats.half()}, ValueError, r"stats must be torch\.float32"),
        ({"weight_sum": sums.float()}, ValueError, r"weight_sum must be torch\.int32"),
        ({"bias": bias.float()}, ValueError, r"bias must be torch\.float16"),
        ({"epilogue": "tanh"}, ValueError, r"epilogue must be one of .* got 'tanh'"),
        ({"weight": asymmetric}, NotImplementedError, "symmetric weights .* w4 g64 asymmetric"),
        ({"weight": int8}, NotImplementedError, "inputs=None .* got w4 g64, int8 inputs"),
        ({"x": x.clone().requires_grad_()}, NotImplementedError, r"no gradient.*torch\.no_grad"),
    ):
        with pytest.raises(error, match=message):
            low_bit_linear_normed(**(good | change))
    with pytest.raises(NotImplementedError, match="without epilogue 'glu'"):
        low_bit_linear_with_stats(x, weight, bias, epilogue="glu")


def test_flops_are_counted(device):
    from torch.utils.flop_counter import FlopCounterMode

    (x, weight, bias, residual), (after, after_bias) = producer_and_consumer(device)
    with FlopCounterMode(display=False) as counter:
        h, stats = low_bit_linear_with_stats(x, weight, bias, residual=residual)
        low_bit_linear_normed(h, stats, after, weight_sum(after), after_bias)
    assert counter.get_total_flops() == 2 * (2 * 6 * 150 * 70)


class FoldedFeedForward(nn.Module):
    """``h + second(gelu(first(norm(h))))`` in two products and no other pass over h."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, h, stats):
        inner = self.first(h, stats, epilogue="gelu")
        second = self.second
        return low_bit_linear_with_stats(inner, second.quantized_weight(), second.bias, residual=h)


class Block(nn.Module):
    """A pre-norm feed-forward block."""

    def __init__(self, C):
        super().__init__()
        self.norm, self.first, self.second = (
            nn.LayerNorm(C),
            nn.Linear(C, 2 * C),
            nn.Linear(2 * C, C),
        )
        nn.init.uniform_(self.norm.weight, 0.2, 3)
        nn.init.normal_(self.norm.bias)

    def fold(self, spec):
        return FoldedFeedForward(
            FoldedLinear.from_float(self.norm, self.first, spec),
            QLinear.from_float(self.second, spec),
        )


def unfused(block, h, dtype):
    """The folded block's integers, an op after the other, each rounded to dtype."""
    normalized = F.layer_norm(h, h.shape[-1:], eps=block.first.eps)
    layers = [
        (layer.quantized_weight().dequantize(dtype), layer.bias.to(dtype))
        for layer in (block.first, block.second)
    ]
    return h + F.linear(F.gelu(F.linear(normalized, *layers[0])), *layers[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("mean", [0.0, 50.0])
@specs
def test_two_pre_norm_blocks(spec, mean, dtype, device):
    blocks = [Block(96).to(device).fold(spec).to(dtype) for _ in range(2)]
    h = stream(12, 96, dtype, device, mean)
    low, high = h, h.double()
    for block in blocks:
        low, high = unfused(block, low, dtype), unfused(block, high, torch.float64)
    y, stats = h.view(2, 6, 96), row_statistics(h)
    with torch.inference_mode():
        for block in blocks:
            y, stats = block(y, stats)
    assert_as_accurate(y.flatten(0, 1), low, high)
    check_statistics(stats, y.flatten(0, 1))


def test_folded_is_the_float_layer(device):
    """Scale, shift and eps of the norm, up to the rounding of 8-bit weights."""
    block = Block(64).to(device)
    block.norm.eps = 0.3
    folded = FoldedLinear.from_float(block.norm, block.first, QuantSpec(8)).half()
    x = torch.randn(9, 64, device=device).half()
    with torch.inference_mode():
        y = folded(x, row_statistics(x)).double()
        expected = block.double().first(block.norm(x.double()))
    noise, signal = (y - expected).square().sum(), expected.square().sum()
    assert 10 * torch.log10(signal / noise) > 35


@pytest.mark.parametrize("bias", [True, False])
def test_folded_layer_follows_its_weight(bias, device):
    norm, linear = nn.LayerNorm(70).to(device), nn.Linear(70, 38, bias=bias).to(device)
    folded = FoldedLinear.from_float(norm, linear, W4).half()
    x = stream(5, 70, torch.float16, device)
    stats = row_statistics(x)
    with pytest.warns(UserWarning, match="requantized"):
        folded.weight = torch.rand(38, 70)
    assert torch.equal(folded.weight_sum, weight_sum(folded.quantized_weight()))
    other = FoldedLinear.from_float(norm, linear, W4).half()
    other.load_state_dict(folded.state_dict())
    with torch.inference_mode():
        y = folded(x, stats)
        assert torch.equal(other(x, stats), y)
    check_normed(y, x, folded.quantized_weight(), folded.bias.detach(), None, None)


def test_wrong_folds_are_named():
    linear = nn.Linear(64, 8)
    with pytest.raises(ValueError, match=r"norm\.normalized_shape must be \(64,\), .* got \(32,\)"):
        FoldedLinear.from_float(nn.LayerNorm(32), linear, W4)
    for spec in (QuantSpec(4, symmetric=False), QuantSpec(4, inputs="int8")):
        with pytest.raises(NotImplementedError, match="symmetric weights with inputs=None"):
            FoldedLinear.from_float(nn.LayerNorm(64), linear, spec)


def test_compiled_whole(device):
    block = Block(64).to(device).fold(W4).half()
    h = torch.randn(2, 3, 64, device=device).half()
    stats = row_statistics(h.flatten(0, 1))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for actual, expected in zip(compiled(h, stats), block(h, stats), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("M", [1, 33, 499, 2000, 5000])
def test_real_shapes_on_a_gpu(M, dtype):
    for C in (324, 1024):
        x, weight, bias, residual = make_inputs(M, C, 4 * C, W4, dtype, "cuda")
        h, stats = low_bit_linear_with_stats(x, weight, bias + 5, residual=residual)
        check_statistics(stats, h)
        _, after, after_bias, _ = make_inputs(M, 4 * C, C, W4, dtype, "cuda")
        for rows in (h, stream(M, C, dtype, "cuda")):
            y = low_bit_linear_normed(
                rows, row_statistics(rows), after, weight_sum(after), after_bias, epilogue="gelu"
            )
            check_normed(y, rows, after, after_bias, None, "gelu")
