"""Kernels of fake quantization stay inside their arguments, and their programs do not disagree.

Ragged shapes, so that every mask has something to hide.
"""

from dataclasses import replace

import pytest
import torch

from lowbit_kernels.fake_quant import Levels, Quantizer
from lowbit_kernels.fake_quant.elementwise_kernel import (
    BLOCK_ROW,
    fake_quantize_backward_triton,
    fake_quantize_triton,
)
from lowbit_kernels.fake_quant.reference import as_matrices
from lowbit_kernels.fake_quant.weight_gradient_kernel import weight_gradient_triton
from tests.fake_quant_cases import granularities, make_quantizer
from tests.interpreter_memory import checked_memory
from tests.test_fake_quant_linear import SMALL, make_inputs

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="checks Triton's interpreter, which a GPU turns off"
)


@pytest.fixture(autouse=True)
def _checked_memory():
    with checked_memory():
        yield


@granularities
def test_elementwise(granularity):
    x, grad = torch.randn(2, 11, 301)
    quantizer = make_quantizer((11,), 301, Levels.of_weight(4), granularity)
    rows, matrices = as_matrices(x, quantizer)
    fake_quantize_triton(rows, matrices, torch.float16)
    fake_quantize_backward_triton(grad[None], rows, matrices)


@pytest.mark.parametrize("K", [70, BLOCK_ROW + 50])
def test_rows(K):
    fake_quantize_triton(torch.randn(3, K), Quantizer(Levels.of_input(8)), torch.float32)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind", ["float", "lsq-tensor", "lsq-two-level", "elastic-row"])
def test_weight_gradient(kind, splits):
    x, weight, _, dz, quantizer = make_inputs(150, 70, 101, kind, torch.float16)
    matrices = quantizer and as_matrices(weight, quantizer)[1]
    weight_gradient_triton(dz, x, weight, matrices, replace(SMALL, splits=splits))
