"""A LayerNorm folded into the linear layers around it: kernels and ops.

Dimension key: M rows, N output features, K input features.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.checks import EPILOGUES
from lowbit_kernels.formats import QuantSpec, quantize_weight
from lowbit_kernels.matmul import cuda as cuda_linear
from lowbit_kernels.matmul import (
    linear_reference,
    low_bit_linear_normed,
    low_bit_linear_with_stats,
    norm_columns,
    row_statistics,
)
from lowbit_kernels.matmul.dispatch import Gpu, LinearConfig
from lowbit_kernels.matmul.gpu import taking_norm
from lowbit_kernels.matmul.kernel import linear_triton
from lowbit_kernels.matmul.op import flatten
from lowbit_kernels.matmul.reference import STATS_WIDTH, InputNorm, merge_statistics
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


def make_norm(K, dtype, device):
    """Scale and shift as trained ones: of both signs, some near zero."""
    weight = torch.randn(K, device=device).sign() * torch.rand(K, device=device) * 2
    return weight.to(dtype), torch.randn(K, device=device).to(dtype)


def check_normed(y, x, norm, weight, bias, residual, epilogue, eps=1e-5):
    """Against LayerNorm and the layer, each rounded to y's dtype, and against fp64."""
    args, K = (residual, epilogue), (weight.K,)
    low = linear_reference(F.layer_norm(x, K, *norm, eps), weight, bias, *args)
    wide = F.layer_norm(x.double(), K, *(each.double() for each in norm), eps)
    residual = None if residual is None else residual.double()
    high = linear_reference(wide, weight, bias.double(), residual, epilogue)
    assert_as_accurate(y, low, high)


def input_norm(x, weight, norm, eps=1e-5):
    return InputNorm(row_statistics(x), norm[0], norm_columns(weight, *norm), eps)


def of_norm(x, weight, norm):
    """The arguments of ``low_bit_linear_normed`` that come before the weight."""
    rows = x.reshape(-1, x.shape[-1])
    return x, row_statistics(rows), *norm, norm_columns(weight, *norm)


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
    x, norm = stream(M, K, torch.float16, device), make_norm(K, torch.float16, device)
    config, given = LinearConfig(32, 16, splits=splits), input_norm(x, weight, norm)
    y, _ = linear_triton(x[None], weight, bias, residual, None, config, norm=given)
    check_normed(y, x, norm, weight, bias, residual, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("mean", "outlier"), [(0.0, 0.0), (8.0, 50.0), (300.0, 50.0)])
def test_the_kernels_formula_is_as_exact_as_two_ops(mean, outlier, dtype, device):
    """Of a wide layer, in plain PyTorch: sums in fp32, of a residual stream as speech models'."""
    _, weight, bias, _ = make_inputs(40, 96, 1024, W4, dtype, device)
    x = torch.randn(40, 1024, device=device) + mean
    x[:, 7] += outlier * x[:, 7].sign()
    x, norm = x.to(dtype), make_norm(1024, dtype, device)
    mean, rstd = merge_statistics(row_statistics(x), 1024, 1e-5)
    column, shift = norm_columns(weight, *norm)
    sums = x.float() @ (weight.integers().to(dtype) * norm[0]).float().T
    z = (sums - mean[:, None] * column) * rstd[:, None] + shift
    y = (z * weight.scale + bias.float()).to(dtype)
    check_normed(y, x, norm, weight, bias, None, None)


@splits
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_kernel_normalizes_before_the_epilogue(epilogue, splits, device):
    _, weight, bias, residual = make_inputs(37, 38, 300, W4, torch.float16, device, epilogue)
    x, norm = stream(37, 300, torch.float16, device), make_norm(300, torch.float16, device)
    config = LinearConfig(32, 64, splits=splits)  # rows are written in two parts
    y, z = linear_triton(
        x[None], weight, bias, residual, epilogue, config, norm=input_norm(x, weight, norm),
        want_preactivation=True,
    )  # fmt: skip
    check_normed(y, x, norm, weight, bias, residual, epilogue)
    check_normed(z, x, norm, weight, bias, None, None)


