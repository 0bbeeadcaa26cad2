"""CUDA implementations of ops take the op's arguments, and give what those for a CPU give.

Dimension key: M rows, N output features, K input features; B batch, H heads, T frames, D head
dimension.
"""

import math
from contextlib import nullcontext
from dataclasses import astuple
from functools import partial

import pytest
import torch

from lowbit_kernels import device as cuda_device
from lowbit_kernels.attention import low_bit_op
from lowbit_kernels.attention import op as attention_op
from lowbit_kernels.conv1d import cuda as conv1d_cuda
from lowbit_kernels.conv1d import op as conv1d_op
from lowbit_kernels.fake_quant import Levels, Quantizer, linear_cuda
from lowbit_kernels.fake_quant import linear_op as training_op
from lowbit_kernels.fake_quant import op as fake_quant_op
from lowbit_kernels.formats import QuantSpec
from lowbit_kernels.matmul import cuda as matmul_cuda
from lowbit_kernels.matmul import folded_op, int8_op
from lowbit_kernels.matmul import op as linear_op
from lowbit_kernels.matmul.gpu import Gpu
from lowbit_kernels.matmul.reference import norm_columns, row_statistics
from lowbit_kernels.testing import assert_as_accurate
from tests.conv1d_cases import make_inputs as conv1d_inputs
from tests.linear_cases import make_inputs

H200 = Gpu("NVIDIA H200", (9, 0), 132, 227 * 1024)
M, N, K = 6, 38, 101
half = partial(torch.randn, dtype=torch.float16)


