"""Convolutions with a 16-bit weight, forward and both gradients, against torch's in float64.

Triton's interpreter runs the kernels where there is no GPU.
"""

import pytest
import torch

from lowbit_kernels.conv1d import Geometry
from lowbit_kernels.conv1d.kernels.frames import copy_frames_triton, quantize_frames_triton
from lowbit_kernels.conv1d.kernels.grouped import (
    grouped_conv1d_dw_triton,
    grouped_conv1d_dx_triton,
    grouped_conv1d_triton,
)
from lowbit_kernels.conv1d.reference import conv_weight, mask_frames, quantize_utterances
from lowbit_kernels.testing import assert_as_accurate
from tests.interpreter_memory import round_products_alike

# C, N, T, and the geometry
CASES = {
    "pointwise": (36, 20, 9, Geometry(1)),
    "front-end": (33, 18, 14, Geometry(3, stride=2)),
    "stride-and-padding": (12, 10, 17, Geometry(5, 3, 4, 1)),
    "wide": (20, 70, 11, Geometry(2, left=0, right=1)),
    "dilated": (12, 14, 17, Geometry(3, 1, 2, 3, dilation=2)),
    "dilated-strided": (12, 14, 16, Geometry(3, 2, 2, 3, dilation=2)),
    "grouped": (24, 36, 13, Geometry(5, left=2, right=2, groups=2)),
    "grouped-strided": (24, 36, 13, Geometry(5, 2, 1, 2, groups=2)),
    "positional": (8, 8, 10, Geometry(32, left=16, right=16, groups=2)),
    "positional-odd": (12, 12, 9, Geometry(19, left=9, right=9, groups=3)),
    "more-padding-than-taps": (6, 4, 5, Geometry(2, 2, 5, 3)),
    "one-frame": (6, 4, 3, Geometry(3)),
}
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def make_inputs(case, dtype, device, B=2):
    C, N, T, geometry = case
    x = torch.randn(B, T, C + 3, device=device, dtype=dtype)[..., :C]
    lengths = torch.tensor([T, T // 2] + [T] * (B - 2), device=device)[:B]
    x[torch.arange(T, device=device) >= lengths[:, None]] = torch.nan
    K = geometry.kernel_size * C // geometry.groups
    weight = torch.randn(N, K, device=device, dtype=dtype) / K**0.5
    bias = torch.randn(N, device=device, dtype=dtype)
    dz = torch.randn(B, geometry.frames_out(T), N, device=device, dtype=dtype)
    return x, weight, bias, dz, lengths, geometry


def torch_results(x, weight, bias, dz, lengths, geometry, dtype):
    """y, dx and dW of torch's convolution, in ``dtype``."""
    x = mask_frames(x.mT, lengths).to(dtype).requires_grad_()
    weight = weight.to(dtype).requires_grad_()
    y = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x, (geometry.left, geometry.right)),
        conv_weight(weight, geometry),
        bias.to(dtype),
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    dx, dw = torch.autograd.grad(y, (x, weight), dz.mT.to(dtype))
    return y.mT, mask_frames(dx, lengths).mT, dw


def check(case, dtype, device):
    x, weight, bias, dz, lengths, geometry = inputs = make_inputs(case, dtype, device)
    results = (
        grouped_conv1d_triton(x, weight, bias, lengths, geometry),
        grouped_conv1d_dx_triton(dz, weight, lengths, geometry, x.shape[1]),
        grouped_conv1d_dw_triton(dz, x, lengths, geometry),
    )
    assert [t.dtype for t in results] == [dtype, dtype, torch.float32]
    low, high = (torch_results(*inputs, wide) for wide in (dtype, torch.float64))
    for name, actual, *expected in zip(("y", "dx", "dw"), results, low, high, strict=True):
        assert_as_accurate(actual, expected[0].to(actual.dtype), expected[1], name)
    again = grouped_conv1d_dw_triton(dz, x, lengths, geometry)
    assert torch.equal(again, results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_torch(case, dtype, device):
    check(CASES[case], dtype, device)


def test_sums_over_parts_of_a_batch(device, monkeypatch):
    from lowbit_kernels.conv1d.kernels import grouped

    monkeypatch.setattr(grouped, "sms_of", lambda device, kernel: 3)
    check((6, 4, 200, Geometry(3, left=1, right=1)), torch.float16, device)


def test_an_utterance_alone_has_the_same_bits(device, monkeypatch):
    if device == "cpu":
        round_products_alike(monkeypatch)
    x, weight, bias, dz, lengths, geometry = make_inputs(CASES["grouped"], torch.float16, device)
    y = grouped_conv1d_triton(x, weight, bias, lengths, geometry)
    dx = grouped_conv1d_dx_triton(dz, weight, lengths, geometry, x.shape[1])
    n = int(lengths[1])
    T_out = geometry.frames_out(n)
    alone = grouped_conv1d_triton(x[1:, :n], weight, bias, None, geometry)
    assert torch.equal(alone[0], y[1, :T_out])
    dz[1, T_out:] = 0
    dx = grouped_conv1d_dx_triton(dz, weight, lengths, geometry, x.shape[1])
    alone = grouped_conv1d_dx_triton(dz[1:, :T_out], weight, None, geometry, n)
    assert torch.equal(alone[0], dx[1, :n])
    assert not dx[1, n:].any()


def test_an_empty_batch(device):
    x, weight, bias, dz, lengths, geometry = make_inputs(
        CASES["grouped"], torch.float16, device, B=0
    )
    y = grouped_conv1d_triton(x, weight, bias, lengths, geometry)
    dx = grouped_conv1d_dx_triton(dz, weight, lengths, geometry, x.shape[1])
    dw = grouped_conv1d_dw_triton(dz, x, lengths, geometry)
    assert (y.shape, dx.shape) == (dz.shape, x.shape)
    assert torch.equal(dw, torch.zeros(weight.shape, device=device))


@pytest.mark.parametrize("groups", [1, 3])
def test_frames_are_copied_group_by_group(groups, device):
    x = torch.randn(2, 9, 12, device=device)
    lengths = torch.tensor([9, 4], device=device)
    copy = copy_frames_triton(x, lengths, Geometry(1, left=2, right=5), pad=True, groups=groups)
    expected = mask_frames(x.mT, lengths).mT.view(2, 9, groups, -1).transpose(1, 2)
    expected = torch.nn.functional.pad(expected, (0, 0, 2, 5)).flatten(0, 1)
    assert torch.equal(copy, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_utterance_that_is_not_finite_is_nan(value, device):
    x = torch.randn(3, 20, 12, device=device)
    x[1, 17, 5] = value
    x[2, 18, 3] = value  # padded
    lengths = torch.tensor([20, 20, 15], device=device)
    q, scales = quantize_frames_triton(
        x, None, lengths, Geometry(1), pad=True, groups=2, scale_rows=4
    )
    expected, expected_scales = quantize_utterances(mask_frames(x.mT, lengths))
    assert scales.view(3, 4).isnan().all(1).tolist() == [False, True, False]
    expected_scales = expected_scales.repeat_interleave(4)
    assert torch.equal(scales.nan_to_num(-1), expected_scales.nan_to_num(-1))
    expected = expected.view(3, 2, 6, 20).mT
    assert torch.equal(q.view(3, 2, 20, 6)[::2], expected[::2])


REAL = {
    "base": (768, 768, 499, Geometry(128, left=64, right=64, groups=16)),
    "large": (1024, 1024, 499, Geometry(128, left=64, right=64, groups=16)),
    "data2vec": (768, 768, 499, Geometry(19, left=9, right=9, groups=16)),
    "front-end": (512, 512, 3199, Geometry(3, stride=2)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case, dtype):
    check(REAL[case], dtype, "cuda")
