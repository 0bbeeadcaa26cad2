"""Every kernel stays inside its arguments, and its programs do not disagree.

Ragged shapes, so that every mask has something to hide.
"""

import pytest
import torch
import triton
import triton.language as tl

from lowbit_kernels.conv1d import cuda as cuda_conv1d
from lowbit_kernels.formats import QuantSpec, quantize_weight
from lowbit_kernels.matmul import cuda as cuda_linear
from lowbit_kernels.matmul.dispatch import Gpu
from tests.conv1d_cases import CASES, FLOAT, INT8
from tests.conv1d_cases import make_inputs as make_conv1d_inputs
from tests.interpreter_memory import checked_memory
from tests.linear_cases import make_inputs as make_linear_inputs
from tests.linear_cases import specs
from tests.norm_cases import EPS, group_norm_kernels, make_group_inputs
from tests.test_front_end_cuda import make_layers as make_front_end

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="checks Triton's interpreter, which a GPU turns off"
)


HOPPER = Gpu("a GPU", (9, 0), 132, 227 * 1024)


@pytest.fixture(autouse=True)
def _checked_memory():
    with checked_memory():
        yield


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    monkeypatch.setattr(cuda_linear, "gpu_of", lambda device: HOPPER)
    monkeypatch.setattr(cuda_conv1d, "gpu_of", lambda device: HOPPER)


def run_linear(spec, epilogue, M=7, N=38, K=1101):
    x, weight, bias, residual = make_linear_inputs(M, N, K, spec, torch.float16, "cpu", epilogue)
    y, z = cuda_linear.linear_cuda(x, weight, bias, residual, epilogue, want_preactivation=True)
    cuda_linear.linear_backward_cuda(y, z, weight, epilogue, needs_bias_grad=True)


@specs
def test_linear(spec):
    run_linear(spec, "gelu")


@pytest.mark.parametrize("inputs", [None, "int8", "fp8"])
@pytest.mark.parametrize("M", [7, 70])
def test_linear_with_glu(M, inputs):
    run_linear(QuantSpec(4, inputs=inputs), "glu", M)


def test_dequantized_linear():
    weight = quantize_weight(torch.randn(38, 101), QuantSpec(4))
    cuda_linear.linear_dequant_cublas(torch.randn(1, 7, 101), weight, None, None, "silu")


@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_conv1d(case, spec):
    x, *rest = make_conv1d_inputs(case, spec, torch.float16)
    weight, bias, residual, lengths, geometry = rest
    y, z = cuda_conv1d.conv1d_cuda(
        x, weight, bias, residual, lengths, geometry, "gelu", want_preactivation=True
    )
    cuda_conv1d.conv1d_backward_cuda(
        y, z, weight, lengths, geometry, "gelu", *x.shape[1:], True, True
    )


@pytest.mark.parametrize("inputs", [None, "utterance", "static"])
@pytest.mark.parametrize("kind", ["group", "layer"])
def test_front_end(kind, inputs, monkeypatch):
    from lowbit_kernels.conv1d import front_end_cuda

    monkeypatch.setattr(front_end_cuda, "gpu_of", lambda device: HOPPER)
    layers = make_front_end(kind, inputs, "cpu", offset=inputs is not None)
    waveform, lengths = torch.randn(2, 301).half(), torch.tensor([301, 170])
    front_end_cuda.front_end_cuda(waveform, layers, lengths)


@pytest.mark.parametrize("D", [16, 36])
@pytest.mark.parametrize("kind", [None, "dense", "offset", "relative"])
def test_attention(kind, D):
    from lowbit_kernels.attention.backward_kernel import flash_attention_backward_triton
    from lowbit_kernels.attention.forward_kernel import flash_attention_triton
    from lowbit_kernels.attention.position import Scheme

    q, k, v, grad, rows = torch.randn(5, 2, 70, 2, D, dtype=torch.float16).transpose(2, 3)
    lengths = torch.tensor([70, 33])
    scheme = {
        None: lambda: None,
        "dense": lambda: Scheme("dense", torch.randn(1, 2, 70, 70)),
        "offset": lambda: Scheme("offset", torch.randn(2, 81), torch.randn(2, 2, 70)),
        "relative": lambda: Scheme("relative", torch.randn(2, 81, D, dtype=torch.float16), rows),
    }[kind]()
    seed = None if kind is None else torch.tensor([3])
    options = (lengths, scheme, seed, None if kind is None else 40, 0.1, 0.2)
    out, lse = flash_attention_triton(q, k, v, *options)
    flash_attention_backward_triton(grad, q, k, v, out, lse, *options, kind is not None)


def test_position_gate():
    from lowbit_kernels.attention.gate_kernel import position_gate_triton

    weight, bias, const = torch.randn(8, 12), torch.randn(8), torch.randn(3)
    x = torch.randn(2, 37, 36, dtype=torch.float16)
    position_gate_triton(x, weight, bias, const)
    position_gate_triton(x.mT.contiguous().mT, weight, bias, const)


def test_masked_group_norm():
    x, *rest = make_group_inputs(2, 6, 37, torch.float16, "cpu")
    for memory in (x, x.contiguous()):
        group_norm_kernels(memory, *rest, torch.tensor([37, 5]), 3, "gelu")


def test_norm_quantize():
    from lowbit_kernels.norm.norm_quantize_kernel import (
        norm_quantize_backward_triton,
        norm_quantize_triton,
    )

    x, residual, grad = torch.randn(3, 5, 100, dtype=torch.float16)
    weight, bias = torch.randn(2, 100)
    h, *_, mean, rstd = norm_quantize_triton(x, weight, bias, residual, EPS, True)
    norm_quantize_backward_triton(grad, grad, h, weight, bias, mean, rstd)
    x, lengths, scale, offset = x[None], torch.tensor([3]), torch.tensor(0.1), torch.randn(100)
    options = (None, EPS, False, lengths, "gelu", scale)
    *_, mean, rstd = norm_quantize_triton(x, weight, bias, *options, offset=offset)
    plain = (None, EPS, True, None, None, None, True)
    norm_quantize_triton(x, weight, bias, *plain, bias, weight, EPS)
    saved = (x, weight, bias, mean, rstd, lengths, "gelu")
    norm_quantize_backward_triton(grad[None], None, *saved)


@triton.jit
def _faulty_kernel(x_ptr, y_ptr, N, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    if FAULT == "load":
        tl.store(y_ptr + offs, tl.load(x_ptr + offs), mask=mask)
    elif FAULT == "store":
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=mask))
    elif FAULT == "race":
        tl.store(y_ptr + offs % BLOCK, tl.load(x_ptr + offs, mask=mask), mask=mask)
    elif FAULT == "duplicate":
        tl.store(y_ptr + offs // 2, tl.load(x_ptr + offs, mask=mask), mask=mask)
    else:
        tl.store(y_ptr + offs, tl.load(y_ptr + tl.maximum(offs - 1, 0), mask=mask), mask=mask)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("load", "loads 2 of 16 elements outside of its arguments"),
        ("store", "stores 2 of 16 elements outside of its arguments"),
        ("race", "writes two values to one place of y_ptr"),
        ("duplicate", "writes two values to one place of y_ptr"),
        ("order", "reads what another of its programs writes into y_ptr"),
    ],
)
def test_faults_are_seen(fault, message):
    N = 30 if fault in ("load", "store") else 32
    with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
        _faulty_kernel[(2,)](torch.arange(float(N)), torch.zeros(N), N, FAULT=fault, BLOCK=16)
