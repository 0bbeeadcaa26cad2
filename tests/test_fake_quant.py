"""fake_quantize: meaning, kernels, gradients, registration and errors.

Dimension key: M rows, K columns.
"""

import math
from dataclasses import replace

import pytest
import torch

from lowbit_kernels import QuantSpec, fake_quantize
from lowbit_kernels.fake_quant import Levels, Quantizer, initial_scale, weight_scale
from lowbit_kernels.fake_quant.elementwise_kernel import (
    BLOCK_ROW,
    fake_quantize_backward_triton,
    fake_quantize_triton,
    sum_parts_triton,
)
from lowbit_kernels.fake_quant.op import flatten
from lowbit_kernels.fake_quant.reference import (
    as_matrices,
    fake_quantize_backward_reference,
    fake_quantize_reference,
)
from lowbit_kernels.formats import quantize_weight
from lowbit_kernels.testing import assert_as_accurate
from tests.fake_quant_cases import LEVELS, all_levels, expected, granularities, make_quantizer

DTYPES = [
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter lacks bf16
]
SHAPES = [
    pytest.param(16, 256, id="whole-tiles"),
    pytest.param(11, 301, id="ragged"),
    pytest.param(1, 70, id="one-row"),
    pytest.param(300, 768, id="frames", marks=pytest.mark.gpu),
]
# elastic differs from lsq in the levels {-1, 1} only
LEARNED = [("lsq", name) for name in LEVELS] + [("elastic", "w1"), ("elastic", "w4")]
learned = pytest.mark.parametrize("method", ["lsq", "elastic"])


def by_op(x, quantizer, grad):
    x = x.detach().requires_grad_()
    scale = quantizer.scale.detach().requires_grad_()
    y = fake_quantize(x, replace(quantizer, scale=scale))
    y.backward(grad)
    return y.detach(), x.grad, scale.grad


def by_kernel(x, quantizer, grad):
    rows, matrices = as_matrices(x, quantizer)
    y = fake_quantize_triton(rows, matrices, x.dtype)
    dx, dscale = fake_quantize_backward_triton(grad[None], rows, matrices)
    return y, dx, dscale.view(quantizer.scale.shape)


@pytest.mark.parametrize("run", [by_op, by_kernel])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K"), SHAPES)
@granularities
@pytest.mark.parametrize(("method", "name"), LEARNED)
def test_results_and_gradients_match_the_formula(
    method, name, granularity, M, K, dtype, run, device
):
    levels = LEVELS[name]
    x = torch.randn(M, K, device=device).to(dtype)
    quantizer = make_quantizer((M,), K, levels, granularity, method, device)
    # a sum over a tensor is one number, whose error is luck: several have a largest error
    grads = torch.randn(4, M, K, device=device).to(dtype)
    actual = [run(x, quantizer, grad) for grad in grads]
    low = [expected(x, quantizer, grad, torch.float32) for grad in grads]
    high = [expected(x, quantizer, grad, torch.float64) for grad in grads]
    for i, result_name in enumerate(("y", "dx", "dscale")):
        a, b, c = (
            torch.stack([result[i] for result in results]) for results in (actual, low, high)
        )
        assert_as_accurate(a, b.to(a.dtype), c, result_name)


@granularities
@all_levels
def test_kernels_have_the_reference_s_integers_and_masks(levels, granularity, device):
    x, grad = torch.randn(2, 37, 301, device=device)
    quantizer = make_quantizer((37,), 301, levels, granularity, device=device)
    y, dx, _ = by_kernel(x, quantizer, grad)
    rows, matrices = as_matrices(x, quantizer)
    assert torch.equal(y, fake_quantize_reference(rows, matrices))
    assert torch.equal(dx, fake_quantize_backward_reference(grad, rows, matrices)[0])


