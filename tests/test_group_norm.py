"""masked_group_norm: kernels against the reference, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.norm import (
    masked_group_norm,
    masked_group_norm_reference,
)
from lowbit_kernels.norm.channel_kernel import CHUNK
from lowbit_kernels.norm.levels import is_channel_last
from lowbit_kernels.testing import assert_as_accurate
from tests.norm_cases import DTYPES, EPS, group_norm_kernels, make_group_inputs

GROUP_SHAPES = [  # B, C, T, G, lengths
    pytest.param(2, 4, CHUNK, 4, None, id="whole-tiles"),
    pytest.param(2, 3, CHUNK + 37, 3, (CHUNK + 20, 70), id="ragged"),
    pytest.param(3, 6, 37, 2, (37, 1, 0), id="length-0-and-1"),
    pytest.param(2, 6, 9, 1, (4, 9), id="one-group"),
    pytest.param(1, 4, 1, 1, None, id="one-frame"),
    pytest.param(2, 70, 40, 7, (40, 33), id="several-tiles-of-channels"),
    pytest.param(
        4, 512, 31_999, 512, (31_999, 1, 0, 20_000), id="wav2vec2-base", marks=pytest.mark.gpu
    ),
]


def group_norm_reference(x, weight, bias, grad, lengths, num_groups, activation, dtype):
    """The output and the gradients, computed in ``dtype`` by autograd."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (x, weight, bias)]
    y = masked_group_norm_reference(*leaves, lengths, num_groups, EPS, activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


def assert_group_norm_as_accurate(actual, arguments, dtype):
    # PyTorch computes statistics in fp32 whatever the input
    low = [x.to(dtype) for x in group_norm_reference(*arguments, torch.float32)]
    high = group_norm_reference(*arguments, torch.float64)
    for name, *tensors in zip(("y", "dx", "dweight", "dbias"), actual, low, high, strict=True):
        assert_as_accurate(*tensors, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("B", "C", "T", "G", "lengths"), GROUP_SHAPES)
def test_group_norm_kernels_are_as_accurate_as_torch(
    B, C, T, G, lengths, activation, dtype, device
):
    x, weight, bias, grad = make_group_inputs(B, C, T, dtype, device)
    lengths = None if lengths is None else torch.tensor(lengths, device=device)
    for memory in (x, x.contiguous()):
        arguments = (memory, weight, bias, grad, lengths, G, activation)
        actual = group_norm_kernels(*arguments)
        assert_group_norm_as_accurate(actual, arguments, dtype)
        assert all(is_channel_last(t) == is_channel_last(memory) for t in actual[:2])


def test_group_norm_kernels_take_any_strides(device):
    x, weight, bias, grad = make_group_inputs(2, 8, 45, torch.float32, device)
    sliced = x.repeat_interleave(2, 1)[:, ::2]
    expanded = torch.randn((), device=device).expand_as(grad)
    for strided in (sliced, sliced.contiguous().repeat_interleave(2, 2)[..., ::2]):
        arguments = (strided, weight, bias, expanded, None, 4, None)
        assert_group_norm_as_accurate(group_norm_kernels(*arguments), arguments, torch.float32)


def test_group_norm_kernels_zero_padding_whatever_it_holds(device):
    x, weight, bias, grad = make_group_inputs(2, 4, 30, torch.float32, device)
    lengths = torch.tensor([30, 11], device=device)
    clean = group_norm_kernels(x, weight, bias, grad, lengths, 2)
    x[1, :, 11:] = torch.nan
    grad[1, :, 11:] = torch.nan
    for actual, expected in zip(
        group_norm_kernels(x, weight, bias, grad, lengths, 2), clean, strict=True
    ):
        assert torch.equal(actual, expected)
    assert (clean[0][1, :, 11:] == 0).all()
    assert (clean[1][1, :, 11:] == 0).all()


def torch_group_norm(x, weight, bias, grad, lengths, num_groups):
    """The output and the gradients of torch.group_norm, one utterance at a time, in fp32."""
    leaves = [leaf.detach().float().requires_grad_() for leaf in (x, weight, bias)]
    T = x.shape[2]
    frames = [T] * len(x) if lengths is None else lengths.tolist()
    utterances = [
        F.pad(torch.group_norm(leaves[0][b : b + 1, :, :n], num_groups, *leaves[1:]), (0, T - n))
        for b, n in enumerate(frames)
        if n > 0
    ]
    y = torch.cat([*utterances, x.new_zeros(len(x) - len(utterances), *x.shape[1:])])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.float())]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_groups", [1, 3, 6])