def linear_cases():
    x, weight, bias, residual = make_inputs(M, N, K, QuantSpec(4), torch.float16, "cpu", "glu")
    packed = linear_op.flatten(weight)
    forward = (x, bias, residual, "glu", *packed)
    yield "linear", linear_op._cuda, forward
    yield "linear_train", linear_op._cuda_train, forward
    z, grad = half(M, N), half(M, N // 2)
    yield "linear_backward", linear_op._cuda_backward, (grad, z, "glu", True, *packed)
    yield "linear_backward", linear_op._cuda_backward, (half(M, N), None, None, False, *packed)
    norm = half(K), half(K)
    normed = (row_statistics(x), *norm, norm_columns(weight, *norm), 0.5)
    normed = (x, *normed, bias, residual, "glu", *packed)
    yield "linear_normed", folded_op._cuda_normed, normed
    with_stats = (x, bias, half(M, N), "silu", *packed)
    yield "linear_with_stats", folded_op._cuda_with_stats, with_stats
    spec = QuantSpec(4, inputs="int8")
    _, weight, bias, residual = make_inputs(M, N, K, spec, torch.float16, "cpu")
    q, scale = torch.randint(-127, 128, (M, K), dtype=torch.int8), torch.rand(M, 1)
    rest = (q, scale, bias, residual, "silu", torch.float16, None, *linear_op.flatten(weight))
    yield "linear_int8", int8_op._cuda, rest


def fake_quantize_cases():
    quantizer = Quantizer(Levels.of_weight(4), torch.full((N,), 0.02), "lsq")
    packed, weight = fake_quant_op.flatten(quantizer), torch.randn(N, K) / K**0.5
    yield "fake_quantize", fake_quant_op._cuda, (weight, *packed)
    backward = (torch.randn(N, K), weight, *packed)
    yield "fake_quantize_backward", fake_quant_op._cuda_backward, backward
    x, bias, residual, grad = half(2, 3, K), half(N), half(2, 3, N), half(2, 3, N)
    forward = (x, weight, bias, residual, "gelu", True, *packed)
    yield "training_linear", training_op._cuda, forward
    rounded = torch.ops.lowbit.training_linear(*forward)[2]
    backward = (grad, x, weight, half(2, 3, N), rounded, "gelu", True, True, True, *packed)
    yield "training_linear_backward", training_op._cuda_backward, backward


def conv1d_cases():
    for case in ("front-end", "grouped", "depthwise"):
        x, weight, bias, residual, lengths, geometry = conv1d_inputs(
            case, QuantSpec(4), torch.float16, epilogue="silu"
        )
        x, tail = x.nan_to_num(), (*astuple(geometry), *linear_op.flatten(weight))
        args = (x, bias, residual, lengths, "silu", *tail)
        yield "conv1d", lambda *args: conv1d_op._cuda(*args)[0], args
        yield "conv1d_train", partial(conv1d_op._cuda, want_preactivation=True), args
        z, grad = torch.randn_like(residual), torch.randn_like(residual)
        backward = (grad, z, lengths, "silu", *x.shape[1:], True, True, *tail)
        yield "conv1d_backward", conv1d_op._cuda_backward, backward


def natural_attention(*args, op=attention_op):
    out, lse = op._cuda(*args)
    return out, lse * math.log(2)  # each device keeps the logarithm that its kernels take


def binary_attention_backward(*args):
    return attention_op._cuda_backward(*args[:5], args[5] / math.log(2), *args[6:])


def binary_low_bit_backward(*args):
    return low_bit_op._cuda_backward(*args[:4], args[4] / math.log(2), *args[5:])


def attention_cases():
    q, k, v, grad = (half(2, 3, 17, 16) for _ in range(4))
    schemes = (
        (None, None, None),
        ("dense", half(1, 3, 17, 17), None),
        ("offset", torch.randn(3, 17), half(2, 3, 17)),
        ("relative", half(3, 33, 16), half(2, 3, 17, 16)),
    )
    for scheme in schemes:
        options = (torch.tensor([17, 9]), *scheme, None, 8, None, 0.0)
        out, lse = torch.ops.lowbit.flash_attention(q, k, v, *options)
        yield "flash_attention", natural_attention, (q, k, v, *options)
        backward = (grad, q, k, v, out, lse, *options, True)
        yield "flash_attention_backward", binary_attention_backward, backward
        options = (*options[:5], torch.tensor(0.03), 8, 0.25, 0.0, 3)
        _, lse = torch.ops.lowbit.low_bit_attention(q, k, v, *options)
        low_bit = partial(natural_attention, op=low_bit_op)
        yield "low_bit_attention", low_bit, (q, k, v, *options)
        backward = (grad, q, k, v, lse, *options, True)
        yield "low_bit_attention_backward", binary_low_bit_backward, backward


@pytest.mark.parametrize(
    "cases", [linear_cases, fake_quantize_cases, conv1d_cases, attention_cases]
)
def test_gives_what_the_cpu_gives(cases, device, monkeypatch):
    monkeypatch.setattr(matmul_cuda, "gpu_of", lambda device: H200)
    monkeypatch.setattr(conv1d_cuda, "gpu_of", lambda device: H200)
    monkeypatch.setattr(linear_cuda, "_num_sms", lambda device: 132)
    torch.manual_seed(0)
    for name, implementation, args in cases():
        expected = getattr(torch.ops.lowbit, name)(*args)
        actual = implementation(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in args))
        if isinstance(expected, torch.Tensor):
            expected, actual = (expected,), (actual,)
        for i, (ours, cpus) in enumerate(zip(actual, expected, strict=True)):
            # as numbers of 16 bits, which two orders of summing agree on
            assert ours.dtype == cpus.dtype
            ours = ours.cpu().half()
            assert_as_accurate(ours, cpus.half(), cpus.double(), f"{name}, result {i}")


@pytest.mark.parametrize("function", [torch.add, "torch.add"], ids=["function", "name"])
def test_runs_on_the_device_of_the_first_tensor(function, monkeypatch):
    registered, devices = {}, []
    monkeypatch.setattr(torch.library, "impl", lambda op, key, f: registered.update({(op, key): f}))
    monkeypatch.setattr(cuda_device, "on_device", lambda x: devices.append(x) or nullcontext())
    cuda_device.implement_on_cuda("lowbit::sum", function)
    x, y = torch.ones(2), torch.full((2,), 2.0)
    assert registered["lowbit::sum", "cuda"](x, y).tolist() == [3.0, 3.0]
    assert devices[0] is x
