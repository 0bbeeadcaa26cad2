"""activation_quantize: kernel, CPU paths, gradient, convention of the integers, errors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lowbit_kernels.cpu import cpu_backend, library
from lowbit_kernels.formats import QuantSpec, quantize_weight
from lowbit_kernels.matmul.dispatch import LinearConfig
from lowbit_kernels.matmul.kernel import linear_triton
from lowbit_kernels.matmul.quantize_kernel import quantize_rows_triton
from lowbit_kernels.matmul.reference import (
    MIN_INPUT_SCALE,
    apply_epilogue,
    epilogue_backward_reference,
    input_scale_rows,
    quantize_rows,
)
from lowbit_kernels.norm import activation_quantize, activation_quantize_reference
from lowbit_kernels.norm.activation_quantize_kernel import (
    activation_quantize_backward_triton,
    activation_quantize_triton,
)
from lowbit_kernels.norm.activation_quantize_op import ACTIVATIONS
from lowbit_kernels.testing import assert_as_accurate
from tests.norm_cases import DTYPES, assert_quantized

SHAPES = [
    pytest.param((4, 256), id="whole-tiles"),
    pytest.param((3, 2, 100), id="ragged"),
    pytest.param((2, 1100), id="two-warps-a-row"),
    pytest.param((1, 1), id="one-feature"),
    pytest.param((7,), id="one-row"),
    pytest.param((4, 499, 3072), id="wav2vec2-base", marks=pytest.mark.gpu),
    pytest.param((499, 8192), id="longest", marks=pytest.mark.gpu),
]


def make_input(shape, activation, dtype, device):
    """x, of which every second value of a larger tensor is taken."""
    *batch, N = shape
    width = 2 * N if activation == "glu" else N
    return 3 * torch.randn(*batch, width, 2, dtype=dtype, device=device)[..., 0]


def errors_of_torch(x, activation):
    """The activation in the dtype of x and in fp64."""
    return apply_epilogue(x, activation), apply_epilogue(x.double(), activation)


@pytest.fixture(params=["native", "pytorch"])
def path(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(library, "native", lambda: None)
    elif library.native() is None:
        pytest.skip(cpu_backend())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_as_accurate_as_torch(shape, activation, dtype, device):
    x = make_input(shape, activation, dtype, device)
    low, high = errors_of_torch(x, activation)
    y, q, scale = activation_quantize_triton(x, activation, None, True)
    assert_quantized(q, scale, low, high)
    assert torch.equal(y, (q * scale).to(dtype))
    static = high.abs().mean().float() / 50
    y, q, scale = activation_quantize_triton(x, activation, static, True)
    assert_quantized(q, scale, low, high, static)
    assert torch.equal(y, (q * scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_kernel_is_as_accurate_as_torch(shape, activation, dtype, device):
    x = make_input(shape, activation, dtype, device)
    grad = torch.randn_like(apply_epilogue(x, activation))
    dx = activation_quantize_backward_triton(grad, x, activation)
    # kernels of PyTorch that want them adjacent
    x = x.contiguous()
    low = epilogue_backward_reference(grad, x, activation)
    high = epilogue_backward_reference(grad.double(), x.double(), activation)
    assert_as_accurate(dx, low, high)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5, 20), (2, 768), (1, 1), (7,)], ids=str)
def test_op_is_as_accurate_as_torch(shape, activation, dtype):
    x = make_input(shape, activation, dtype, "cpu")
    low, high = errors_of_torch(x, activation)
    q, scale, y = activation_quantize(x, activation, return_dequantized=True)
    assert_quantized(q, scale, low, high)
    assert torch.equal(y, (q * scale).to(dtype))
    plain = activation_quantize(x, activation)
    assert all(torch.equal(a, b) for a, b in zip(plain, (q, scale), strict=True))
    static = torch.tensor(0.03)
    q, scale = activation_quantize(x, activation, scale=static)
    assert_quantized(q, scale, low, high, static)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("triton", [False, True], ids=["op", "kernel"])
def test_integers_are_those_of_a_linear_layer(triton, dtype, device):
    # relu is exact, so that nothing but the quantization remains
    x = torch.randn(9, 300, dtype=dtype, device=device)
    x[3] = -1.0
    rows = input_scale_rows(x.relu(), "token", None)
    for static in (None, torch.tensor(0.01, device=device)):
        wanted_scale = rows if static is None else static.expand(9).contiguous()
        wanted = quantize_rows(x.relu(), wanted_scale)
        if triton:
            _, q, scale = activation_quantize_triton(x, "relu", static, False)
        else:
            q, scale = activation_quantize(x, "relu", scale=static)
        kernel, _ = quantize_rows_triton(x.relu()[None], None if static is None else wanted_scale)
        assert torch.equal(scale.flatten(), wanted_scale)
        assert torch.equal(q, wanted)
        assert torch.equal(q, kernel[0])
        # rows that a matrix unit's copies can begin at
        assert q.stride(0) % 32 == 0


@pytest.mark.parametrize("K", [64, 100])
def test_a_linear_layer_takes_the_integers_as_its_own(K, device):
    weight = quantize_weight(torch.randn(38, K, device=device), QuantSpec(4, inputs="int8"))
    x = torch.randn(9, K, dtype=torch.float16, device=device)

    def linear(q, x_scale):
        config = LinearConfig(block_n=32, block_m=16)
        rows = q[None] if q.dim() == 2 else q
        return linear_triton(
            rows, weight, None, None, None, config, x_scale=x_scale, dtype=torch.float16
        )[0]

    _, q, scale = activation_quantize_triton(x, "relu", None, False)
    assert torch.equal(
        linear(q, scale.flatten()), linear(*quantize_rows_triton(x.relu()[None], None))
    )


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("triton", [False, True], ids=["op", "kernel"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_of_zeros_and_rows_that_are_not_finite(activation, triton, device):
    x = torch.randn(5, 40, device=device)
    x[0] = 0.0
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    x[3] = 1e-44  # the scale of so small a row would have no finite reciprocal
    if triton:
        _, q, scale = activation_quantize_triton(x, activation, None, False)
    else:
        q, scale = activation_quantize(x, activation)
    assert not q[0].any()
    assert scale[0] == MIN_INPUT_SCALE
    assert scale[1:3].isnan().all()
    assert not q[3].any()
    assert q[4].abs().max() == 127
    assert scale[3:].isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinity_in_16_bits_is_as_pytorch_has_it(activation, device):
    x = torch.tensor([[torch.inf, 1.0], [1.0, torch.nan], [1.0, 2.0]], dtype=torch.float16)
    _, _, scale = activation_quantize_triton(x.to(device), activation, None, False)
    wanted = apply_epilogue(x.float(), activation)
    assert torch.equal(scale.isnan().flatten().cpu(), ~wanted.isfinite().all(-1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_is_that_of_the_activation(activation):
    x = make_input((2, 7, 12), activation, torch.float64, "cpu").requires_grad_()
    grad = torch.randn(2, 7, 12, dtype=torch.float64)
    q, scale, y = activation_quantize(x, activation, return_dequantized=True)
    assert not q.requires_grad
    assert not scale.requires_grad
    (actual,) = torch.autograd.grad(y, x, grad)
    (wanted,) = torch.autograd.grad(apply_epilogue(x, activation), x, grad)
    assert_as_accurate(actual, wanted, wanted)


@pytest.mark.parametrize("activation", ["gelu", "glu"])
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("return_dequantized", [False, True])
def test_op_is_registered_correctly(return_dequantized, permuted, activation, device):
    x = torch.randn(4, 3, 8, device=device)
    x = (x.transpose(0, 1) if permuted else x).detach().requires_grad_()
    op = torch.ops.lowbit.activation_quantize.default
    torch.library.opcheck(op, (x, activation, None, return_dequantized))
    torch.library.opcheck(op, (x, activation, torch.tensor(0.1, device=device), return_dequantized))
    grad = torch.randn_like(apply_epilogue(x, activation)).detach()
    backward = torch.ops.lowbit.activation_quantize_backward.default
    torch.library.opcheck(backward, (grad, x.detach(), activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_bits_every_time_and_alone(activation, device):
    x = make_input((11, 300), activation, torch.float32, device)
    first = activation_quantize_triton(x, activation, None, True)
    second = activation_quantize_triton(x, activation, None, True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = activation_quantize_triton(x[5:6], activation, None, True)
    assert all(torch.equal(a[0], b[5]) for a, b in zip(alone, first, strict=True))


def test_empty_batches_work(device):
    x = torch.randn(0, 4, device=device, requires_grad=True)
    q, scale, y = activation_quantize(x, "gelu", return_dequantized=True)
    assert (q.shape, scale.shape) == ((0, 4), (0, 1))
    y.sum().backward()
    assert x.grad.shape == (0, 4)
    assert activation_quantize_triton(x.detach(), "glu", None, True)[1].shape == (0, 2)
    assert activation_quantize_backward_triton(y, x.detach(), "gelu").shape == (0, 4)


def test_compiles_to_one_graph_for_three_lengths(device):
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(x, static):
        q, scale, y = activation_quantize(x, "gelu", scale=static, return_dequantized=True)
        return q * scale + y

    static = torch.tensor(0.1, device=device)
    for T in (7, 9, 13):
        x = torch.randn(2, T, 20, device=device, requires_grad=True)
        out = run(x, static)
        out.sum().backward()
        assert out.shape == x.grad.shape
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_graph_replays_what_runs_eagerly(activation, device):
    x = make_input((499, 3072), activation, torch.bfloat16, device)
    wanted = activation_quantize(x, activation)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = activation_quantize(x, activation)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))


def test_reference_returns_what_the_integers_stand_for():
    x = torch.randn(3, 20)
    q, scale, activated = activation_quantize_reference(x, "gelu", None)
    assert torch.equal(activated, torch.nn.functional.gelu(x))
    assert torch.equal(q, quantize_rows(activated, scale.flatten()))


X = torch.zeros(2, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "scale", "message"),
    [
        ((X, "tanh"), None, r"activation must be one of \('gelu', .*\), got 'tanh'"),
        ((X.sum(), "gelu"), None, r"x must be \[..., N\] with N >= 1, got shape \(\)"),
        ((X[..., :0], "gelu"), None, r"x must be \[..., N\] with N >= 1, got shape \(2, 4, 0\)"),
        ((X, "glu"), None, r"x must be \[..., 2 N\] with 'glu', got shape \(2, 4, 5\)"),
        ((X.long(), "gelu"), None, "x must be fp16, bf16 or fp32 .* got torch.int64"),
        ((X, "gelu"), torch.ones(1), r"scale must be \[\] fp32 on cpu, got \[1\] torch.float32"),
        ((X, "gelu"), torch.ones(()).half(), r"scale must be \[\] fp32 .* \[\] torch.float16"),
    ],
)
def test_wrong_arguments_are_named(arguments, scale, message):
    with pytest.raises(ValueError, match=message):
        activation_quantize(*arguments, scale=scale)


def test_rows_too_long_for_a_gpu_are_refused(device):
    with pytest.raises(NotImplementedError, match="rows of up to 8192 features, got 8193"):
        activation_quantize_triton(torch.zeros(1, 8193, device=device), "gelu", None, False)
