"""training_linear: meaning, the weight gradient's kernel, registration, gradients and errors.

Dimension key: M rows of the input, N output features, K input features.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.checks import EPILOGUES
from lowbit_kernels.fake_quant import Levels, Quantizer, linear_cuda, training_linear
from lowbit_kernels.fake_quant.dispatch import WeightGradientConfig, choose_weight_gradient_config
from lowbit_kernels.fake_quant.op import flatten
from lowbit_kernels.fake_quant.reference import as_matrices
from lowbit_kernels.fake_quant.weight_gradient_kernel import weight_gradient_triton
from lowbit_kernels.matmul.reference import apply_epilogue
from lowbit_kernels.testing import assert_as_accurate
from tests.fake_quant_cases import LEVELS, expected, formula, make_quantizer

QUANTIZERS = ["float", "ste", "lsq-tensor", "lsq-row", "lsq-group", "lsq-two-level", "elastic-row"]
quantizers = pytest.mark.parametrize("kind", QUANTIZERS)
SMALL = WeightGradientConfig(64, 64, 32, num_warps=4)
DTYPES = [
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter lacks bf16
]


def make_weight_quantizer(kind, weight):
    if kind == "float":
        return None
    method, _, granularity = kind.partition("-")
    levels = LEVELS["w1" if method == "elastic" else "w4"]
    granularity, device = granularity or "row", weight.device
    quantizer = make_quantizer(
        weight.shape[:1], weight.shape[1], levels, granularity, method, device
    )
    return replace(quantizer, scale=quantizer.scale / weight.shape[1] ** 0.5)


def make_inputs(M, N, K, kind, dtype=torch.float32, device="cpu", epilogue=None):
    """x, weight, bias, residual, quantizer."""
    x = torch.randn(M, K, device=device, dtype=dtype)
    weight = torch.randn(N, K, device=device) / K**0.5
    bias = torch.randn(N, device=device, dtype=dtype)
    residual = torch.randn(M, N // 2 if epilogue == "glu" else N, device=device, dtype=dtype)
    return x, weight, bias, residual, make_weight_quantizer(kind, weight)


def run(function, x, weight, bias, residual, quantizer, epilogue, grad):
    """The output, and gradients of x, weight, bias, residual and scale."""
    tensors = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    if quantizer is not None:
        tensors.append(quantizer.scale.detach().requires_grad_())
        quantizer = replace(quantizer, scale=tensors[-1])
    y = function(*tensors[:4], quantizer, epilogue)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(t.grad for t in tensors)]


def by_op(x, weight, bias, residual, quantizer, epilogue):
    return training_linear(
        x, weight, bias, quantizer=quantizer, epilogue=epilogue, residual=residual
    )


def by_torch(x, weight, bias, residual, quantizer, epilogue):
    if quantizer is not None:
        weight = formula(weight, quantizer, quantizer.scale.to(weight.dtype))
    return apply_epilogue(F.linear(x, weight.to(x.dtype), bias), epilogue) + residual


def in_fp64(tensors, quantizer):
    if quantizer is not None:
        quantizer = replace(quantizer, scale=quantizer.scale.double())
    return [*(t.double() for t in tensors), quantizer]


@pytest.mark.parametrize("epilogue", EPILOGUES)
@quantizers
def test_op_equals_its_meaning(kind, epilogue, device):
    *tensors, quantizer = make_inputs(6, 38, 101, kind, device=device, epilogue=epilogue)
    # a sum over a tensor is one number, whose error is luck: several have a largest error
    for grad in torch.randn(2, *tensors[3].shape, device=device):
        actual = run(by_op, *tensors, quantizer, epilogue, grad)
        low = run(by_torch, *tensors, quantizer, epilogue, grad)
        high = run(by_torch, *in_fp64(tensors, quantizer), epilogue, grad.double())
        names = ("y", "dx", "dweight", "dbias", "dresidual", "dscale")
        for name, a, b, c in zip(names, actual, low, high, strict=False):
            if b is None:
                assert a is None
            else:
                assert_as_accurate(a, b, c, name)


SHAPES = [  # M, N, K, config
    pytest.param(64, 128, 64, SMALL, id="whole-tiles"),
    pytest.param(45, 70, 101, SMALL, id="ragged"),
    pytest.param(45, 70, 301, WeightGradientConfig(), id="ragged-large-tiles"),
    pytest.param(150, 70, 101, replace(SMALL, splits=3), id="split"),
    pytest.param(40, 70, 101, replace(SMALL, splits=4), id="split-with-an-empty-part"),
    pytest.param(1, 1300, 70, SMALL, id="one-row-many-strips"),
    pytest.param(0, 70, 101, SMALL, id="no-rows"),
    pytest.param(1999, 1024, 4096, WeightGradientConfig(), id="large", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K", "config"), SHAPES)
@pytest.mark.parametrize("kind", ["float", "lsq-row", "lsq-tensor", "lsq-two-level", "elastic-row"])
def test_weight_gradient_kernel(kind, M, N, K, config, dtype, device):
    x, weight, _, dz, quantizer = make_inputs(M, N, K, kind, dtype, device)
    found = quantizer and as_matrices(weight, quantizer)[1]
    dweight, dscale = weight_gradient_triton(dz, x, weight, found, config)
    low = dz.float().t() @ x.float()
    high = dz.double().t() @ x.double()
    if quantizer is None:
        assert dscale is None
    else:
        _, low, low_dscale = expected(weight, quantizer, low, torch.float32)
        _, high, high_dscale = expected(weight, quantizer, high, torch.float64)
        if quantizer.scale.numel() > 1:  # the error of one number is luck
            assert_as_accurate(dscale.view_as(low_dscale), low_dscale, high_dscale, "dscale")
    assert_as_accurate(dweight, low, high, "dweight")


def test_fused_and_split_gradients_of_a_scale_agree(device):
    """All of them see the same masks, so they differ by the order of sums only."""
    x, weight, _, dz, quantizer = make_inputs(300, 70, 301, "lsq-two-level", torch.float16, device)
    dz, x = dz.sign(), x.sign()  # integers, whose sums are exact in any order
    matrices = as_matrices(weight, quantizer)[1]
    results = [
        weight_gradient_triton(dz, x, weight, matrices, replace(SMALL, splits=splits))
        for splits in (1, 3)
    ]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    again = weight_gradient_triton(dz, x, weight, matrices, SMALL)
    assert all(map(torch.equal, results[0], again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@quantizers
def test_cuda_path(kind, dtype, device, monkeypatch):
    """The launches of a GPU, one after the other, against torch's own layer."""
    monkeypatch.setattr(linear_cuda, "_num_sms", lambda device: 132)
    x, weight, bias, residual, quantizer = make_inputs(70, 38, 101, kind, dtype, device)
    matrices = quantizer and as_matrices(weight, quantizer)[1]
    rounded = linear_cuda.round_weight_cuda(weight, matrices, dtype)
    y, z = linear_cuda.training_linear_cuda(x, rounded, bias, residual, "gelu")
    grad = torch.randn_like(y)
    dz, dbias = linear_cuda.preactivation_gradient_cuda(grad, z, "gelu", True)
    learned = None if quantizer is None or quantizer.method == "ste" else matrices
    dweight, dscale = linear_cuda.weight_gradient_cuda(dz, x, weight, learned)
    actual = [y, dz @ rounded, dweight, dbias, grad]
    low = run(by_torch, x, weight, bias, residual, quantizer, "gelu", grad)
    tensors = in_fp64((x, weight, bias, residual), quantizer)
    high = run(by_torch, *tensors, "gelu", grad.double())
    for i, a in enumerate(actual):
        assert_as_accurate(a, low[i], high[i], f"result {i}")
    if dscale is not None and dscale.numel() > 1:
        assert_as_accurate(dscale.view_as(low[5]), low[5], high[5], "dscale")