@pytest.mark.parametrize("granularity", ["tensor", "row", "two-level"])
@all_levels
def test_straight_through(levels, granularity, device):
    x, grad = torch.randn(2, 5, 130, device=device)
    quantizer = make_quantizer((5,), 130, levels, granularity, "ste", device, center=True)
    x.requires_grad_()
    y = fake_quantize(x, quantizer)
    y.backward(grad)
    assert torch.equal(x.grad, grad)
    high, _, _ = expected(x, quantizer, grad, torch.float64)
    assert_as_accurate(y.detach(), expected(x, quantizer, grad, torch.float32)[0], high)
    kernel = fake_quantize_triton(*as_matrices(x.detach(), quantizer), x.dtype)
    assert torch.equal(kernel, y)


@pytest.mark.parametrize("K", [70, BLOCK_ROW + 50])
@pytest.mark.parametrize("levels", [Levels.of_input(8), Levels.of_input(4)], ids=["a8", "a4"])
def test_rows_with_their_own_scale(levels, K, device):
    x = torch.randn(3, K, device=device)
    x[1] = 0
    y = fake_quantize(x, Quantizer(levels))
    scale = x.double().abs().amax(1, keepdim=True) / levels.high
    high = (x / scale.clamp_min(1e-300)).round() * scale
    assert_as_accurate(y, high.float(), high)
    assert torch.equal(fake_quantize_triton(x, Quantizer(levels), x.dtype), y)


def test_bits_of_rows_are_those_of_int8_inputs(device):
    from lowbit_kernels.matmul.reference import input_scale_rows, quantize_rows

    x = torch.randn(9, 333, device=device)
    scale = input_scale_rows(x, "token", None)
    wanted = quantize_rows(x, scale) * scale[:, None]
    assert torch.equal(fake_quantize(x, Quantizer(Levels.of_input(8))), wanted)


@pytest.mark.parametrize(
    "spec", [QuantSpec(8), QuantSpec(4), QuantSpec(2), QuantSpec(1), QuantSpec(1, 32)], ids=str
)
def test_levels_of_weights_are_the_format_s(spec, device):
    """Fake quantization with a packed weight's scales changes nothing about it."""
    packed = quantize_weight(torch.randn(9, 200, device=device), spec)
    quantizer = Quantizer(
        Levels.of_weight(spec.bits), packed.scale, "ste", packed.group_scale, spec.group
    )
    assert torch.equal(fake_quantize(packed.dequantize(), quantizer), packed.dequantize())


def test_a_nan_stays_one_and_an_infinity_is_clipped(device):
    x = torch.randn(4, 64, device=device)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    quantizer = make_quantizer((4,), 64, Levels.of_weight(4), "row", device=device)
    for y in (fake_quantize(x, quantizer), by_kernel(x, quantizer, x)[0]):
        assert torch.equal(y.isnan(), x.isnan())
        assert y[2, 5] == 7 * quantizer.scale[2]
    own = Quantizer(Levels.of_input(8))
    for y in (fake_quantize(x, own), fake_quantize_triton(x, own, x.dtype)):
        assert y[1].isnan().all()
        assert y[2].isnan().all()
        assert y[[0, 3]].isfinite().all()


def test_a_scale_below_the_smallest_can_recover(device):
    x = torch.ones(4, 64, device=device)
    scale = torch.tensor([-1.0], device=device, requires_grad=True)
    y = fake_quantize(x, Quantizer(Levels.of_weight(4), scale, "lsq"))
    assert (y > 0).all()
    (-y.sum()).backward()
    assert scale.grad < 0  # a step of the optimizer makes it larger


