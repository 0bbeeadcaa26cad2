"""low_bit_linear: kernels against the reference, the op's registration, gradients and errors.

Dimension key: M rows, N output features, K input features.
"""

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.formats import QuantSpec, empty_depthwise_weight, quantize_weight
from lowbit_kernels.matmul import cuda as cuda_linear
from lowbit_kernels.matmul import linear_reference, low_bit_linear
from lowbit_kernels.matmul.backward_kernel import linear_dx_triton
from lowbit_kernels.matmul.decode_kernel import dequantize_triton
from lowbit_kernels.matmul.dispatch import LinearConfig, choose_backend, choose_config
from lowbit_kernels.matmul.epilogue_kernel import epilogue_backward_triton
from lowbit_kernels.matmul.kernel import linear_triton
from lowbit_kernels.matmul.op import EPILOGUES, _flatten
from lowbit_kernels.matmul.quantize_kernel import quantize_rows_triton
from lowbit_kernels.matmul.reference import (
    epilogue_backward_reference,
    input_scale_rows,
    preactivation_reference,
    quantize_rows,
)
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
SHAPES = [  # M, N, K
    pytest.param(32, 64, 512, id="whole-tiles"),
    pytest.param(7, 38, 101, id="ragged"),
    pytest.param(1, 70, 260, id="one-row"),
]
GPU_SHAPES = [
    pytest.param(499, 4096, 1024, id="wav2vec2-large"),
    pytest.param(1499, 768, 3072, id="wav2vec2-base"),
    pytest.param(33, 196, 324, id="squeezeformer"),
]
SMALL = LinearConfig(block_n=32, block_m=16)  # several tiles of small shapes

specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
shapes = pytest.mark.parametrize(("M", "N", "K"), SHAPES)


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


@specs
@shapes
def test_kernel_is_as_accurate_as_torch(M, N, K, spec, device):
    x, weight, bias, residual = make_inputs(M, N, K, spec, torch.float16, device)
    y, _ = linear_triton(x[None], weight, bias, residual, None, SMALL)
    check(y, x, weight, bias, residual, None)


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


def test_silent_rows_quantize_to_zeros(device):
    q, scale = quantize_rows_triton(torch.zeros(1, 2, 50, device=device), None)
    assert not q.any()
    assert torch.isfinite(1 / scale).all()


@pytest.fixture
def hopper(monkeypatch):
    """The CUDA path, with the numbers of an H100, on whatever device the tests have."""
    monkeypatch.setattr(cuda_linear, "_device", lambda index: ((9, 0), 132, 227 * 1024))


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


@pytest.mark.parametrize("epilogue", EPILOGUES)
@specs
def test_op_equals_its_meaning(spec, epilogue, device):
    x, weight, bias, residual = make_inputs(6, 38, 101, spec, torch.float32, device, epilogue)
    y = low_bit_linear(x, weight, bias, epilogue=epilogue, residual=residual)
    check(y, x, weight, bias, residual, epilogue)


def test_utterances_do_not_share_a_scale(device):
    spec = QuantSpec(4, inputs="int8", input_scale="utterance")
    weight = quantize_weight(torch.randn(8, 40, device=device), spec)
    x = (
        torch.randn(2, 5, 40, device=device)
        * torch.tensor([1.0, 100.0], device=device)[:, None, None]
    )
    batch = low_bit_linear(x, weight)
    assert torch.equal(batch[0], low_bit_linear(x[0], weight))
    assert torch.equal(batch[1], low_bit_linear(x[1:], weight)[0])


