"""Triton kernels of low_bit_linear against the reference.

Dimension key: M rows, N output features, K input features.
"""

import pytest
import torch

from lowbit_kernels.checks import EPILOGUES
from lowbit_kernels.formats import QuantSpec, quantize_weight
from lowbit_kernels.matmul import cuda as cuda_linear
from lowbit_kernels.matmul import dispatch, gpu, kernel, linear_reference, low_bit_linear
from lowbit_kernels.matmul.backward_kernel import linear_dx_triton
from lowbit_kernels.matmul.decode_kernel import dequantize_triton
from lowbit_kernels.matmul.dispatch import Gpu, LinearConfig, candidates
from lowbit_kernels.matmul.epilogue_kernel import epilogue_backward_triton
from lowbit_kernels.matmul.kernel import linear_triton
from lowbit_kernels.matmul.quantize_kernel import quantize_rows_triton
from lowbit_kernels.matmul.reference import (
    epilogue_backward_reference,
    input_scale_rows,
    preactivation_reference,
    quantize_rows,
)
from lowbit_kernels.testing import assert_as_accurate
from tests.linear_cases import SPECS, check, make_inputs, specs

SHAPES = [  # M, N, K
    pytest.param(32, 64, 512, id="whole-tiles"),
    pytest.param(7, 38, 101, id="ragged"),
    pytest.param(1, 70, 260, id="one-row"),
]
GPU_SHAPES = [
    pytest.param(499, 4096, 1024, id="wav2vec2-large"),
    pytest.param(1499, 768, 3072, id="wav2vec2-base"),
    pytest.param(33, 196, 324, id="squeezeformer"),
    pytest.param(1, 4096, 1024, id="one-frame"),
    pytest.param(64, 1024, 4096, id="short-chunk"),
    pytest.param(8000, 1024, 1024, id="a-batch"),
]
SMALL = LinearConfig(block_n=32, block_m=16)  # several tiles of small shapes

shapes = pytest.mark.parametrize(("M", "N", "K"), SHAPES)


@specs
@shapes
def test_kernel_is_as_accurate_as_torch(M, N, K, spec, device):
    x, weight, bias, residual = make_inputs(M, N, K, spec, torch.float16, device)
    y, _ = linear_triton(x[None], weight, bias, residual, None, SMALL)
    check(y, x, weight, bias, residual, None)


@pytest.fixture(params=[1, 2], ids=["wgmma", "mma"])
def matrix_unit(request, monkeypatch):
    """The structure of the kernel for either kind of matrix unit, where it is interpreted."""
    monkeypatch.setattr(gpu, "INTERPRETED_PAIRS", request.param)
    kernel._plan.cache_clear()
    yield
    kernel._plan.cache_clear()


@specs
@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("K", [512, 1101], ids=["whole", "ragged"])
@pytest.mark.usefixtures("matrix_unit")
def test_steps_of_any_length(K, unroll, spec, device):
    x, weight, bias, residual = make_inputs(3, 40, K, spec, torch.float16, device)
    config = LinearConfig(block_n=32, block_m=16, unroll=unroll)
    y, _ = linear_triton(x[None], weight, bias, residual, None, config)
    check(y, x, weight, bias, residual, None)


