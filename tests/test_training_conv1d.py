"""training_conv1d: meaning, registration, gradients, masks and errors.

Dimension key: B batch, C input channels, N output channels, T input frames.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.conv1d import Geometry, training_conv1d, training_op
from lowbit_kernels.conv1d.training_cuda import choose_training_kernel
from lowbit_kernels.fake_quant.linear_op import FLOAT
from lowbit_kernels.fake_quant.op import flatten
from lowbit_kernels.matmul.reference import apply_epilogue
from lowbit_kernels.testing import assert_as_accurate
from tests.conv1d_cases import keywords
from tests.fake_quant_cases import LEVELS, formula, make_quantizer

# C, N, T, and the geometry
CASES = {
    "pointwise": (24, 16, 9, Geometry(1)),
    "front-end-first": (1, 20, 57, Geometry(10, stride=5)),
    "front-end": (24, 20, 15, Geometry(3, stride=2)),
    "front-end-even": (24, 20, 15, Geometry(2, stride=2)),
    "one-frame-out": (24, 20, 3, Geometry(3, stride=2)),
    "dense-padded": (16, 20, 11, Geometry(3, 2, 1, 2)),
    "odd-channels": (9, 14, 11, Geometry(3, 1, 1, 1)),
    "dilated": (12, 14, 15, Geometry(3, 2, 2, 3, dilation=2)),
    "grouped": (32, 32, 13, Geometry(4, 1, 2, 1, groups=2)),
    "grouped-strided": (16, 32, 13, Geometry(5, 2, 1, 2, groups=2)),
    "positional": (16, 16, 10, Geometry(128, left=64, right=64, groups=2)),
    "depthwise": (18, 18, 11, Geometry(31, left=15, right=15, groups=18)),
    "depthwise-causal": (36, 36, 12, Geometry(3, left=2, groups=36)),
    "depthwise-strided": (18, 18, 12, Geometry(5, 2, 1, 2, groups=18)),
}
cases = pytest.mark.parametrize("case", CASES)
# layers of published encoders
LARGE = {
    "front-end-large": (512, 512, 3199, Geometry(3, stride=2)),
    "positional-large": (768, 768, 499, Geometry(128, left=64, right=64, groups=16)),
    "data2vec-large": (768, 768, 499, Geometry(19, left=9, right=9, groups=16)),
    "depthwise-large": (1024, 1024, 499, Geometry(31, left=15, right=15, groups=1024)),
}
QUANTIZERS = ["float", "ste", "lsq-tensor", "lsq-row", "lsq-two-level", "elastic-row"]
NAMES = ("y", "dx", "dweight", "dbias", "dresidual", "dscale")


def make_weight_quantizer(kind, N, K, device="cpu"):
    if kind == "float":
        return None
    method, _, granularity = kind.partition("-")
    levels = LEVELS["w1" if method == "elastic" else "w4"]
    quantizer = make_quantizer((N,), K, levels, granularity or "row", method, device)
    return replace(quantizer, scale=quantizer.scale / K**0.5)


def make_inputs(case, kind="float", dtype=torch.float32, device="cpu", epilogue=None, B=2):
    """x, weight, bias, residual; lengths, quantizer, geometry. Padded frames of x hold NaN."""
    C, N, T, geometry = (CASES | LARGE)[case]
    channels, taps = C // geometry.groups, geometry.kernel_size
    x = torch.randn(B, C, T, device=device, dtype=dtype)
    shortest = max(geometry.span - geometry.left, T // 2 + 1, 1)
    lengths = torch.tensor([T, min(T, shortest)] + [T] * (B - 2), device=device)[:B]
    x = x.masked_fill(torch.arange(T, device=device) >= lengths[:, None, None], torch.nan)
    weight = torch.randn(N, channels, taps, device=device) / (channels * taps) ** 0.5
    bias = torch.randn(N, device=device, dtype=dtype)
    N_out = N // 2 if epilogue == "glu" else N
    residual = torch.randn(B, N_out, geometry.frames_out(T), device=device, dtype=dtype)
    quantizer = make_weight_quantizer(kind, N, channels * taps, device)
    return (x, weight, bias, residual), lengths, quantizer, geometry


def by_op(x, weight, bias, residual, lengths, quantizer, geometry, epilogue):
    return training_conv1d(
        x, weight, bias, quantizer=quantizer, epilogue=epilogue, residual=residual,
        lengths=lengths, **keywords(geometry),
    )  # fmt: skip


def by_torch(x, weight, bias, residual, lengths, quantizer, geometry, epilogue):
    if quantizer is not None:
        N, channels, taps = weight.shape
        matrix = weight.transpose(1, 2).reshape(N, -1)
        matrix = formula(matrix, quantizer, quantizer.scale.to(weight.dtype))
        weight = matrix.view(N, taps, channels).transpose(1, 2)
    if lengths is not None:
        padded = torch.arange(x.shape[2], device=x.device) >= lengths[:, None, None]
        x = x.masked_fill(padded, 0)
    options = keywords(geometry)
    x = F.pad(x, options.pop("padding"))
    z = F.conv1d(x, weight.to(x.dtype), bias, **options)
    return apply_epilogue(z.mT, epilogue).mT + residual


def run(function, tensors, lengths, quantizer, geometry, epilogue, grad):
    """The output, and gradients of x, weight, bias, residual and scale."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    if quantizer is not None:
        tensors.append(quantizer.scale.detach().to(tensors[1].dtype).requires_grad_())
        quantizer = replace(quantizer, scale=tensors[-1])
    y = function(*tensors[:4], lengths, quantizer, geometry, epilogue)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(t.grad for t in tensors)]