@pytest.mark.parametrize("rows", [(), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_any_number_of_batch_dimensions(rows, device):
    for inputs, kind in ((None, "token"), ("int8", "token"), ("int8", "utterance")):
        spec = QuantSpec(4, inputs=inputs, input_scale=kind)
        weight = quantize_weight(torch.randn(8, 40, device=device), spec)
        x = torch.randn(*rows, 40, device=device, requires_grad=True)
        y = low_bit_linear(x, weight, epilogue="gelu")
        y.sum().backward()
        assert y.shape == (*rows, 8)
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("epilogue", [None, "glu"])
@pytest.mark.parametrize("inputs", [None, "int8"])
def test_ops_are_registered_correctly(inputs, epilogue, permuted, device):
    spec = QuantSpec(4, inputs=inputs)
    x, weight, bias, residual = make_inputs(6, 16, 70, spec, torch.float32, device, epilogue)
    x, residual = x.view(2, 3, 70), residual.view(2, 3, -1)
    if permuted:  # a fake that copies the strides of x is right on contiguous inputs only
        x, residual = (t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (x, residual))
    tensors = [t.requires_grad_() for t in (x, bias, residual)]
    name = "linear" if epilogue is None else "linear_train"
    packed = _flatten(weight)
    torch.library.opcheck(getattr(torch.ops.lowbit, name).default, (*tensors, epilogue, *packed))
    grad_y, z = torch.randn_like(residual), torch.randn(2, 3, 16, device=device)
    backward = torch.ops.lowbit.linear_backward.default
    torch.library.opcheck(
        backward, (grad_y.detach(), None if epilogue is None else z, epilogue, True, *packed)
    )


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("name", ["w4g64", "w4-asymmetric", "w8"])
def test_gradient_matches_finite_differences(name, epilogue):
    args = make_inputs(4, 6, 70, SPECS[name], torch.float64, "cpu", epilogue)
    x, weight, bias, residual = args

    def run(x, bias, residual):
        return low_bit_linear(x, weight, bias, epilogue=epilogue, residual=residual)

    torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, bias, residual)])


@pytest.mark.parametrize("epilogue", [None, "gelu"])
def test_int8_inputs_pass_the_gradient_straight_through(epilogue, device):
    spec = QuantSpec(4, inputs="int8")
    x, weight, bias, _ = make_inputs(4, 6, 70, spec, torch.float64, "cpu")
    x.requires_grad_()
    low_bit_linear(x, weight, bias, epilogue=epilogue).sum().backward()
    z = preactivation_reference(x.detach(), weight, bias)
    dz = epilogue_backward_reference(torch.ones_like(z), z, epilogue)
    torch.testing.assert_close(x.grad, dz @ weight.dequantize(torch.float64))


def test_only_what_is_asked_for_gets_a_gradient(device):
    x, weight, bias, residual = make_inputs(4, 6, 70, SPECS["w4g64"], torch.float32, device)
    residual.requires_grad_()
    low_bit_linear(x, weight, bias, epilogue="gelu", residual=residual).sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))
    bias.requires_grad_()
    low_bit_linear(x, weight, bias, epilogue="gelu", residual=residual).sum().backward()
    assert x.grad is None
    assert bias.grad is not None


@pytest.mark.parametrize("inputs", [None, "int8"])
def test_compiles_to_one_graph_for_three_lengths(inputs, device):
    spec = QuantSpec(4, inputs=inputs)
    x, weight, bias, _ = make_inputs(30, 16, 70, spec, torch.float32, device)
    bias.requires_grad_()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    def run(x):
        return low_bit_linear(x, weight, bias, epilogue="gelu")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for T in (4, 7, 11):
        assert torch.equal(compiled(x[None, :T]), run(x[None, :T]))
    assert len(graphs) == 1


def test_autocast_casts_like_linear(device):
    x, weight, bias, residual = make_inputs(4, 6, 70, SPECS["w4g64"], torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = low_bit_linear(x, weight, bias, residual=residual)
        assert y.dtype == F.linear(x, weight.dequantize(), bias).dtype == torch.bfloat16
    low = (t.bfloat16() for t in (x, bias, residual))
    x, bias, residual = low
    assert torch.equal(y, low_bit_linear(x, weight, bias, residual=residual))


def test_flops_are_those_of_a_matmul(device):
    from torch.utils.flop_counter import FlopCounterMode

    import lowbit_kernels.matmul.flops  # noqa: F401

    x, weight, bias, _ = make_inputs(4, 6, 70, SPECS["w4g64"], torch.float32, device)
    with FlopCounterMode(display=False) as counter:
        low_bit_linear(x.requires_grad_(), weight, bias, epilogue="gelu").sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 4 * 6 * 70)