@learned
def test_saturated_and_binary_scales_match_finite_differences(method):
    """There y is linear in the scale, so its gradient is the true one times LSQ's factor."""
    cases = [(8.0, "w4"), (8.0, "w2"), (8.0, "u4")] + [(0.3, "w1")] * (method == "elastic")
    for offset, name in cases:
        levels = LEVELS[name]
        x = torch.randn(3, 70, dtype=torch.float64).sign() * offset + torch.randn(3, 70) / 100
        for granularity in ("tensor", "row", "group"):
            quantizer = make_quantizer((3,), 70, levels, granularity, method)
            factor = (quantizer.scale.numel() / (x.numel() * levels.high)) ** 0.5
            scale = quantizer.scale.double().requires_grad_()
            weight = torch.randn(3, 70, dtype=torch.float64)

            def run(scale, quantizer=quantizer, x=x, weight=weight):
                return (fake_quantize(x, replace(quantizer, scale=scale)) * weight).sum()

            (dscale,) = torch.autograd.grad(run(scale), scale)
            numeric = torch.zeros_like(dscale)
            for i in range(scale.numel()):
                step = torch.zeros(scale.numel(), dtype=torch.float64)
                step[i] = 1e-3
                step = step.view(scale.shape)
                numeric.view(-1)[i] = (run(scale + step) - run(scale - step)).detach() / 2e-3
            torch.testing.assert_close(dscale, numeric * factor)


@pytest.mark.parametrize("rows", [(), (0,), (2, 0), (2, 3)], ids=str)
@granularities
def test_any_number_of_rows(granularity, rows, device):
    x = torch.randn(*rows, 70, device=device, requires_grad=True)
    quantizer = make_quantizer(rows, 70, Levels.of_weight(4), granularity, device=device)
    scale = quantizer.scale.requires_grad_()
    y = fake_quantize(x, quantizer)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert scale.grad.shape == scale.shape
    assert scale.grad.isfinite().all()
    assert fake_quantize(x, Quantizer(Levels.of_input(8))).shape == x.shape


@granularities
def test_strides_do_not_matter(granularity, device):
    x = torch.randn(6, 70, device=device)
    quantizer = make_quantizer((6,), 70, Levels.of_weight(4), granularity, device=device)
    strided = torch.randn(70, 12, device=device).t()[::2]
    strided.copy_(x)
    scale = torch.empty(*quantizer.scale.shape, 2, device=device)[..., 0].copy_(quantizer.scale)
    y = fake_quantize(strided, replace(quantizer, scale=scale))
    assert torch.equal(y, fake_quantize(x, quantizer))
    assert y.is_contiguous()