def check(case, kind, dtype, device, epilogue, function=by_op):
    tensors, *rest = make_inputs(case, kind, dtype, device, epilogue)
    # a sum over a tensor is one number, whose error is luck: several have a largest error
    grad = torch.randn_like(tensors[3])
    actual = run(function, tensors, *rest, epilogue, grad)
    low = run(by_torch, tensors, *rest, epilogue, grad)
    high = run(by_torch, [t.double() for t in tensors], *rest, epilogue, grad)
    for name, a, b, c in zip(NAMES, actual, low, high, strict=False):
        if b is None:
            assert a is None
        # of few sums of 16-bit errors the largest is luck, too
        elif name != "dscale" or (a.numel() > 1 and dtype == torch.float32):
            assert_as_accurate(a, b, c, f"{name} of {case}, {kind}")


@pytest.mark.parametrize("epilogue", [None, "gelu", "glu"])
@cases
def test_op_equals_its_meaning(case, epilogue, device):
    check(case, "float", torch.float32, device, epilogue)


def by_cuda(*args):
    """The implementations that a GPU gets, where there is one or not."""
    return _CudaConv1d.apply(*args, None if args[5] is None else args[5].scale)


class _CudaConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, lengths, quantizer, geometry, epilogue, scale):
        options = flat_arguments(lengths, quantizer, geometry)
        y, z, rounded = training_op._cuda(x, weight, bias, residual, epilogue, True, *options)
        ctx.save_for_backward(
            x, weight, z if z.numel() else None, rounded if rounded.numel() else None
        )
        ctx.options = epilogue, True, True, True, *options
        return y

    @staticmethod
    def backward(ctx, grad):
        grads = training_op._cuda_backward(grad, *ctx.saved_tensors, *ctx.options)
        dx, dweight, dbias, dscale = (g if g.numel() else None for g in grads)
        return dx, dweight, dbias, grad, None, None, None, None, dscale


