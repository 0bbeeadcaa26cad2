"""The CPU attention kernel's gradients and dropout against the reference."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lowbit_kernels.attention import DenseBias, flash_attention
from lowbit_kernels.attention.reference import (
    flash_attention_backward_reference,
    flash_attention_reference,
)
from lowbit_kernels.cpu import attention_backward_cpu, attention_cpu, cpu_backend, library
from lowbit_kernels.testing import assert_as_accurate
from tests.test_cpu_attention import heads

# B, H, T, D: one frame; less than a tile; ragged in everything; several blocks of keys; wide
SHAPES = [(1, 1, 1, 16), (2, 3, 5, 36), (2, 2, 50, 64), (1, 2, 430, 49), (1, 1, 60, 256)]
NAMES = ("dq", "dk", "dv", "dbias")


@pytest.fixture
def native() -> None:
    if library.native() is None:
        pytest.skip(cpu_backend())


def gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths, bias, window, *dropout: float
) -> list[Tensor]:
    """The native gradients; of the bias too where there is one."""
    scale, options = q.shape[-1] ** -0.5, (lengths, bias, window)
    forward = attention_cpu(q, k, v, *options, scale, *dropout)
    assert forward is not None
    drop = dropout or (0, 0.0)
    result = attention_backward_cpu(grad, q, k, v, *forward, *options, scale, *drop, True)
    assert result is not None
    return [x for x in result if x is not None]


def wanted(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths, bias, window, keep=None):
    scale = q.shape[-1] ** -0.5
    out, _ = flash_attention_reference(q, k, v, lengths, bias, window, scale, keep)
    *grads, scores = flash_attention_backward_reference(
        grad, q, k, v, out, lengths, bias, window, scale, keep
    )
    return grads if bias is None else [*grads, scores.sum_to_size(bias.shape)]


def check(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths, bias, window) -> None:
    wide = [None if x is None else x.double() for x in (q, k, v, grad, bias)]
    actual = gradients(q, k, v, grad, lengths, bias, window)
    low = wanted(q, k, v, grad, lengths, bias, window)
    high = wanted(*wide[:4], lengths, wide[4], window)
    for name, *tensors in zip(NAMES, actual, low, high, strict=False):
        assert_as_accurate(*tensors, name)


@pytest.mark.parametrize("window", [None, 0, 3, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_as_accurate_as_pytorch(native, shape: tuple[int, ...], window: int | None):
    B, H, T, _ = shape
    inputs = (*heads(*shape), torch.randn(shape))
    check(*inputs, None, None, window)
    lengths = torch.randint(0, T + 1, (B,))
    lengths[0] = T // 2
    check(*inputs, lengths, None, window)
    bias = torch.randn(B, H, T, T)
    bias[0, 0, 0] = -torch.inf
    bias[..., T // 2] = -torch.inf
    check(*inputs, lengths, bias, window)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 300, 300), (2, 1, 1, 300), (1, 3, 300, 1), (1, 3, 300, 300)],
    ids=str,
)
def test_gradient_of_a_broadcast_bias(native, shape: tuple[int, ...]):
    check(*heads(2, 3, 300, 16), torch.randn(2, 3, 300, 16), None, torch.randn(shape), None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(native, dtype: torch.dtype):
    check(
        *(t.to(dtype) for t in heads(1, 2, 50, 64)),
        torch.randn(1, 2, 50, 64).to(dtype),
        *[None] * 3,
    )


def test_padding_does_not_matter(native):
    inputs = [*heads(2, 2, 60, 16), torch.randn(2, 2, 60, 16)]
    lengths = torch.tensor([60, 41])
    clean = gradients(*inputs, lengths, None, None)
    for x in inputs:
        x[1, :, 41:] = torch.nan
    for actual, expected in zip(gradients(*inputs, lengths, None, None), clean, strict=True):
        assert torch.equal(actual, expected)
        assert not actual[1, :, 41:].any()


def test_the_same_bits_whatever_the_threads(native):
    inputs = (*heads(2, 3, 230, 16), torch.randn(2, 3, 230, 16), None)
    bias, threads = torch.randn(1, 3, 230, 230), torch.get_num_threads()
    first = gradients(*inputs, bias, None)
    try:
        torch.set_num_threads(3)
        second = gradients(*inputs, bias, None)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty(native):
    for shape in ((0, 2, 5, 16), (2, 2, 0, 16)):
        grads = gradients(*heads(*shape), torch.randn(shape), None, torch.zeros(1, 2, 1, 1), None)
        assert [grad.shape for grad in grads] == [shape] * 3 + [(1, 2, 1, 1)]


def test_dropout_has_one_mask_in_both_directions(native):
    q, k, v = heads(2, 2, 230, 64)
    grad, bias = torch.randn(2, 2, 230, 64), torch.randn(1, 2, 230, 230)
    lengths, drop = torch.tensor([230, 150]), (1 << 61, 0.3)
    # identity values make the output the dropped probabilities themselves
    zeros, identity = torch.zeros(2, 2, 230, 230), torch.eye(230).expand(2, 2, 230, 230)
    probs = attention_cpu(zeros, zeros, identity, None, None, None, 1.0, *drop)
    assert probs is not None
    keep = (probs[0] != 0) / (1 - drop[1])
    actual = gradients(q, k, v, grad, lengths, bias, None, *drop)
    low = wanted(q, k, v, grad, lengths, bias, None, keep)
    wide = (x.double() for x in (q, k, v, grad))
    high = wanted(*wide, lengths, bias.double(), None, keep.double())
    for name, *tensors in zip(NAMES, actual, low, high, strict=True):
        assert_as_accurate(*tensors, name)


def test_dropout_draws_every_weight_alone(native):
    zeros, identity = torch.zeros(2, 2, 256, 256), torch.eye(256).expand(2, 2, 256, 256)

    def dropped(seed: int, p: float) -> Tensor:
        result = attention_cpu(zeros, zeros, identity, None, None, None, 1.0, seed, p)
        assert result is not None
        return result[0] == 0

    first, n = dropped(7, 0.25), 4 * 256 * 256
    # four standard deviations of a binomial share
    bound = 4 * (0.25 * 0.75 / n) ** 0.5
    assert abs(first.float().mean().item() - 0.25) < bound
    assert torch.equal(first, dropped(7, 0.25))
    both = 4 * (0.0625 * 0.9375 / n) ** 0.5
    neighbors = [first.roll(shift, dim) for dim in range(4) for shift in (1, 16)[: 1 + dim // 2]]
    for other in (dropped(8, 0.25), *neighbors):
        assert abs((first & other).float().mean().item() - 0.0625) < both


def test_memory_grows_with_the_frames_and_not_with_their_square(native):
    script = """
        import resource, torch
        from lowbit_kernels import flash_attention

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

        def run(T):
            q = torch.randn(1, 2, T, 8, requires_grad=True)
            flash_attention(q, q, q, window=9, dropout_p=0.1).sum().backward()

        run(64)
        before = peak()
        run(6000)
        print(peak() - before)
    """
    lines = [line[8:] for line in script.splitlines()]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    # one tensor of scores is 275 MB
    assert int(result.stdout) < 50


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("is_native", [True, False])
def test_the_result_is_no_view(monkeypatch: pytest.MonkeyPatch, is_native: bool, dropout_p: float):
    if not is_native:
        monkeypatch.setattr(library, "native", lambda: None)
    q, k, v = (x.detach().requires_grad_() for x in heads(2, 2, 9, 8))
    for lengths in (None, torch.tensor([9, 4])):
        out = flash_attention(q, k, v, lengths=lengths, dropout_p=dropout_p)
        before = out.detach().clone()
        out.add_(1)
        out *= 2
        assert torch.equal(out, (before + 1) * 2)
        # as after PyTorch's own attention: the gradient needs the output that was
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_without_a_compiler_the_gradient_is_pytorchs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "native", lambda: None)
    grad, bias, lengths = torch.randn(2, 2, 9, 8), torch.randn(1, 2, 9, 9), torch.tensor([9, 4])
    leaves = [x.detach().requires_grad_() for x in (*heads(2, 2, 9, 8), bias)]
    out = flash_attention(*leaves[:3], lengths=lengths, window=3, position=DenseBias(leaves[3]))
    actual = torch.autograd.grad(out, leaves, grad)
    q, k, v, bias = (x.detach() for x in leaves)
    low = wanted(q, k, v, grad, lengths, bias, 3)
    wide = (x.double() for x in (q, k, v, grad))
    high = wanted(*wide, lengths, bias.double(), 3)
    for name, *tensors in zip(NAMES, actual, low, high, strict=True):
        assert_as_accurate(*tensors, name)