@pytest.mark.parametrize("lengths", [None, (9, 5, 1, 0)])
def test_group_norm_op_is_as_accurate_as_torch(lengths, num_groups, dtype, device):
    x, weight, bias, grad = make_group_inputs(4, 6, 9, dtype, device)
    lengths = None if lengths is None else torch.tensor(lengths, device=device, dtype=torch.int32)
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    y = masked_group_norm(*leaves, lengths=lengths, num_groups=num_groups)
    actual = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    arguments = (x, weight, bias, grad, lengths, num_groups)
    low = torch_group_norm(*arguments)
    high = group_norm_reference(*arguments, None, torch.float64)
    for name, result, *wanted in zip(("y", "dx", "dw", "db"), actual, low, high, strict=True):
        assert_as_accurate(result, wanted[0].to(dtype), wanted[1], name)


@pytest.mark.parametrize("lengths", [None, (12, 12)])
def test_group_norm_equals_torch_when_nothing_is_padded(lengths, device):
    x, weight, bias, _ = make_group_inputs(2, 6, 12, torch.float32, device)
    lengths = None if lengths is None else torch.tensor(lengths, device=device)
    assert_as_accurate(
        actual=masked_group_norm(x, weight, bias, lengths=lengths, num_groups=3),
        low=F.group_norm(x, 3, weight, bias),
        high=F.group_norm(x.double(), 3, weight.double(), bias.double()),
    )


def test_group_norm_of_a_padded_batch_equals_single_utterances(device):
    x, weight, bias, _ = make_group_inputs(2, 6, 50, torch.float32, device)
    lengths = torch.tensor([50, 31], device=device)
    y = masked_group_norm(x, weight, bias, lengths=lengths, num_groups=6)
    alone = x[1:, :, :31]
    assert_as_accurate(
        actual=y[1:, :, :31],
        low=F.group_norm(alone, 6, weight, bias),
        high=F.group_norm(alone.double(), 6, weight.double(), bias.double()),
    )


@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_group_norm_gradient_matches_finite_differences(activation):
    x, weight, bias, _ = make_group_inputs(3, 4, 5, torch.float64, "cpu")
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    lengths = torch.tensor([5, 2, 0])
    torch.autograd.gradcheck(
        lambda *leaves: masked_group_norm(
            *leaves, lengths=lengths, num_groups=2, activation=activation
        ),
        leaves,
    )


def test_group_norm_op_applies_the_activation(device):
    x, weight, bias, grad = make_group_inputs(3, 6, 9, torch.float32, device)
    lengths = torch.tensor([9, 4, 0], device=device)
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    y = masked_group_norm(*leaves, lengths=lengths, num_groups=3, activation="gelu")
    actual = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    arguments = (x, weight, bias, grad, lengths, 3, "gelu")
    assert_group_norm_as_accurate(actual, arguments, torch.float32)


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_group_norm_is_registered_correctly(permuted, device):
    x, weight, bias, grad = make_group_inputs(2, 4, 6, torch.float32, device)
    x = x if permuted else x.contiguous()
    lengths = torch.tensor([6, 2], device=device)
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    torch.library.opcheck(
        torch.ops.lowbit.masked_group_norm.default, (*leaves, lengths, 2, EPS, None)
    )
    _, mean, rstd = torch.ops.lowbit.masked_group_norm.default(
        x, weight, bias, lengths, 2, EPS, None
    )
    torch.library.opcheck(
        torch.ops.lowbit.masked_group_norm_backward.default,
        (grad, x, weight, bias, mean, rstd, lengths, 2, None),
    )


X = torch.zeros(2, 4, 5)
W = torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], W, W), {}, r"x must be \[B, C, T\], got shape \(4, 5\)"),
        ((X.int(), W, W), {}, "x must be fp16, bf16 or fp32 .* got torch.int32"),
        ((X, W[:3], W), {}, r"weight must be \[4\], got \[3\]"),
        ((X, W, W.int()), {}, "bias must be floating point on cpu, got torch.int32"),
        ((X, W, W), {"num_groups": 3}, "num_groups must divide the 4 channels, got 3"),
        ((X, W, W), {"activation": "glu"}, "activation must be one of .* got 'glu'"),
        ((X, W, W), {"num_groups": 0}, "num_groups must divide the 4 channels, got 0"),
        ((X, W, W), {"lengths": torch.ones(2)}, "lengths must be int32 or int64, got torch.float"),
        ((X, W, W), {"lengths": torch.tensor([5])}, r"lengths must be \[2\] on cpu, got \[1\]"),
    ],
)
def test_group_norm_names_wrong_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        masked_group_norm(*arguments, **{"lengths": None, "num_groups": 2, **options})


@pytest.mark.gpu
def test_captured_graph_follows_the_lengths():
    x, weight, bias, _ = make_group_inputs(2, 8, 5000, torch.float16, "cuda")
    lengths = torch.tensor([5000, 70], device="cuda")
    masked_group_norm(x, weight, bias, lengths=lengths, num_groups=8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masked_group_norm(x, weight, bias, lengths=lengths, num_groups=8)
    lengths.copy_(torch.tensor([9, 4000]))
    graph.replay()
    assert torch.equal(y, masked_group_norm(x, weight, bias, lengths=lengths, num_groups=8))