DTYPES = [
    torch.float32,
    torch.float16,
    # the interpreter lacks it
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_cuda_path(case, dtype, device):
    check(case, "lsq-row", dtype, device, "gelu", by_cuda)


@pytest.mark.parametrize("epilogue", [None, "glu"])
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise", "odd-channels"])
def test_cuda_epilogues(case, epilogue, device):
    check(case, "float", torch.float16, device, epilogue, by_cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE)
def test_real_layers(case, dtype, device):
    check(case, "lsq-row", dtype, device, "gelu")


@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise"])
def test_same_bits_again(case, device):
    tensors, *rest = make_inputs(case, "lsq-row", torch.float16, device)
    grad = torch.randn_like(tensors[3])
    results = [run(by_cuda, tensors, *rest, "gelu", grad) for _ in range(2)]
    assert all(map(torch.equal, *results))


def test_kernels_by_shape():
    half, conv = torch.bfloat16, choose_training_kernel
    assert conv(512, 512, Geometry(3, 2), half) == "runs"
    assert conv(1, 512, Geometry(10, 5), half) == "torch"  # rows of 10 bytes
    assert conv(144, 144, Geometry(3), half) == "runs"
    assert conv(196, 196, Geometry(3), half) == "torch"
    assert conv(512, 512, Geometry(3, 2), torch.float32) == "torch"
    assert conv(768, 768, Geometry(128, groups=16), half) == "grouped"
    assert conv(768, 768, Geometry(128, groups=16), torch.float32) == "torch"
    assert conv(64, 64, Geometry(3, dilation=2, groups=4), half) == "torch"
    for dtype in (half, torch.float32):
        assert conv(512, 512, Geometry(31, groups=512), dtype) == "depthwise"
    assert conv(1, 1, Geometry(31), half) == "torch"  # nothing is grouped


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise", "dilated", "pointwise"])
def test_quantized_weights(case, kind, device):
    if case == "depthwise" and kind == "lsq-two-level":
        pytest.skip("a depthwise weight has no groups")
    check(case, kind, torch.float32, device, "gelu")


@pytest.mark.parametrize(
    ("case", "epilogue"),
    [("front-end", "gelu"), ("grouped", "glu"), ("depthwise", "silu"), ("depthwise-strided", None)],
)
def test_gradients_match_finite_differences(case, epilogue):
    (x, *tensors), lengths, _, geometry = make_inputs(case, dtype=torch.float64, epilogue=epilogue)

    def function(*tensors):
        return by_op(*tensors, lengths, None, geometry, epilogue)

    tensors = [x.nan_to_num(), *(t.double() for t in tensors)]
    torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors], fast_mode=True)


@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise", "dense-padded"])
def test_a_padded_batch_equals_single_utterances(case, device):
    tensors, lengths, quantizer, geometry = make_inputs(case, "lsq-row", torch.float32, device)
    x, weight, bias, residual = tensors
    n = int(lengths[1])
    frames = geometry.frames_out(n) if geometry.right == 0 else geometry.frames_out(n) - 1

    def train(x, residual, lengths=None):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        y = by_op(*leaves, bias, residual, lengths, quantizer, geometry, "gelu")[..., :frames]
        y.square().sum().backward()
        return y.detach(), leaves[0].grad, leaves[1].grad

    y, dx, dweight = train(x[1:], residual[1:], lengths[1:])
    alone = x[1:, :, :n]
    y_1, dx_1, dweight_1 = train(alone, residual[1:, :, : geometry.frames_out(n)])
    assert_as_accurate(y, y_1, y_1.double())
    assert_as_accurate(dx[..., :n], dx_1, dx_1.double())
    assert_as_accurate(dweight, dweight_1, dweight_1.double())
    assert dx[..., n:].count_nonzero() == 0


@pytest.mark.parametrize("layout", ["channel-first", "channel-last", "sliced"])
def test_any_strides(layout, device):
    tensors, lengths, quantizer, geometry = make_inputs("front-end", "lsq-row", device=device)
    tensors = (tensors[0].nan_to_num(), *tensors[1:])
    grad = torch.randn_like(tensors[3])
    expected = run(by_op, tensors, lengths, quantizer, geometry, "gelu", grad)
    x, weight, bias, residual = tensors
    if layout == "channel-last":
        x, residual, grad = (t.mT.contiguous().mT for t in (x, residual, grad))
        weight = weight.mT.contiguous().mT
    elif layout == "sliced":
        x, grad = (F.pad(t, (1, 2))[..., 1:-2] for t in (x, grad))
    actual = run(by_op, (x, weight, bias, residual), lengths, quantizer, geometry, "gelu", grad)
    for a, b in zip(actual, expected, strict=True):  # cuDNN may sum in another order
        torch.testing.assert_close(a, b)


@cases
def test_no_utterances(case, device):
    tensors, *rest = make_inputs(case, "lsq-row", device=device, B=0)
    y, *grads = run(by_op, tensors, *rest, "gelu", tensors[3])
    assert y.shape == tensors[3].shape
    assert all(g.count_nonzero() == 0 for g in grads)


def test_only_what_is_asked_for_gets_a_gradient(device):
    tensors, lengths, quantizer, geometry = make_inputs("front-end", "lsq-row", device=device)
    x, weight, bias, residual = tensors
    rest = (lengths, quantizer, geometry, "gelu")
    by_op(x, weight, bias, residual.requires_grad_(), *rest).sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))
    scale = quantizer.scale.requires_grad_()
    by_op(x, weight, bias, residual, *rest).sum().backward()
    assert weight.grad is None
    assert scale.grad is not None
    with torch.no_grad():
        assert not by_op(x, weight, bias, residual, *rest).requires_grad