@pytest.mark.parametrize(
    "tile", [*dispatch._HOPPER, *dispatch._OTHERS], ids=lambda t: str(t.config)
)
@pytest.mark.parametrize("epilogue", ["gelu", "glu"])
def test_every_tile_is_written_whole(epilogue, tile, device):
    """A tile that is larger than the output, and another that is cut."""
    if device == "cuda":
        pytest.skip("on a GPU with the tiles for it, below")
    M = min(tile.config.block_m + 3, tile.max_rows or 400)
    args = make_inputs(M, 130, 64, SPECS["w4g64"], torch.float16, device, epilogue)
    x, weight, bias, residual = args
    y, z = linear_triton(
        x[None], weight, bias, residual, epilogue, tile.config, want_preactivation=True
    )
    check(y, *args, epilogue)
    low = preactivation_reference(x, weight, bias)
    high = preactivation_reference(x.double(), weight, bias.double())
    assert_as_accurate(z, low, high, "preactivation")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_and_split_sums(epilogue, splits, device):
    config = LinearConfig(block_n=32, block_m=16, splits=splits)
    args = make_inputs(5, 38, 300, SPECS["w4g64"], torch.float16, device, epilogue)
    x, weight, bias, residual = args
    y, z = linear_triton(x[None], weight, bias, residual, epilogue, config, want_preactivation=True)
    check(y, *args, epilogue)
    assert_as_accurate(
        z,
        preactivation_reference(x, weight, bias),
        preactivation_reference(x.double(), weight, bias.double()),
        "preactivation",
    )


def test_more_parts_than_steps(device):
    x, weight, bias, residual = make_inputs(3, 8, 70, SPECS["w4g64"], torch.float16, device)
    config = LinearConfig(block_n=32, block_m=16, splits=5)
    y, _ = linear_triton(x[None], weight, bias, residual, None, config)
    check(y, x, weight, bias, residual, None)


def test_overlapping_rows_are_read_in_place(device):
    """A channel-last strided convolution's view: B utterances, rows of two frames, stride one."""
    B, T, C = 2, 9, 40
    frames = torch.randn(B, T, C, device=device, dtype=torch.float16)
    x = frames.as_strided((B, T - 1, 2 * C), (T * C, C, 1))
    _, weight, bias, residual = make_inputs(B * (T - 1), 24, 2 * C, SPECS["w4g64"], x.dtype, device)
    y, _ = linear_triton(x, weight, bias, residual, None, SMALL)
    check(y, x.reshape(-1, 2 * C), weight, bias, residual, None)


@specs
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_dequantized_bits_are_the_references(spec, dtype, device):
    weight = quantize_weight(torch.randn(70, 101, device=device), spec)
    assert torch.equal(dequantize_triton(weight, dtype), weight.dequantize(dtype))