def test_backends_by_capability():
    assert choose_backend(499, None, torch.bfloat16, (9, 0)) == "fused"
    assert choose_backend(16000, None, torch.bfloat16, (9, 0)) == "dequant_cublas"
    assert choose_backend(499, None, torch.float32, (9, 0)) == "dequant_cublas"
    assert choose_backend(16000, "int8", torch.float32, (8, 0)) == "fused"
    with pytest.raises(NotImplementedError, match=r"capability 8\.0 .* got \(7, 5\)"):
        choose_backend(499, None, torch.float16, (7, 5))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shared", [64 * 1024, 99 * 1024, 227 * 1024])
def test_tiles_fill_the_device(bits, shared):
    few = choose_config(16, 1024, 1024, bits, 2, num_sms=132, shared_bytes=shared)
    many = choose_config(16000, 1024, 1024, bits, 2, num_sms=132, shared_bytes=shared)
    assert few.block_m == 16
    assert many.splits == 1
    assert few.splits * 16 <= 132
    for config in (few, many):
        columns = config.block_bytes * 8 // bits
        stage = config.block_n * config.block_bytes + config.block_m * columns * 2
        assert config.num_stages * stage <= shared


def test_a_short_sum_is_not_split():
    assert choose_config(1, 64, 64, 4, 2, num_sms=132, shared_bytes=99 * 1024).splits == 1


def error_cases():
    weight = quantize_weight(torch.randn(6, 70), QuantSpec(4))
    odd = quantize_weight(torch.randn(7, 70), QuantSpec(4))
    x, bias = torch.randn(2, 70), torch.randn(6)
    static = QuantSpec(4, inputs="int8", input_scale="static")
    fp8 = quantize_weight(torch.randn(6, 70), QuantSpec(4, inputs="fp8"))
    depthwise = empty_depthwise_weight(6, 3, QuantSpec(8))
    wide = quantize_weight(torch.randn(1, 140_000), QuantSpec(4, inputs="int8"))
    return {
        "weight-type": (
            (x, torch.randn(6, 70)),
            {},
            "weight must be a QuantizedWeight, got Tensor",
        ),
        "depthwise": ((x, depthwise), {}, r"weight must be packed \[N, K\], got a depthwise"),
        "inputs": ((x, fp8), {}, r"inputs must be one of \(None, 'int8'\) so far, got 'fp8'"),
        "static": (
            (x, quantize_weight(torch.randn(6, 70), static)),
            {},
            "weight.input_scale must be a tensor with a static scale, got None",
        ),
        "overflow": ((torch.randn(1, 140_000), wide), {}, "K must be at most 132104 .* got 140000"),
        "epilogue": ((x, weight), {"epilogue": "mish"}, "epilogue must be one of .* got 'mish'"),
        "glu": ((x, odd), {"epilogue": "glu"}, "'glu' needs an even number of rows, got N = 7"),
        "dtype": ((x.int(), weight), {}, "x must be fp16, bf16 or fp32 .* got torch.int32"),
        "features": (
            (x[:, :64], weight),
            {},
            r"x must be \[..., K\] with K = 70, got shape \[2, 64\]",
        ),
        "scalar": (
            (torch.tensor(1.0), weight),
            {},
            r"x must be \[..., K\] with K = 70, got shape \[\]",
        ),
        "device": ((x.to("meta"), weight), {}, "weight must be on x's device meta, got cpu"),
        "bias": ((x, weight, bias[:5]), {}, r"bias must be \[6\], got \[5\]"),
        "bias-dtype": (
            (x, weight, bias.half()),
            {},
            "bias must be torch.float32 on cpu like x, got torch.float16",
        ),
        "residual": ((x, weight), {"residual": x}, r"residual must be \[2, 6\], got \[2, 70\]"),
        "residual-glu": (
            (x, weight),
            {"residual": torch.randn(2, 6), "epilogue": "glu"},
            r"residual must be \[2, 3\], got \[2, 6\]",
        ),
    }


@pytest.mark.parametrize("name", error_cases())
def test_wrong_arguments_are_named(name):
    args, kwargs, message = error_cases()[name]
    error = NotImplementedError if name == "inputs" else ValueError
    with pytest.raises(error, match=message):
        low_bit_linear(*args, **kwargs)


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
