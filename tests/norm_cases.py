"""Inputs that the tests of both norms share."""

import pytest
import torch

from lowbit_kernels.norm.group_norm_kernel import (
    masked_group_norm_backward_triton,
    masked_group_norm_triton,
)

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


def group_norm_kernels(x, weight, bias, grad, lengths, num_groups):
    y, mean, rstd = masked_group_norm_triton(x, weight, bias, lengths, num_groups, EPS)
    return [
        y,
        *masked_group_norm_backward_triton(
            grad, x, weight, bias, mean, rstd, lengths, num_groups
        ),
    ]  # fmt: skip
