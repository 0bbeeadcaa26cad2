"""What the tests of low_bit_linear share: formats, inputs, the comparison.

Dimension key: M rows, N output features, K input features.
"""

import pytest
import torch

from lowbit_kernels.formats import QuantSpec, quantize_weight
from lowbit_kernels.matmul import linear_reference
from lowbit_kernels.testing import assert_as_accurate

SPECS = {
    "w8": QuantSpec(8),
    "w4g64": QuantSpec(4),
    "w4g32": QuantSpec(4, 32),
    "w4": QuantSpec(4, None),
    "w4-asymmetric": QuantSpec(4, symmetric=False),
    "w2g64": QuantSpec(2),
    "w2g256-asymmetric": QuantSpec(2, 256, symmetric=False),
    "w1": QuantSpec(1),
    "w1g32": QuantSpec(1, 32),
}

specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def make_inputs(M, N, K, spec, dtype, device, epilogue=None):
    """x, weight, bias, residual."""
    x = torch.randn(M, K, device=device, dtype=dtype)
    weight = quantize_weight(torch.randn(N, K, device=device) / K**0.5, spec)
    N_out = N // 2 if epilogue == "glu" else N
    bias = torch.randn(N, device=device, dtype=dtype)
    return x, weight, bias, torch.randn(M, N_out, device=device, dtype=dtype)


def check(y, x, weight, bias, residual, epilogue):
    """y of the kernel against the reference in y's dtype and in fp64."""
    assert_as_accurate(
        actual=y,
        low=linear_reference(x, weight, bias, residual, epilogue),
        high=linear_reference(x.double(), weight, bias.double(), residual.double(), epilogue),
    )
