"""The CUDA implementation of low_bit_conv1d against the reference, forward and backward.

Triton's interpreter runs it where there is no GPU.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.conv1d import Geometry, conv1d_reference, low_bit_conv1d, quantize_utterances
from lowbit_kernels.conv1d.layout import channel_last
from lowbit_kernels.conv1d.reference import conv1d_backward_reference, mask_frames
from lowbit_kernels.formats import QuantSpec, quantize_weight
from lowbit_kernels.matmul import dispatch
from lowbit_kernels.matmul.dispatch import Choice, Gpu, LinearConfig
from lowbit_kernels.testing import assert_as_accurate
from tests.conv1d_cases import (
    CASES,
    EPILOGUES,
    FLOAT,
    INT8,
    keywords,
    make_inputs,
)
from tests.interpreter_memory import round_products_alike

# the last two are asymmetric, which a depthwise weight cannot be
SPECS = [
    QuantSpec(bits=bits, inputs=inputs) for bits in (1, 2, 4, 8) for inputs in (None, "int8")
] + [QuantSpec(bits=bits, symmetric=False) for bits in (2, 4)]
DTYPES = [
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter lacks bf16
]


@pytest.fixture
def cuda_code(monkeypatch, device):
    """The CUDA implementation, which the interpreter runs where there is no GPU."""
    from lowbit_kernels.conv1d import cuda

    if device == "cpu":
        monkeypatch.setattr(cuda, "gpu_of", lambda device: Gpu("a GPU", (8, 0), 4, 99 << 10))
    return cuda


def check_kernels(cuda, case, spec, epilogue, dtype, device):
    x, weight, bias, residual, lengths, geometry = make_inputs(case, spec, dtype, device, epilogue)
    y, z = cuda.conv1d_cuda(
        x, weight, bias, residual, lengths, geometry, epilogue, want_preactivation=True
    )

    def reference(wide, epilogue, residual=None):
        residual = None if residual is None else residual.to(wide)
        return conv1d_reference(
            x.to(wide), weight, bias.to(wide), geometry, epilogue, residual, lengths
        )

    high = torch.float64
    assert_as_accurate(
        y, reference(dtype, epilogue, residual), reference(high, epilogue, residual), "y"
    )
    assert_as_accurate(z, reference(dtype, None), reference(high, None), "preactivation")

    grad_y = torch.randn_like(y)
    grads = cuda.conv1d_backward_cuda(
        grad_y, z, weight, lengths, geometry, epilogue, *x.shape[1:], True, True
    )
    low, high = (
        conv1d_backward_reference(
            grad_y.to(wide), z.to(wide), weight, geometry, x.shape[2], epilogue, lengths
        )
        for wide in (dtype, torch.float64)
    )
    assert_as_accurate(grads[0], low[0], high[0], "dx")
    assert_as_accurate(grads[1], low[1], high[1], "dbias")


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_as_accurate_as_torch(case, cuda_code, device):
    check_kernels(cuda_code, case, FLOAT, "gelu", torch.float16, device)


@pytest.mark.parametrize("case", ["pointwise", "front-end-first", "dilated", "depthwise"])
def test_int8_kernels_are_as_accurate_as_torch(case, cuda_code, device):
    check_kernels(cuda_code, case, INT8, "gelu", torch.float16, device)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("case", ["front-end", "grouped"])
def test_every_width(case, spec, cuda_code, device):
    check_kernels(cuda_code, case, spec, None, torch.float16, device)


@pytest.mark.parametrize("spec", SPECS[:-2], ids=str)
def test_every_width_of_a_depthwise_weight(spec, cuda_code, device):
    check_kernels(cuda_code, "depthwise-causal", spec, None, torch.float16, device)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise-causal"])
def test_every_epilogue(case, epilogue, cuda_code, device):
    check_kernels(cuda_code, case, FLOAT, epilogue, torch.float16, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise-strided"])
def test_every_dtype(case, spec, dtype, cuda_code, device):
    check_kernels(cuda_code, case, spec, "silu", dtype, device)


@pytest.mark.parametrize("epilogue", [None, "gelu", "glu"])
@pytest.mark.parametrize(
    "case", ["pointwise", "front-end-first", "front-end", "even-same", "dilated", "grouped"]
)
def test_dequantized_weights(case, epilogue, cuda_code, device, monkeypatch):
    """What serves thousands of frames, asked for a few."""
    monkeypatch.setattr(dispatch, "DEQUANTIZE_FROM_M", 1)
    monkeypatch.setattr(cuda_code, "DEQUANTIZE_DX_FROM_M", 1)
    # whatever follows, as measured tables may say
    choose = cuda_code.choose_conv1d.__wrapped__
    monkeypatch.setattr(cuda_code, "choose_conv1d", lambda *args: choose(*args[:8], is_plain=True))
    check_kernels(cuda_code, case, FLOAT, epilogue, torch.float16, device)


@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
def test_a_split_sum_of_groups(spec, cuda_code, monkeypatch, device):
    choice = Choice("matmul", LinearConfig(64, 16, splits=2))
    monkeypatch.setattr(cuda_code, "choose_conv1d", lambda *args: choice)
    check_kernels(cuda_code, "positional", spec, "gelu", torch.float16, device)


@pytest.mark.parametrize("static", [False, True])
def test_kernels_quantize_to_the_reference_integers(static, device):
    from lowbit_kernels.conv1d.kernels.frames import quantize_frames_triton

    x = torch.randn(3, 37, 19, device=device)
    x[0, :2, :3] = x[0].abs().max() * torch.tensor([-1.0, 0.5, 0.25], device=device) / 127  # ties
    x[1] = 0.0
    x[2, 3, 18] = 100.0  # padded
    lengths = torch.tensor([19, 19, 7], device=device)
    scale = torch.tensor(0.01, device=device) if static else None
    q, scales = quantize_frames_triton(
        channel_last(x), scale, lengths, Geometry(5, left=1, right=3), pad=True
    )
    expected, expected_scales = quantize_utterances(mask_frames(x, lengths), scale)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(q.transpose(1, 2), F.pad(expected, (1, 3)))


@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
@pytest.mark.parametrize("case", ["pointwise", "grouped", "depthwise-causal"])
def test_kernels_give_an_utterance_the_same_bits_alone(case, spec, cuda_code, device, monkeypatch):
    if device == "cpu":
        round_products_alike(monkeypatch)
    x, weight, bias, residual, lengths, geometry = make_inputs(
        case, spec, torch.float16, device, "silu"
    )
    run = cuda_code.conv1d_cuda
    y, _ = run(x, weight, bias, residual, lengths, geometry, "silu")
    assert torch.equal(y, run(x, weight, bias, residual, lengths, geometry, "silu")[0])
    n = int(lengths[1])
    T_out = geometry.frames_out(n)
    alone, _ = run(x[1:, :, :n], weight, bias, residual[1:, :, :T_out], None, geometry, "silu")
    assert torch.equal(alone[0], y[1, :, :T_out])


@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise"])
def test_an_empty_batch(case, spec, cuda_code, device):
    x, weight, bias, residual, lengths, geometry = make_inputs(case, spec, device=device, B=0)
    x.requires_grad_()
    y = low_bit_conv1d(x, weight, bias, lengths=lengths, epilogue="silu", **keywords(geometry))
    y.sum().backward()
    assert y.shape == residual.shape
    assert x.grad.shape == x.shape
    y, z = cuda_code.conv1d_cuda(
        x.detach(), weight, bias, residual, lengths, geometry, "silu", want_preactivation=True
    )
    dx, dbias = cuda_code.conv1d_backward_cuda(
        y, z, weight, lengths, geometry, "silu", *x.shape[1:], True, True
    )
    assert (y.shape, dx.shape, dbias.tolist()) == (residual.shape, x.shape, [0.0] * weight.N)


@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_nothing_but_padding(groups, spec, cuda_code, device):
    geometry = Geometry(3, left=2, right=2, groups=groups)
    weight = quantize_weight(torch.randn(8, 24 // groups, device=device), spec)
    x = torch.empty(2, 8, 0, dtype=torch.float16, device=device)
    y, _ = cuda_code.conv1d_cuda(x, weight, None, None, None, geometry, None)
    assert torch.equal(y, torch.zeros(2, 8, 2, dtype=torch.float16, device=device))


def test_choice_of_kernel_is_a_pure_function(cuda_code):
    dense, grouped = Geometry(3, 2), Geometry(3, groups=2)

    def choose(geometry, inputs=None, dtype=torch.float16, M=100, is_depthwise=False):
        return cuda_code.choose_kernel(M, geometry, is_depthwise, inputs, dtype, (8, 0))

    assert choose(dense) == "matmul"
    assert choose(dense, M=10**6) == "dequant_cublas"
    assert choose(replace(dense, dilation=2), M=10**6) == "dequant_cudnn"
    assert (
        cuda_code.choose_kernel(10**6, dense, False, None, torch.float16, (8, 0), is_plain=False)
        == "matmul"
    )
    assert choose(dense, dtype=torch.float32) == "dequant_cudnn"
    assert choose(dense, dtype=torch.float32, inputs="int8") == "matmul"
    assert choose(replace(dense, dilation=2)) == "matmul"
    assert choose(grouped) == choose(grouped, M=10**6) == "matmul"
    assert choose(grouped, dtype=torch.float32) == "dequant_cudnn"
    assert choose(grouped, is_depthwise=True, dtype=torch.float32) == "depthwise"
    with pytest.raises(NotImplementedError, match="capability"):
        cuda_code.choose_kernel(1, dense, False, None, torch.float16, (7, 5))


REAL = {
    "wav2vec2-front-end": (512, 512, 3199, Geometry(3, stride=2)),
    "wav2vec2-positional": (768, 768, 499, Geometry(128, left=64, right=64, groups=16)),
    "data2vec-positional": (768, 768, 499, Geometry(19, left=9, right=9, groups=16)),
    "conformer-depthwise": (512, 512, 499, Geometry(31, left=15, right=15, groups=512)),
    "squeezeformer-depthwise": (324, 324, 499, Geometry(31, left=15, right=15, groups=324)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case, spec, dtype, cuda_code, monkeypatch):
    monkeypatch.setitem(CASES, case, REAL[case])
    check_kernels(cuda_code, case, spec, "gelu", dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise"])
def test_graph_capture_replays(case, spec):
    x, weight, bias, _, lengths, geometry = make_inputs(case, spec, torch.float16, "cuda")

    def run():
        return low_bit_conv1d(x, weight, bias, lengths=lengths, **keywords(geometry))

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, run())