@splits
@pytest.mark.parametrize("eps", [1e-5, 0.25])
def test_eps_of_nearly_constant_rows(eps, splits, device):
    _, weight, bias, _ = make_inputs(5, 38, 100, W4, torch.float16, device)
    x = torch.randn(5, 100, device=device) * torch.logspace(-4, 0, 5, device=device)[:, None] + 1
    x = x.half()
    x[0] = 3
    config = LinearConfig(32, 16, splits=splits)
    norm = make_norm(100, torch.float16, device)
    given = input_norm(x, weight, norm, eps)
    y, _ = linear_triton(x[None], weight, bias, None, None, config, norm=given)
    check_normed(y, x, norm, weight, bias, None, None, eps)


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
    norm = make_norm(after.K, dtype, device)
    columns = norm_columns(after, *norm)
    y = low_bit_linear_normed(
        h, stats, *norm, columns, after, after_bias, epilogue="gelu", residual=x
    )
    check_normed(y.flatten(0, 1), rows, norm, after, after_bias, x.flatten(0, 1), "gelu")


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
    norm = make_norm(N, torch.float16, device)
    given = InputNorm(stats, norm[0], norm_columns(after, *norm), 1e-5)

    def run():
        h = cuda_linear.linear_folded_cuda(x, weight, bias, residual, None, stats=stats)
        return h, cuda_linear.linear_folded_cuda(h, after, after_bias, None, "gelu", norm=given)

    if device == "cuda":
        h, y = run()
    else:
        with checked_memory():
            h, y = run()
    check_statistics(stats, h)
    check_normed(y, h, norm, after, after_bias, None, "gelu")


@pytest.mark.parametrize("shape", [(0, 70), (2, 0, 70), (70,)])
def test_any_number_of_rows(shape, device):
    _, (weight, bias) = producer_and_consumer(device, N=70, hidden=8)
    x = torch.randn(shape, device=device).half()
    norm = make_norm(70, torch.float16, device)
    y = low_bit_linear_normed(*of_norm(x, weight, norm), weight, bias)
    assert y.shape == (*shape[:-1], 8)
    h, made = low_bit_linear_with_stats(x, weight, bias)
    assert h.shape == y.shape
    assert made.shape == (1, 2, x.numel() // 70)


def test_ops_are_registered_correctly(device):
    (x, weight, bias, residual), (after, after_bias) = producer_and_consumer(device)
    args = (x, bias, residual, "silu", *flatten(weight))
    torch.library.opcheck(torch.ops.lowbit.linear_with_stats.default, args)
    norm = make_norm(after.K, torch.float16, device)
    args = (*of_norm(residual, after, norm), 1e-5, after_bias, x, None, *flatten(after))
    torch.library.opcheck(torch.ops.lowbit.linear_normed.default, args)


def test_wrong_arguments_are_named(device):
    (_, _, _, x), (weight, bias) = producer_and_consumer(device)
    names = ("x", "stats", "norm_weight", "norm_bias", "columns")
    norm = make_norm(150, torch.float16, device)
    good = dict(zip(names, of_norm(x, weight, norm), strict=True))
    good |= {"weight": weight, "bias": bias}
    stats = good["stats"]
    asymmetric = quantize_weight(torch.randn(70, 150, device=device), QuantSpec(4, symmetric=False))
    int8 = quantize_weight(torch.randn(70, 150, device=device), QuantSpec(4, inputs="int8"))
    for change, error, message in (
        ({"x": x.float()}, ValueError, r"x must be fp16 or bf16, got torch\.float32"),
        ({"x": x[..., :64]}, ValueError, r"x must be \[\.\.\., K\] with K = 150"),
        ({"stats": stats[:2]}, ValueError, r"stats must be \[3, 2, 6\], got \[2, 2, 6\]"),
        ({"stats": stats.half()}, ValueError, r"stats must be torch\.float32"),
        ({"norm_weight": norm[0].float()}, ValueError, r"norm_weight must be torch\.float16"),
        ({"norm_bias": norm[1][:70]}, ValueError, r"norm_bias must be \[150\], got \[70\]"),
        ({"columns": good["columns"].half()}, ValueError, r"columns must be torch\.float32"),
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
        norm = make_norm(150, torch.float16, device)
        low_bit_linear_normed(h, stats, *norm, norm_columns(after, *norm), after, after_bias)
    assert counter.get_total_flops() == 2 * (2 * 6 * 150 * 70)


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
            norm = make_norm(C, dtype, "cuda")
            given = of_norm(rows, after, norm)
            y = low_bit_linear_normed(*given, after, after_bias, epilogue="gelu")
            check_normed(y, rows, norm, after, after_bias, None, "gelu")


def test_few_steps_are_in_flight_on_amd():
    deep = LinearConfig(128, 64, num_stages=4)
    amd = Gpu("MI300X", (9, 4), 304, 64 * 1024, is_hip=True)
    assert taking_norm(deep, amd) == replace(deep, num_stages=3)
    assert taking_norm(replace(deep, num_stages=2), amd).num_stages == 2
    assert taking_norm(deep, replace(amd, is_hip=False)) is deep