def test_the_same_bits_twice(device):
    x, grad = torch.randn(2, 300, 700, device=device)
    quantizer = make_quantizer((300,), 700, Levels.of_weight(4), "tensor", device=device)
    first, second = (by_kernel(x, quantizer, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_parts_are_summed_in_order(device):
    parts = torch.randn(3, 11, 301, device=device)
    parts[0] *= 1e6
    assert torch.equal(sum_parts_triton(parts, torch.float32), (parts[0] + parts[1]) + parts[2])


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("method", ["ste", "lsq"])
@granularities
def test_ops_are_registered_correctly(granularity, method, permuted, device):
    x = torch.randn(2, 3, 70, device=device)
    if permuted:  # a fake that copies the strides of x is right on contiguous inputs only
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    quantizer = make_quantizer((2, 3), 70, Levels.of_weight(4), granularity, method, device)
    if method == "lsq":
        quantizer.scale.requires_grad_()
    packed = flatten(quantizer)
    torch.library.opcheck(torch.ops.lowbit.fake_quantize.default, (x.requires_grad_(), *packed))
    if method == "lsq":
        backward = torch.ops.lowbit.fake_quantize_backward.default
        inputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in packed]
        torch.library.opcheck(backward, (torch.randn_like(x), x.detach(), *inputs))


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_compiles_to_one_graph(method, device):
    quantizer = make_quantizer((6,), 70, Levels.of_weight(4), "two-level", method, device)

    def run(x, scale):
        return fake_quantize(x * 2, replace(quantizer, scale=scale)).sin()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        x = torch.randn(6, 70, device=device, requires_grad=True)
        scale = quantizer.scale.clone().requires_grad_(method == "lsq")
        y = function(x, scale)
        y.sum().backward()
        results.append((y, x.grad, scale.grad))
    for eager, compiled in zip(*results, strict=True):
        assert (eager is None and compiled is None) or torch.equal(eager, compiled)


def test_where_a_learned_scale_starts():
    x = torch.randn(1000)
    mean = x.abs().mean()
    for levels, factor in ((Levels.of_input(8), 2 / math.sqrt(127)), (Levels.of_input(1), 2)):
        torch.testing.assert_close(initial_scale(x, levels), mean * factor)
    unsigned = Levels.of_input(2, signed=False)
    torch.testing.assert_close(initial_scale(x, unsigned), mean * 4 / math.sqrt(3))


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_weight_scales_follow_the_weight(bits):
    """Near the format's own search, and exact where a closed form exists."""
    weight = torch.randn(6, 512)
    levels = Levels.of_weight(bits)
    scale = weight_scale(weight, levels, None, 0, shared=False)
    if bits >= 4:
        assert torch.equal(scale, weight.abs().amax(1) / levels.high)
    else:
        best = quantize_weight(weight, QuantSpec(bits, None), "search").scale
        assert ((scale / best - 1).abs() < 0.1).all()  # of 512 samples of the law
    shared = weight_scale(weight, levels, None, 0, shared=True)
    assert shared.shape == (1,)
    assert shared >= scale.min()
    # doubled group scales halve the scale, and a group of zeros changes no largest magnitude
    ones = torch.full((6, 8), 2, dtype=torch.uint8)
    halved = weight_scale(weight, levels, ones, 64, shared=False)
    torch.testing.assert_close(halved, scale / 2)


def test_weight_scale_of_a_ragged_group_is_least_squares():
    weight, m = torch.randn(3, 70), torch.tensor([[1, 5]] * 3, dtype=torch.uint8)
    scale = weight_scale(weight, Levels.of_weight(1), m, 64, shared=False)
    multiplier = m.float().repeat_interleave(64, 1)[:, :70]
    wanted = (weight.abs() * multiplier).sum(1) / multiplier.square().sum(1)
    torch.testing.assert_close(scale, wanted)


W4 = Levels.of_weight(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Levels(-8, 7, 3), "step must be 1 or 2, got 3"),
        (lambda: Levels(-8, 7, 2), "low and high must enclose 0"),
        (lambda: Levels.of_weight(3), r"bits must be one of \(8, 4, 2, 1\), got 3"),
        (lambda: Levels.of_input(16), "bits must be one of .* got 16"),
        (lambda: Quantizer(W4, torch.ones(1), "pact"), "method must be one of .* got 'pact'"),
        (lambda: Quantizer(W4, None, "lsq"), "scale must be given except with method 'ste'"),
        (lambda: Quantizer(W4, torch.ones(5)), r"scale must have 1 element or shape \(4,\)"),
        (lambda: Quantizer(W4, torch.ones(4).int()), "scale must be floating point"),
        (lambda: Quantizer(W4, torch.ones(4, 2), group_size=48), "group_size must be a power"),
        (lambda: Quantizer(W4, torch.ones(4, 3), group_size=64), r"shape \(4, 2\)"),
        (
            lambda: Quantizer(W4, torch.ones(4), "ste", torch.ones(4, 2), 64),
            r"group_scale must be uint8 \(4, 2\) with group_size 64, got torch.float32",
        ),
        (
            lambda: Quantizer(W4, torch.ones(4), "lsq", center=torch.zeros(4)),
            "center must be None with method 'lsq'",
        ),
        (lambda: 4, "quantizer must be a Quantizer, got int"),
    ],
)
def test_wrong_quantizers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        fake_quantize(torch.randn(4, 70), make())


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"x must be fp16, bf16 or fp32 .* got torch\.int64"):
        fake_quantize(torch.ones(4, dtype=torch.long), Quantizer(W4))
    with pytest.raises(ValueError, match="got a scalar"):
        fake_quantize(torch.ones(()), Quantizer(W4))
