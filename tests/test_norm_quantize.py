"""norm_quantize, and what holds for both norms: kernels, gradients, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from lowbit_kernels.matmul.reference import MIN_INPUT_SCALE
from lowbit_kernels.norm import (
    masked_group_norm,
    norm_of_norm,
    norm_quantize,
    norm_quantize_kernel,
    norm_quantize_reference,
)
from lowbit_kernels.norm.group_norm_kernel import masked_group_norm_triton
from lowbit_kernels.norm.norm_quantize_kernel import (
    norm_quantize_backward_triton,
    norm_quantize_triton,
)
from lowbit_kernels.norm.reference import quantize_rows_reference
from lowbit_kernels.testing import assert_as_accurate
from tests.norm_cases import (
    DTYPES,
    EPS,
    assert_quantized,
    group_norm_kernels,
    make_group_inputs,
)

# no lengths, activation or static scale, but int8
PLAIN = (None, None, None, True)
ROW_SHAPES = [
    pytest.param((4, 128), id="whole-tiles"),
    pytest.param((3, 5, 100), id="ragged"),
    pytest.param((3, 700), id="several-loads-a-row"),
    pytest.param((2, 1100), id="two-warps-a-row"),
    pytest.param((1, 1), id="one-feature"),
    pytest.param((7,), id="one-row"),
    pytest.param((8, 499, 768), id="wav2vec2-base", marks=pytest.mark.gpu),
]


def norm_inputs(shape, has_residual, dtype, device):
    x = torch.randn(shape, dtype=dtype, device=device)
    weight, bias = torch.randn(2, shape[-1], dtype=dtype, device=device)
    return x, weight, bias, torch.randn_like(x) if has_residual else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_norm_quantize_kernels_are_as_accurate_as_torch(shape, has_residual, dtype, device):
    x, weight, bias, residual = norm_inputs(shape, has_residual, dtype, device)
    h, _, q, scale, mean, rstd = norm_quantize_triton(x, weight, bias, residual, EPS, False)
    total = x + residual if has_residual else x
    if has_residual:
        assert torch.equal(h, total)
    leaves = [leaf.double().requires_grad_() for leaf in (total, weight, bias)]
    high = F.layer_norm(leaves[0], shape[-1:], leaves[1], leaves[2], EPS)
    low_leaves = [leaf.float().detach().requires_grad_() for leaf in (total, weight, bias)]
    low = F.layer_norm(low_leaves[0], shape[-1:], low_leaves[1], low_leaves[2], EPS)
    assert_quantized(q, scale, low.detach(), high.detach())
    _, y, q, scale, _, _ = norm_quantize_triton(x, weight, bias, residual, EPS, True)
    assert_as_accurate(y, low.detach().to(dtype), high.detach(), "y")
    assert_quantized(q, scale, y.float(), y.double())

    grad_y, grad_h = torch.randn_like(x), torch.randn_like(x) if has_residual else None
    actual = norm_quantize_backward_triton(grad_y, grad_h, total, weight, bias, mean, rstd)
    wanted = []
    for out, inputs in ((low, low_leaves), (high, leaves)):
        grads = list(torch.autograd.grad(out, inputs, grad_y.to(out.dtype)))
        if has_residual:
            grads[0] = grads[0] + grad_h
        wanted.append(grads)
    for name, kernel, low_grad, high_grad in zip(("dh", "dw", "db"), actual, *wanted, strict=True):
        assert_as_accurate(kernel, low_grad.to(dtype), high_grad, name)


def test_gradient_where_a_program_has_several_groups_of_rows(device, monkeypatch):
    monkeypatch.setattr(norm_quantize_kernel, "MAX_PROGRAMS", 2)
    x, weight, bias, _ = norm_inputs((37, 600), False, torch.float32, device)
    *_, mean, rstd = norm_quantize_triton(x, weight, bias, None, EPS, False)
    grad = torch.randn_like(x)
    actual = norm_quantize_backward_triton(grad, None, x, weight, bias, mean, rstd)
    wanted = []
    for dtype in (torch.float32, torch.float64):
        leaves = [leaf.clone().to(dtype).requires_grad_() for leaf in (x, weight, bias)]
        y = F.layer_norm(leaves[0], (600,), leaves[1], leaves[2], EPS)
        wanted.append(torch.autograd.grad(y, leaves, grad.to(dtype)))
    for name, kernel, low, high in zip(("dh", "dw", "db"), actual, *wanted, strict=True):
        assert_as_accurate(kernel, low, high, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_quantize_op_equals_the_reference(has_residual, dtype):
    x, weight, bias, residual = norm_inputs((3, 5, 20), has_residual, dtype, "cpu")
    q, scale, h = norm_quantize(x, weight, bias, residual=residual)
    _, low, wanted_h, _ = norm_quantize_reference(x, weight, bias, residual, EPS)
    assert torch.equal(h, wanted_h)
    _, high, _, normalized = norm_quantize_reference(
        h.double(), weight.double(), bias.double(), None, EPS
    )
    assert_as_accurate(scale, low, high.double(), "scale")
    assert torch.equal(q, (normalized * (1 / scale)).round().to(torch.int8))


@pytest.mark.parametrize("static", [False, True], ids=["own scale", "static scale"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_integers_are_those_of_the_normalized_rows_that_come_with_them(dtype, static):
    x, weight, bias, residual = norm_inputs((3, 5, 20), True, dtype, "cpu")
    given = torch.tensor(0.01) if static else None
    q, scale, h, y = norm_quantize(
        x, weight, bias, residual=residual, scale=given, return_normalized=True
    )
    high = F.layer_norm(h.double(), (20,), weight.double(), bias.double(), EPS)
    assert_as_accurate(y, F.layer_norm(h, (20,), weight, bias, EPS), high)
    wanted, wanted_scale = quantize_rows_reference(y.float(), given)
    assert torch.equal(scale, wanted_scale.expand_as(scale))
    assert torch.equal(q, wanted)


@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_quantize_gradient_is_that_of_layer_norm(has_residual, device):
    inputs = norm_inputs((2, 7, 12), has_residual, torch.float64, "cpu")
    leaves = [None if leaf is None else leaf.requires_grad_() for leaf in inputs]
    x, weight, bias, residual = leaves
    grad_y, grad_h = torch.randn(2, 2, 7, 12, dtype=torch.float64)
    present = [leaf for leaf in leaves if leaf is not None]
    _, _, h, y = norm_quantize(x, weight, bias, residual=residual, return_normalized=True)
    actual = torch.autograd.grad((y * grad_y).sum() + (h * grad_h).sum(), present)
    total = x + residual if has_residual else x * 1
    normalized = F.layer_norm(total, (12,), weight, bias)
    wanted = torch.autograd.grad((normalized * grad_y).sum() + (total * grad_h).sum(), present)
    for a, w in zip(actual, wanted, strict=True):
        assert_as_accurate(a, w, w)


def test_integers_carry_no_gradient_but_the_residual_stream_does():
    x, weight, bias, residual = norm_inputs((2, 8), True, torch.float32, "cpu")
    x.requires_grad_()
    q, scale, h = norm_quantize(x, weight, bias, residual=residual)
    assert not q.requires_grad
    assert not scale.requires_grad
    h.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("triton", [False, True], ids=["op", "kernel"])
def test_rows_of_zeros_and_rows_that_are_not_finite(triton, device):
    x = torch.randn(4, 8, device=device)
    x[0] = 2.5  # constant: normalizes to zeros
    x[1, 3], x[2, 3] = torch.nan, torch.inf
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)

    def run():
        if triton:
            return norm_quantize_triton(x, weight, bias, None, EPS, False)[2:4]
        return norm_quantize(x, weight, bias)[:2]

    q, scale = run()
    assert (q[0] == 0).all()
    assert scale[0] == MIN_INPUT_SCALE
    assert scale[1:3].isnan().all()
    assert q[3].abs().max() == 127
    weight[2] = torch.nan  # a single feature of each row
    assert run()[1].isnan().all()


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("return_normalized", [False, True])
def test_norm_quantize_is_registered_correctly(return_normalized, permuted, device):
    x, weight, bias, residual = norm_inputs((4, 3, 8), True, torch.float32, device)
    if permuted:
        x, residual = x.transpose(0, 1), residual.transpose(0, 1)
    op = torch.ops.lowbit.norm_quantize.default
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias, residual)]
    torch.library.opcheck(op, (*leaves, EPS, return_normalized, *PLAIN))
    torch.library.opcheck(op, (*leaves[:3], None, EPS, return_normalized, *PLAIN))
    lengths = torch.tensor([2, 0, 3] if permuted else [3, 1, 0, 2], device=device)
    torch.library.opcheck(op, (*leaves, EPS, True, lengths, "gelu", None, return_normalized))
    h, _, _, _, mean, rstd = op(x, weight, bias, residual, EPS, False, *PLAIN)
    torch.library.opcheck(
        torch.ops.lowbit.norm_quantize_backward.default,
        (torch.randn_like(h), h, h, weight, bias, mean, rstd, lengths, "gelu"),
    )


def test_kernels_return_the_same_bits_every_time(device):
    x, weight, bias, grad = make_group_inputs(2, 4, 40, torch.float32, device)
    arguments = (x, weight, bias, grad, None, 2)
    first, second = group_norm_kernels(*arguments), group_norm_kernels(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    rows, weight, bias, _ = norm_inputs((40, 16), False, torch.float32, device)
    _, _, _, _, mean, rstd = norm_quantize_triton(rows, weight, bias, None, EPS, False)
    arguments = (rows, None, rows, weight, bias, mean, rstd)
    first = norm_quantize_backward_triton(*arguments)
    second = norm_quantize_backward_triton(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0)])
def test_empty_batches_work(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, bias = torch.ones(4, device=device), torch.zeros(4, device=device)
    masked_group_norm(x, weight, bias, lengths=None, num_groups=2).sum().backward()
    assert x.grad.shape == shape
    assert masked_group_norm_triton(x, weight, bias, None, 2, EPS)[0].shape == shape
    rows = torch.randn(0, 4, device=device)
    assert norm_quantize(rows, weight, bias)[1].shape == (0, 1)
    assert norm_quantize_triton(rows, weight, bias, None, EPS, False)[3].shape == (0, 1)


def test_compile_to_one_graph_for_three_lengths(device):
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(x, weight, bias, lengths):
        y = masked_group_norm(x, weight, bias, lengths=lengths, num_groups=2)
        q, scale, _ = norm_quantize(y.transpose(1, 2), weight, bias, residual=y.transpose(1, 2))
        return q * scale

    for T in (7, 9, 13):
        x, weight, bias, _ = make_group_inputs(2, 4, T, torch.float32, device)
        lengths = torch.tensor([T, 3], device=device)
        assert run(x, weight, bias, lengths).shape == (2, T, 4)
    assert counter.frame_count == 1


X = torch.zeros(2, 4, 5)
W = torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X.sum(), W, W), {}, r"x must be \[..., N\] with N >= 1, got shape \(\)"),
        ((X.long(), W, W), {}, "x must be fp16, bf16 or fp32 .* got torch.int64"),
        ((X, W, W), {}, r"weight must be \[5\], got \[4\]"),
        ((X.mT, W, W), {"residual": X}, r"residual must be \[2, 5, 4\], got \[2, 4, 5\]"),
        (
            (X.mT, W, W),
            {"residual": X.mT.half()},
            "residual must be torch.float32 .* like x, got torch.float16",
        ),
    ],
)
def test_norm_quantize_names_wrong_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        norm_quantize(*arguments, **options)


def test_rows_too_long_for_a_gpu_are_refused(device):
    x, weight, bias, _ = norm_inputs((1, 8193), False, torch.float32, device)
    with pytest.raises(NotImplementedError, match="rows of up to 8192 features, got 8193"):
        norm_quantize_triton(x, weight, bias, None, EPS, False)


def two_norms(N, device, dtype):
    norms = [torch.nn.LayerNorm(N, eps=eps, device=device, dtype=dtype) for eps in (1e-5, 1e-3)]
    for parameter in (p for norm in norms for p in norm.parameters()):
        torch.nn.init.normal_(parameter)
    return norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_a_norm_of_a_norm_is_as_accurate_as_two(shape, dtype, device):
    x, (first, second) = (
        torch.randn(shape, dtype=dtype, device=device),
        two_norms(shape[-1], device, dtype),
    )
    parameters = (first.weight, first.bias, first.eps)
    with torch.no_grad():
        arguments = (x, second.weight, second.bias, None, second.eps)
        h, y, _, _, _, _ = norm_quantize_triton(*arguments, True, *PLAIN[:3], False, *parameters)
        _, _, q, scale, _, _ = norm_quantize_triton(*arguments, False, *PLAIN, *parameters)
        low_h = first(x)
        assert_as_accurate(h, low_h, copy.deepcopy(first).double()(x.double()), "h")
        # of what is stored between them: its rounding is not the second norm's
        exact = copy.deepcopy(second).double()(h.double())
        assert_as_accurate(y, second(h), exact, "y")
        assert_quantized(q, scale, copy.deepcopy(second).float()(h.float()), exact)


@pytest.mark.parametrize("int8", [False, True])
def test_norm_of_norm_is_two_norms(int8):
    x, (first, second) = torch.randn(2, 7, 20), two_norms(20, "cpu", torch.float32)
    with torch.no_grad():
        h, *rest = norm_of_norm(x, first, second, int8=int8)
        assert torch.equal(h, first(x))
        if int8:
            q, scale, _ = norm_quantize(first(x), second.weight, second.bias, eps=second.eps)
            assert torch.equal(rest[0], q)
            assert torch.equal(rest[1], scale)
        else:
            assert_as_accurate(rest[0], second(h), copy.deepcopy(second).double()(h.double()))
        arguments = (x, second.weight, second.bias, None, second.eps, not int8, *PLAIN[:3], int8)
        op = torch.ops.lowbit.norm_quantize.default
        torch.library.opcheck(op, (*arguments, first.weight, first.bias, first.eps))
    with pytest.raises(NotImplementedError, match="norm_of_norm has no gradient"):
        norm_of_norm(x, first, second, int8=int8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"weight must be \[19\], got \[20\]"):
        norm_of_norm(x[..., 1:], first, second, int8=int8)
