"""The CPU normalizations against PyTorch's, with our kernels and without."""

import pytest
import torch
from torch import Tensor

from lowbit_kernels.cpu import cpu_backend, library
from lowbit_kernels.matmul.reference import MIN_INPUT_SCALE
from lowbit_kernels.norm import masked_group_norm, norm_quantize
from lowbit_kernels.norm.levels import is_channel_last
from lowbit_kernels.testing import assert_as_accurate
from tests.norm_cases import EPS, assert_quantized, make_group_inputs
from tests.test_group_norm import group_norm_reference, torch_group_norm


@pytest.fixture(params=["native", "pytorch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pytorch":
        monkeypatch.setattr(library, "native", lambda: None)
    elif library.native() is None:
        pytest.skip(cpu_backend())
    return str(request.param)


def check_group_norm(x: Tensor, weight, bias, grad: Tensor, lengths, num_groups: int) -> None:
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    y = masked_group_norm(*leaves, lengths=lengths, num_groups=num_groups)
    actual = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    low = torch_group_norm(x, weight, bias, grad, lengths, num_groups)
    high = group_norm_reference(x, weight, bias, grad, lengths, num_groups, None, torch.float64)
    for name, result, *expected in zip(("y", "dx", "dw", "db"), actual, low, high, strict=True):
        assert_as_accurate(result, expected[0].to(x.dtype), expected[1], name)
    assert is_channel_last(actual[0]) == is_channel_last(x)


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("T", [1, 15, 64, 2049, 5000])
def test_group_norm_is_as_accurate_as_pytorch(num_groups: int, T: int):
    x, weight, bias, grad = make_group_inputs(3, 6, T, torch.float32, "cpu")
    check_group_norm(x, weight, bias, grad, None, num_groups)
    check_group_norm(x, weight, bias, grad, torch.tensor([T, T // 2, 0]), num_groups)
    # a mean that is large beside the deviation takes digits away
    check_group_norm(x + 1000, weight, bias, grad, torch.tensor([T, 1, -3]), num_groups)


def test_group_norm_of_any_strides():
    x, weight, bias, _ = make_group_inputs(2, 6, 70, torch.float32, "cpu")
    last = x.transpose(1, 2).contiguous().transpose(1, 2)
    check_group_norm(last, weight, bias, torch.ones(1, 1, 1).expand(x.shape), None, 3)
    wide = torch.randn(2, 8, 100)[:, 1:7, 3:73]
    check_group_norm(wide, weight, bias, torch.randn(2, 8, 100)[:, :6, 9:79], None, 6)


def test_group_norm_zeroes_padding_whatever_it_holds():
    x, weight, bias, grad = make_group_inputs(2, 4, 40, torch.float32, "cpu")
    lengths = torch.tensor([40, 11])

    def run() -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
        y = masked_group_norm(*leaves, lengths=lengths, num_groups=2)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    clean = run()
    x[1, :, 11:] = torch.nan
    grad[1, :, 11:] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(run(), clean, strict=True))
    assert not clean[0][1, :, 11:].any()
    assert not clean[1][1, :, 11:].any()


def test_group_norm_keeps_nan_in_its_group():
    x, weight, bias, _ = make_group_inputs(1, 4, 40, torch.float32, "cpu")
    x[0, 1, 5] = torch.nan
    y = masked_group_norm(x, weight, bias, lengths=None, num_groups=2)
    assert y[0, :2].isnan().all()
    assert y[0, 2:].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 20), (2, 5, 768), (7, 4099), (0, 5)], ids=str)
@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_quantize_rounds_what_layer_norm_gives(shape: tuple[int, ...], has_residual: bool):
    N = shape[-1]
    # slices: no stride is the natural one
    x, residual = torch.randn(2, *shape, 2)[..., 0] + 30
    weight, bias = torch.randn(N, 2)[:, 0], torch.randn(N, 2)[:, 0]
    given = residual if has_residual else None
    q, scale, h, y = norm_quantize(x, weight, bias, residual=given, return_normalized=True)
    assert torch.equal(h, x + residual if has_residual else x)
    layer_norm = torch.nn.functional.layer_norm
    low = layer_norm(h, (N,), weight, bias, EPS)
    high = layer_norm(h.double(), (N,), weight.double(), bias.double(), EPS)
    if x.numel():
        assert_quantized(q, scale, low, high)
        assert (q.abs().amax(-1) == 127).all()
        assert_as_accurate(y, low, high)


def test_norm_quantize_of_rows_of_zeros_and_of_nan():
    x = torch.zeros(3, 20)
    x[1, 4], x[2, 5] = torch.nan, torch.inf
    _, scale, _ = norm_quantize(x, torch.ones(20), torch.zeros(20))
    assert scale[0] == MIN_INPUT_SCALE
    assert scale[1:].isnan().all()