def flat_arguments(lengths, quantizer, geometry):
    g = geometry
    packed = FLOAT if quantizer is None else flatten(quantizer)
    return lengths, g.stride, g.left, g.right, g.dilation, g.groups, *packed


@pytest.mark.parametrize(
    ("case", "kind", "layout"),
    [
        ("front-end", "lsq-two-level", "channel-first"),
        ("front-end", "lsq-tensor", "channel-last"),
        ("grouped", "float", "channel-last"),
    ],
)
def test_ops_are_registered_correctly(case, kind, layout, device):
    tensors, *rest = make_inputs(case, kind, device=device)
    options = flat_arguments(*rest)
    x, weight, bias, residual = (t.nan_to_num() for t in tensors)
    if layout == "channel-last":  # a fake that copies the strides of x is right on one of them
        x, residual, weight = (t.mT.contiguous().mT for t in (x, residual, weight))
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    op = torch.ops.lowbit.training_conv1d.default
    for epilogue in (None, "gelu"):
        torch.library.opcheck(op, (*leaves, epilogue, True, *options))
    inference = [t.detach() for t in leaves]
    torch.library.opcheck(op, (*inference, "gelu", False, *options))
    _, z, rounded = op(*leaves, "gelu", True, *options)
    grad, rounded = torch.randn_like(residual), rounded.detach() if rounded.numel() else None
    for needs in ((True, True, True), (False, False, True)):
        torch.library.opcheck(
            torch.ops.lowbit.training_conv1d_backward.default,
            (
                grad.detach(),
                x.detach(),
                weight.detach(),
                z.detach(),
                rounded,
                "gelu",
                *needs,
                *options,
            ),
        )


@pytest.mark.parametrize("kind", ["float", "lsq-row"])
def test_compiles_to_one_graph(kind, device):
    tensors, *rest = make_inputs("front-end", kind, device=device)
    compiled = torch.compile(by_op, fullgraph=True, backend="aot_eager")
    grad = torch.randn_like(tensors[3])
    for a, b in zip(
        *(run(f, tensors, *rest, "gelu", grad) for f in (by_op, compiled)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_autocast_keeps_the_weight_in_fp32(device):
    tensors, _, quantizer, geometry = make_inputs("front-end", "lsq-row", device=device)
    x, weight, bias, _ = (t.nan_to_num().requires_grad_() for t in tensors)
    options = {"quantizer": quantizer, **keywords(geometry)}
    with torch.autocast(device, dtype=torch.bfloat16):
        y = training_conv1d(x, weight, bias, **options)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    x, bias = (t.detach().bfloat16() for t in (x, bias))
    assert torch.equal(y, training_conv1d(x, weight, bias, **options))


@pytest.mark.parametrize(
    ("trains", "products"), [("xw", 3), ("x", 2), ("w", 2), ("b", 1)], ids=lambda v: str(v)
)
def test_flops_are_those_of_the_products_needed(trains, products, device):
    from torch.utils.flop_counter import FlopCounterMode

    tensors, _, quantizer, geometry = make_inputs("grouped", "lsq-row", device=device)
    x, weight, bias, _ = (t.nan_to_num() for t in tensors)
    for name, tensor in (("x", x), ("w", weight), ("b", bias)):
        tensor.requires_grad_(name in trains)
    with FlopCounterMode(display=False) as counter:
        y = training_conv1d(
            x, weight, bias, quantizer=quantizer, epilogue="glu", **keywords(geometry)
        )
        y.sum().backward()
    assert counter.get_total_flops() == products * (2 * 2 * 13 * 32 * 16 * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise"])
def test_graph_capture_replays(case):
    tensors, *rest = make_inputs(case, "lsq-row", torch.float16, "cuda", "gelu")
    tensors = [t.nan_to_num() for t in tensors]
    grad = torch.randn_like(tensors[3])

    def step():
        return run(by_op, tensors, *rest, "gelu", grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles; autograd must not have met the capture's stream
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    tensors[0].copy_(torch.randn_like(tensors[0]))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)