def test_tiles_by_shape():
    def choose(*shape):
        return choose_weight_gradient_config(*shape, num_sms=132)

    assert choose(2000, 4096, 1024) == WeightGradientConfig()
    assert choose(16000, 1024, 1024).splits > 1  # 64 tiles on 132 multiprocessors
    assert choose(499, 1024, 1024).splits == 1  # too short for a second pass to pay
    assert choose(2000, 196, 196).block_n == 64
    assert choose(2000, 196, 196).splits > 4
    assert choose(0, 196, 196).splits == 1


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_float_gradients_match_finite_differences(epilogue):
    x, weight, bias, residual, _ = make_inputs(4, 6, 7, "float", torch.float64, epilogue=epilogue)

    def function(*tensors):
        return by_op(*tensors, None, epilogue)

    tensors = [t.requires_grad_() for t in (x, weight.double(), bias, residual)]
    torch.autograd.gradcheck(function, tensors)


def test_quantized_gradients_match_finite_differences():
    x, weight, bias, residual, quantizer = make_inputs(4, 6, 70, "lsq-two-level", torch.float64)

    def function(x, bias, residual):
        return by_op(x, weight.double(), bias, residual, quantizer, "gelu")

    torch.autograd.gradcheck(function, [t.requires_grad_() for t in (x, bias, residual)])


@pytest.mark.parametrize("rows", [(), (0,), (2, 0), (2, 3)], ids=str)
@quantizers
def test_any_number_of_batch_dimensions(kind, rows, device):
    _, weight, bias, _, quantizer = make_inputs(1, 8, 70, kind, device=device)
    x = torch.randn(*rows, 70, device=device, requires_grad=True)
    weight.requires_grad_()
    y = training_linear(x, weight, bias.requires_grad_(), quantizer=quantizer, epilogue="gelu")
    y.sum().backward()
    assert y.shape == (*rows, 8)
    assert x.grad.shape == x.shape
    assert weight.grad.isfinite().all()


