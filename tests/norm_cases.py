"""Inputs and checks that the tests of norms and activations share."""

import pytest
import torch

from lowbit_kernels.norm.group_norm_kernel import (
    masked_group_norm_backward_triton,
    masked_group_norm_triton,
)
from lowbit_kernels.testing import assert_as_accurate

EPS = 1e-5
DTYPES = [
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter lacks bf16
]


def make_group_inputs(B, C, T, dtype, device):
    """x with a mean far from 0, weight, bias and the gradient of the output."""
    x = torch.randn(B, T, C, dtype=dtype, device=device).transpose(1, 2) + 3
    weight, bias = torch.randn(2, C, dtype=dtype, device=device)
    return x, weight, bias, torch.randn(B, C, T, dtype=dtype, device=device)


def group_norm_kernels(x, weight, bias, grad, lengths, num_groups, activation=None):
    options = (lengths, num_groups)
    y, mean, rstd = masked_group_norm_triton(x, weight, bias, *options, EPS, activation)
    saved = (x, weight, bias, mean, rstd)
    return [y, *masked_group_norm_backward_triton(grad, *saved, *options, activation)]


def assert_quantized(q, scale, low, high, static=None):
    """q is the level nearest to ``high`` (fp64), of which ``low`` is PyTorch's result."""
    assert q.dtype == torch.int8
    if static is None:
        # in the precision of the values, but a scale has no more than fp32's
        dtype = torch.float32 if low.dtype == torch.float64 else low.dtype
        amax_low, amax_high = (y.abs().amax(-1, keepdim=True) for y in (low, high))
        assert_as_accurate((127 * scale.double()).to(dtype), amax_low.to(dtype), amax_high)
    else:
        assert torch.equal(scale, static.expand_as(scale))
        high, low = (y.clamp(-127 * static.double(), 127 * static.double()) for y in (high, low))
    # half a step, and what assert_as_accurate grants the values before it
    rounding = max(torch.finfo(t).eps for t in (torch.float32, low.dtype)) * high.abs().max()
    bound = 0.5 * scale.double() + 2 * ((low - high).abs().max() + rounding)
    assert ((q * scale.double() - high).abs() <= bound).all()
