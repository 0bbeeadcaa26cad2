"""LayerNorm, activation, mask and int8 in one pass: kernels, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.matmul.reference import apply_epilogue, int8_scale
from lowbit_kernels.norm import norm_activation, norm_quantize
from lowbit_kernels.norm.norm_quantize_kernel import (
    norm_quantize_backward_triton,
    norm_quantize_triton,
)
from lowbit_kernels.testing import assert_as_accurate
from tests.norm_cases import DTYPES, EPS, assert_quantized

CASES = [  # B, T, N, lengths, activation
    pytest.param(2, 4, 128, None, "gelu", id="whole-tiles"),
    pytest.param(4, 5, 100, (5, 1, 0, 4), "silu", id="ragged"),
    pytest.param(3, 3, 700, (2, 9, -1), "gelu_tanh", id="several-loads-a-row"),
    pytest.param(2, 7, 12, (7, 3), "relu", id="relu"),
    pytest.param(2, 7, 12, (3, 7), None, id="no-activation"),
    pytest.param(
        8, 31_999, 512, (31_999, 1, 0) + (20_001,) * 5, "gelu", id="wav2vec2-large",
        marks=pytest.mark.gpu,
    ),
]  # fmt: skip


def make_inputs(B, T, N, lengths, dtype, device):
    """x with a mean far from 0, weight, bias, lengths and the gradient; NaN in the padding."""
    x, grad = torch.randn(2, B, T, N, dtype=dtype, device=device)
    x += 3
    weight, bias = torch.randn(2, N, dtype=dtype, device=device)
    if lengths is not None:
        lengths = torch.tensor(lengths, device=device)
        x.masked_fill_(padding_of(lengths, T), torch.nan)
        grad.masked_fill_(padding_of(lengths, T), torch.nan)
    return x, weight, bias, lengths, grad


def padding_of(lengths, T):
    return (torch.arange(T, device=lengths.device) >= lengths[:, None])[..., None]


def reference(x, weight, bias, lengths, grad, activation, dtype):
    """The output and the gradients, computed in ``dtype`` by autograd."""
    if lengths is not None:
        x, grad = (t.masked_fill(padding_of(lengths, x.shape[1]), 0.0) for t in (x, grad))
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (x, weight, bias)]
    y = apply_epilogue(F.layer_norm(leaves[0], x.shape[-1:], *leaves[1:], EPS), activation)
    if lengths is not None:
        y = y.masked_fill(padding_of(lengths, x.shape[1]), 0.0)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


def assert_all_as_accurate(actual, low, high):
    for name, *tensors in zip(("y", "dx", "dw", "db"), actual, low, high, strict=True):
        assert_as_accurate(tensors[0], tensors[1].to(tensors[0].dtype), tensors[2], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "N", "lengths", "activation"), CASES)
def test_kernels_are_as_accurate_as_torch(B, T, N, lengths, activation, dtype, device):
    x, weight, bias, lengths, grad = make_inputs(B, T, N, lengths, dtype, device)
    low, high = (
        reference(x, weight, bias, lengths, grad, activation, t)
        for t in (torch.float32, torch.float64)
    )
    arguments = (x, weight, bias, None, EPS, True, lengths, activation)
    _, y, q, scale, mean, rstd = norm_quantize_triton(*arguments, None, False)
    assert q.numel() == 0
    assert torch.equal(scale, int8_scale(y.float().abs().amax(-1, keepdim=True)))
    grads = norm_quantize_backward_triton(
        grad, None, x, weight, bias, mean, rstd, lengths, activation
    )
    assert_all_as_accurate([y, *grads], low, high)

    for static in (None, torch.tensor(0.01, device=device)):
        _, again, q, scale, _, _ = norm_quantize_triton(*arguments, static)
        assert torch.equal(again, y)
        assert_quantized(q, scale, y.float(), y.double(), static)


@pytest.mark.parametrize("quantize", [False, True])
def test_kernel_subtracts_an_offset_of_each_channel(quantize, device):
    x, weight, bias, lengths, _ = make_inputs(2, 5, 40, (5, 2), torch.float32, device)
    offset = torch.randn(40, device=device)
    _, y, q, scale, _, _ = norm_quantize_triton(
        x, weight, bias, None, EPS, not quantize, lengths, "gelu", None, quantize, offset=offset
    )
    low, high = (
        (norm_activation(*(t.to(dtype) for t in (x, weight, bias)), activation="gelu") - offset)
        .masked_fill(padding_of(lengths, 5), 0.0)
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    if quantize:
        assert_quantized(q, scale, low, high)
    else:
        assert_as_accurate(y, low, high)


def test_residual_beyond_the_lengths_counts_as_zero(device):
    x, weight, bias, lengths, grad = make_inputs(2, 5, 40, (5, 2), torch.float32, device)
    h, y, _, _, mean, rstd = norm_quantize_triton(
        x, weight, bias, x, EPS, True, lengths, "silu", None, False
    )
    dh, _, _ = norm_quantize_backward_triton(
        grad, grad, h, weight, bias, mean, rstd, lengths, "silu"
    )
    clean = norm_quantize_triton(
        x[1:, :2], weight, bias, x[1:, :2], EPS, True, None, "silu", None, False
    )
    for whole, alone in zip((h, y), clean, strict=False):
        assert torch.equal(whole[1:, :2], alone)
    assert all((t[1, 2:] == 0).all() for t in (h, y, dh))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu", "relu"])
def test_op_is_as_accurate_as_torch(activation, dtype, device):
    x, weight, bias, lengths, grad = make_inputs(4, 6, 20, (6, 3, 1, 0), dtype, device)
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    y = norm_activation(*leaves, activation=activation, lengths=lengths)
    arguments = (x, weight, bias, lengths, grad, activation)
    low, high = (reference(*arguments, t) for t in (torch.float32, torch.float64))
    assert_all_as_accurate([y.detach(), *torch.autograd.grad(y, leaves, grad)], low, high)
    static = torch.tensor(0.02, device=device)
    for scale in (None, static):
        q, row_scale, h = norm_quantize(
            x, weight, bias, activation=activation, lengths=lengths, scale=scale
        )
        assert h is x
        assert_quantized(q, row_scale, low[0].to(dtype), high[0], scale)


def test_gradient_matches_finite_differences():
    x, weight, bias, lengths, _ = make_inputs(3, 4, 6, (4, 2, 0), torch.float64, "cpu")
    leaves = [t.nan_to_num().requires_grad_() for t in (x, weight, bias)]
    torch.autograd.gradcheck(
        lambda *leaves: norm_activation(*leaves, activation="gelu", lengths=lengths), leaves
    )


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_empty_batches_work(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, bias = torch.ones(8, device=device), torch.zeros(8, device=device)
    lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
    norm_activation(x, weight, bias, activation="gelu", lengths=lengths).sum().backward()
    assert x.grad.shape == shape
    arguments = (x.detach(), weight, bias, None, EPS, True, lengths, "gelu", None, False)
    assert norm_quantize_triton(*arguments)[1].shape == shape


def test_compiles_to_one_graph(device):
    x, weight, bias, lengths, _ = make_inputs(2, 5, 8, (5, 2), torch.float32, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        y = norm_activation(x, weight, bias, activation="silu", lengths=lengths)
        return norm_quantize(y, weight, bias, activation="gelu", lengths=lengths)[1]

    expected = norm_quantize(
        norm_activation(x, weight, bias, activation="silu", lengths=lengths),
        weight, bias, activation="gelu", lengths=lengths,
    )[1]  # fmt: skip
    assert torch.equal(run(x), expected)


X = torch.zeros(2, 5, 4)
W = torch.ones(4)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (X, {"activation": "glu"}, "activation must be one of .* got 'glu'"),
        (X[0], {"lengths": torch.tensor([1])}, r"x must be \[B, T, N\] with lengths, .* \(5, 4\)"),
        (X, {"lengths": torch.ones(2)}, "lengths must be int32 or int64, got torch.float32"),
        (X, {"lengths": torch.tensor([5])}, r"lengths must be \[2\] on cpu, got \[1\]"),
        (X, {"scale": W}, r"scale must be \[\] fp32 on cpu, got \[4\] torch.float32 on cpu"),
    ],
)
def test_wrong_arguments_are_named(x, options, message):
    with pytest.raises(ValueError, match=message):
        norm_quantize(x, W, W, **options)