def test_only_what_is_asked_for_gets_a_gradient(device):
    x, weight, bias, residual, quantizer = make_inputs(4, 6, 70, "lsq-row", device=device)
    y = by_op(x, weight, bias, residual.requires_grad_(), quantizer, "gelu")
    y.sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))
    scale = quantizer.scale.requires_grad_()
    by_op(x, weight, bias, residual, quantizer, "gelu").sum().backward()
    assert weight.grad is None
    assert scale.grad is not None
    with torch.no_grad():
        inference = by_op(x, weight, bias, residual, quantizer, "gelu")
    assert not inference.requires_grad


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("epilogue", [None, "glu"])
@pytest.mark.parametrize("kind", ["float", "ste", "lsq-two-level"])
def test_ops_are_registered_correctly(kind, epilogue, permuted, device):
    from lowbit_kernels.fake_quant.linear_op import FLOAT

    x, weight, bias, residual, quantizer = make_inputs(
        6, 16, 70, kind, device=device, epilogue=epilogue
    )
    x, residual = x.view(2, 3, 70), residual.view(2, 3, -1)
    if permuted:  # a fake that copies the strides of x is right on contiguous inputs only
        x, residual = (t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (x, residual))
        weight = weight.t().contiguous().t()
    tensors = [t.requires_grad_() for t in (x, weight, bias, residual)]
    packed = FLOAT if quantizer is None else flatten(quantizer)
    op = torch.ops.lowbit.training_linear.default
    torch.library.opcheck(op, (*tensors, epilogue, True, *packed))
    grad, z = torch.randn_like(residual).detach(), torch.randn(2, 3, 16, device=device)
    rounded = None if quantizer is None else weight.detach().clone()
    torch.library.opcheck(
        torch.ops.lowbit.training_linear_backward.default,
        (
            *(grad, x.detach(), weight.detach(), None if epilogue is None else z, rounded),
            *(epilogue, True, True, True, *packed),
        ),
    )


@pytest.mark.parametrize("kind", ["float", "lsq-two-level"])
def test_compiles_to_one_graph(kind, device):
    *tensors, quantizer = make_inputs(6, 16, 70, kind, device=device)
    compiled = torch.compile(by_op, fullgraph=True, backend="aot_eager")
    grad = torch.randn(6, 16, device=device)
    results = [run(f, *tensors, quantizer, "gelu", grad) for f in (by_op, compiled)]
    assert all(map(torch.equal, *results))


def test_autocast_keeps_the_weight_in_fp32(device):
    x, weight, bias, _, quantizer = make_inputs(4, 6, 70, "lsq-row", device=device)
    weight.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = training_linear(x, weight, bias.requires_grad_(), quantizer=quantizer)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    low = (t.detach().bfloat16() for t in (x, bias))
    x, bias = low
    assert torch.equal(y, training_linear(x, weight, bias, quantizer=quantizer))


@pytest.mark.parametrize(
    ("trains", "products"), [("xw", 3), ("x", 2), ("w", 2), ("b", 1)], ids=lambda v: str(v)
)
def test_flops_are_those_of_the_products_needed(trains, products, device):
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias, _, quantizer = make_inputs(4, 6, 70, "lsq-row", device=device, epilogue="glu")
    for name, tensor in (("x", x), ("w", weight), ("b", bias)):
        tensor.requires_grad_(name in trains)
    with FlopCounterMode(display=False) as counter:
        y = training_linear(x, weight, bias, quantizer=quantizer, epilogue="glu")
        y.sum().backward()
    assert counter.get_total_flops() == products * (2 * 4 * 6 * 70)


W4 = Levels.of_weight(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epilogue": "tanh"}, "epilogue must be one of .* got 'tanh'"),
        ({"weight": torch.ones(0, 8)}, r"weight must be \[N, K\] and not empty"),
        ({"weight": torch.ones(7, 8), "epilogue": "glu"}, "even number of rows, got N = 7"),
        ({"weight": torch.ones(6, 9)}, r"x must be \[..., K\] with K = 9"),
        ({"bias": torch.ones(5)}, r"bias must be \[6\], got \[5\]"),
        ({"residual": torch.ones(4, 6).half()}, "residual must be torch.float32 on cpu like x"),
        ({"x": torch.ones(4, 8).long()}, "x must be fp16, bf16 or fp32"),
        ({"quantizer": Quantizer(W4)}, "scale must be given for a weight"),
        ({"quantizer": Quantizer(W4, torch.ones(4))}, r"scale must have 1 element or shape \(6,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": torch.ones(4, 8), "weight": torch.ones(6, 8)} | change
    with pytest.raises(ValueError, match=message):
        training_linear(**arguments)
