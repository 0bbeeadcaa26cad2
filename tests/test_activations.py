"""The activations of the kernels' epilogues, and their slopes, over every fp16 number."""

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.matmul.epilogue_kernel import epilogue_backward_triton, finish_triton

ACTIVATIONS = {
    "gelu": lambda z: z * torch.special.log_ndtr(z).exp(),  # exact in the tail too
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
# a slope crosses zero, where only its absolute error says something; of 1, its largest value
SLOPE_ERROR = 2.0**-16


def every_number(dtype):
    """All finite numbers, [M, 256]."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(dtype)
    return values[torch.isfinite(values)].view(-1, 256)


def steps(error, exact, dtype):
    """Error in units of the last place that ``dtype`` has at the exact value."""
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    _, exponent = torch.frexp(exact.abs().clamp_min(tiny))
    return error.abs() / (eps * torch.ldexp(torch.ones_like(exact), exponent - 1))


def dtypes():
    return [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_right_to_one_step(name, dtype, device):
    """Rounding alone errs by half a step."""
    z = every_number(dtype).to(device)
    y = finish_triton(z.float()[None], None, None, None, None, name, dtype)
    exact = ACTIVATIONS[name](z.double())
    # what overflows, or is lost among the smallest numbers, is so for PyTorch as well
    held = exact.abs() <= torch.finfo(dtype).max
    assert steps(y.double() - exact, exact, dtype)[held].max() <= 1


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_right_to_one_step(name, dtype, device):
    z = every_number(dtype).to(device)
    dz, _ = epilogue_backward_triton(torch.ones_like(z), z, name, False)
    wide = z.double().requires_grad_()
    (exact,) = torch.autograd.grad(ACTIVATIONS[name](wide).sum(), wide)
    error = dz.double() - exact
    wrong = (steps(error, exact, dtype) > 1) & (error.abs() > SLOPE_ERROR)
    # log_ndtr's own gradient is 0 / 0 far out, where the slope is 0
    assert not (wrong & (z.abs() < 30)).any()


@pytest.mark.parametrize("name", [*ACTIVATIONS, "glu"])
def test_a_nan_stays_one(name, device):
    z = torch.full((1, 4), torch.nan, device=device)
    y = finish_triton(z[None], None, None, None, None, name, torch.float16)
    assert y.isnan().all()