@specs
@shapes
def test_dx_is_as_accurate_as_torch(M, N, K, spec, device):
    *_, weight, _, dz = make_inputs(M, N, K, spec, torch.float16, device)
    assert_as_accurate(
        linear_dx_triton(dz, weight),
        dz @ weight.dequantize(torch.float16),
        dz.double() @ weight.dequantize(torch.float64),
    )


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogue_gradients(epilogue, device):
    M, N = 70, 134
    z = 3 * torch.randn(M, N, device=device, dtype=torch.float16)
    dy = torch.randn(M, N // 2 if epilogue == "glu" else N, device=device, dtype=torch.float16)
    dz, dbias = epilogue_backward_triton(dy, z, epilogue, needs_bias_grad=True)
    low = epilogue_backward_reference(dy, z, epilogue)
    high = epilogue_backward_reference(dy.double(), z.double(), epilogue)
    assert_as_accurate(dz, low, high, "dz")
    assert_as_accurate(dbias, low.sum(0), high.sum(0), "dbias")


INT8 = {
    "w8": QuantSpec(8, inputs="int8"),
    "w4g64": QuantSpec(4, inputs="int8"),
    "w2g64": QuantSpec(2, inputs="int8"),
    "w1g32": QuantSpec(1, 32, inputs="int8"),
}
int8_specs = pytest.mark.parametrize("spec", INT8.values(), ids=INT8)


@int8_specs
@pytest.mark.parametrize("splits", [1, 2])
def test_int8_products_are_exact(spec, splits, device):
    M, N, K = 5, 38, 300
    weight = quantize_weight(torch.randn(N, K, device=device), spec)
    weight.scale.fill_(1)
    x = torch.randint(-127, 128, (M, K), device=device)
    config = LinearConfig(block_n=32, block_m=16, splits=splits)
    ones = torch.ones(M, device=device)
    y, _ = linear_triton(
        x.to(torch.int8)[None], weight, None, None, None, config, x_scale=ones, dtype=torch.float32
    )
    # sums below 2 ** 24 are exact in fp32
    assert torch.equal(y, (x.double() @ weight.integers().double().t()).float())


@pytest.mark.parametrize("kind", ["token", "utterance", "static"])
@int8_specs
def test_int8_inputs_are_as_accurate_as_the_reference(spec, kind, device):
    B, T, N, K = 2, 3, 38, 101
    x, weight, bias, residual = make_inputs(B * T, N, K, spec, torch.float16, device)
    x = x.view(B, T, K)
    rows = input_scale_rows(x, kind, torch.tensor(0.02, device=device))
    q, scale = quantize_rows_triton(x, None if kind == "token" else rows)
    assert torch.equal(scale, rows)
    assert torch.equal(q.reshape(-1, K), quantize_rows(x.view(-1, K), rows))
    y, _ = linear_triton(
        q, weight, bias, residual, "gelu", SMALL, x_scale=scale, dtype=torch.float16
    )
    x = x.view(-1, K)
    low = linear_reference(x, weight, bias, residual, "gelu", x_scale_rows=rows)
    high = linear_reference(
        x.double(), weight, bias.double(), residual.double(), "gelu", x_scale_rows=rows
    )
    assert_as_accurate(y, low, high)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_int8_cannot_hold_is_not_hidden(value, device):
    x = torch.randn(1, 3, 50, device=device, dtype=torch.float16)
    x[0, 1, 7] = value
    q, scale = quantize_rows_triton(x, None)
    assert torch.isfinite(scale).tolist() == [True, False, True]
    assert torch.equal(q[0, ::2], quantize_rows(x[0, ::2], scale[::2]))


@pytest.mark.parametrize("K", [4096, 4097, 9000], ids=["one-block", "and-one", "three-blocks"])
@pytest.mark.parametrize("given", [False, True])
def test_rows_of_any_length_are_quantized_whole(K, given, device):
    x = torch.randn(1, 2, K, device=device)
    x[0, 0, 1] = x[0, 1, -1] = 9.0
    rows = input_scale_rows(x, "token", None)
    q, scale = quantize_rows_triton(x, rows if given else None)
    assert torch.equal(scale, rows)
    assert torch.equal(q[0], quantize_rows(x[0], rows))
    x[0, 1, -1] = torch.nan
    _, scale = quantize_rows_triton(x, None)
    assert scale.isfinite().tolist() == [True, False]


def test_silent_rows_quantize_to_zeros(device):
    q, scale = quantize_rows_triton(torch.zeros(1, 2, 50, device=device), None)
    assert not q.any()
    assert torch.isfinite(1 / scale).all()


@pytest.fixture
def hopper(monkeypatch):
    """The CUDA path, with the numbers of an H100, on whatever device the tests have."""
    monkeypatch.setattr(cuda_linear, "gpu_of", lambda device: Gpu("a GPU", (9, 0), 132, 227 * 1024))


@pytest.mark.parametrize("epilogue", [None, "silu", "glu"])
@pytest.mark.parametrize("inputs", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.usefixtures("hopper")
def test_cuda_path_forward_and_backward(dtype, inputs, epilogue, device):
    spec = QuantSpec(4, inputs=inputs)
    x, weight, bias, residual = make_inputs(6, 38, 101, spec, dtype, device, epilogue)
    # neither x nor the residual is contiguous
    x, residual = x.t().contiguous().t().view(2, 3, 101), residual.t().contiguous().t()
    y, z = cuda_linear.linear_cuda(
        x, weight, bias, residual.view(2, 3, -1), epilogue, want_preactivation=True
    )
    assert y.shape == (2, 3, residual.shape[1])
    check(y.view(6, -1), x.reshape(6, -1), weight, bias, residual, epilogue)
    dy = torch.randn_like(y)
    dx, dbias = cuda_linear.linear_backward_cuda(dy, z, weight, epilogue, needs_bias_grad=True)
    grads = {}
    for kind in (dtype, torch.float64):
        dz = epilogue_backward_reference(dy.to(kind), z.to(kind), epilogue)
        grads[kind] = dz @ weight.dequantize(kind), dz.sum((0, 1))
    assert_as_accurate(dx, grads[dtype][0], grads[torch.float64][0], "dx")
    assert_as_accurate(dbias, grads[dtype][1], grads[torch.float64][1], "dbias")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.usefixtures("hopper")
def test_cuda_outputs_may_be_written_into(dtype, device):
    """Autograd refuses that for a view, and encoders zero their padded frames in place."""
    x, weight, bias, _ = make_inputs(6, 38, 101, SPECS["w4g64"], dtype, device)
    for rows in (x, x.view(2, 3, 101)):
        y, z = cuda_linear.linear_cuda(rows, weight, bias, None, "gelu", want_preactivation=True)
        assert not y._is_view()
        assert not z._is_view()


@pytest.mark.parametrize("inputs", [None, "int8"])
@pytest.mark.usefixtures("hopper")
def test_cuda_path_without_rows(inputs, device):
    weight = quantize_weight(torch.randn(8, 40, device=device), QuantSpec(4, inputs=inputs))
    x = torch.randn(2, 0, 40, device=device, dtype=torch.float16)
    y, z = cuda_linear.linear_cuda(x, weight, None, None, "gelu", want_preactivation=True)
    dx, dbias = cuda_linear.linear_backward_cuda(y, z, weight, "gelu", needs_bias_grad=True)
    assert y.shape == (2, 0, 8)
    assert dx.shape == x.shape
    assert torch.equal(dbias, torch.zeros(8, device=device, dtype=torch.float16))


@pytest.mark.gpu
@specs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("M", "N", "K"), GPU_SHAPES)
def test_real_shapes_on_a_gpu(M, N, K, dtype, spec):
    for epilogue in (None, "gelu", "glu"):
        args = make_inputs(M, N, K, spec, dtype, "cuda", epilogue)
        x, weight, bias, residual = args
        y = low_bit_linear(x, weight, bias, epilogue=epilogue, residual=residual)
        check(y, *args, epilogue)
    dz = torch.randn(M, N, device="cuda", dtype=dtype)
    assert_as_accurate(
        linear_dx_triton(dz, weight),
        dz @ weight.dequantize(dtype),
        dz.double() @ weight.dequantize(torch.float64),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("inputs", [None, "int8"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1024, 1024), (16, 4096, 1024), (700, 196, 324)])
def test_every_tile_on_a_gpu(M, N, K, inputs, bits):
    args = make_inputs(M, N, K, QuantSpec(bits, inputs=inputs), torch.bfloat16, "cuda", "gelu")
    x, weight, bias, residual = args
    rows, scale = (x[None], None) if inputs is None else quantize_rows_triton(x[None], None)
    for config in candidates(M, N, K, bits, rows.itemsize, gpu.gpu_of(x.device)):
        y, _ = linear_triton(
            rows, weight, bias, residual, "gelu", config, x_scale=scale, dtype=x.dtype
        )
        check(y, *args, "gelu")


@pytest.mark.gpu
@int8_specs
@pytest.mark.parametrize(("M", "N", "K"), GPU_SHAPES)
def test_real_shapes_with_int8_inputs_on_a_gpu(M, N, K, spec):
    args = make_inputs(M, N, K, spec, torch.bfloat16, "cuda")
    check(low_bit_linear(*args[:3], epilogue="gelu", residual=args[3]), *args, "gelu")


@pytest.mark.gpu
@pytest.mark.parametrize("inputs", [None, "int8"])
def test_graph_replays_equal_eager_on_a_gpu(inputs):
    spec = QuantSpec(4, inputs=inputs)
    x, weight, bias, _ = make_inputs(16, 1024, 1024, spec, torch.bfloat16, "cuda")
    low_bit_linear(x, weight, bias)  # compiles outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = low_bit_linear(x, weight, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, low_bit_linear(x, weight, bias))
