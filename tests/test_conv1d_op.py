"""low_bit_conv1d: kernels against the reference, registration, gradients, masks, errors."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.conv1d import Geometry, conv1d_reference, low_bit_conv1d, quantize_utterances
from lowbit_kernels.conv1d.layout import channel_last
from lowbit_kernels.conv1d.reference import conv1d_backward_reference, mask_frames
from lowbit_kernels.formats import QuantSpec, quantize_depthwise_weight, quantize_weight
from lowbit_kernels.testing import assert_as_accurate

FLOAT, INT8 = QuantSpec(bits=4), QuantSpec(bits=4, inputs="int8")
SPECS = [
    QuantSpec(bits=bits, inputs=inputs) for bits in (1, 2, 4, 8) for inputs in (None, "int8")
] + [QuantSpec(bits=bits, symmetric=False) for bits in (2, 4)]
EPILOGUES = (None, "gelu", "gelu_tanh", "silu", "relu", "glu")
# C, N, T, and the geometry
CASES = {
    "pointwise": (36, 20, 9, Geometry(1)),
    "front-end-first": (1, 20, 57, Geometry(10, stride=5)),
    "front-end": (33, 18, 14, Geometry(3, stride=2)),
    "even-same": (20, 24, 11, Geometry(2, left=0, right=1)),
    "dilated": (12, 14, 15, Geometry(3, 2, 2, 3, dilation=2)),
    "grouped": (24, 36, 13, Geometry(5, 2, 1, 2, groups=2)),
    "grouped-32-channels": (64, 48, 12, Geometry(3, left=1, right=1, groups=2)),
    "positional": (8, 8, 10, Geometry(128, left=64, right=64, groups=2)),
    "channel-multiplier": (4, 8, 10, Geometry(3, left=2, groups=4)),
    "depthwise": (18, 18, 11, Geometry(31, left=15, right=15, groups=18)),
    "depthwise-causal": (70, 70, 12, Geometry(3, left=2, groups=70)),
    "depthwise-strided": (18, 18, 12, Geometry(5, 2, 1, 2, groups=18)),
    "depthwise-stride-dilation": (18, 18, 23, Geometry(4, 4, 3, 3, dilation=6, groups=18)),
}
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
        monkeypatch.setattr(cuda, "device_properties", lambda device: ((8, 0), 4, 99 << 10))
    return cuda


def make_weight(C, N, geometry, spec, device="cpu"):
    K = geometry.kernel_size * C // geometry.groups
    weight = torch.randn(N, K, device=device) / K**0.5
    if geometry.groups == C == N and C > 1:
        return quantize_depthwise_weight(weight, spec)
    return quantize_weight(weight, spec)


def make_inputs(case, spec, dtype=torch.float32, device="cpu", epilogue=None, B=2):
    """x, weight, bias, residual, lengths, geometry; padded frames hold NaN."""
    C, N, T, geometry = CASES[case]
    x = torch.randn(B, C, T, device=device, dtype=dtype)
    lengths = torch.tensor([T, T // 2 + 1] + [T] * (B - 2), device=device)[:B]
    x = x.masked_fill(torch.arange(T, device=device) >= lengths[:, None, None], torch.nan)
    N_out, T_out = N // 2 if epilogue == "glu" else N, geometry.frames_out(T)
    residual = torch.randn(B, N_out, T_out, device=device, dtype=dtype)
    bias = torch.randn(N, device=device, dtype=dtype)
    return x, make_weight(C, N, geometry, spec, device), bias, residual, lengths, geometry


def keywords(geometry):
    options = {name: getattr(geometry, name) for name in ("stride", "dilation", "groups")}
    return {**options, "padding": (geometry.left, geometry.right)}


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
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise-causal"])
def test_every_width(case, spec, cuda_code, device):
    if case == "depthwise-causal" and not spec.symmetric:
        pytest.skip("a depthwise weight is symmetric")
    check_kernels(cuda_code, case, spec, None, torch.float16, device)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise-causal"])
def test_every_epilogue(case, epilogue, cuda_code, device):
    check_kernels(cuda_code, case, FLOAT, epilogue, torch.float16, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise-strided"])
def test_every_dtype(case, spec, dtype, cuda_code, device):
    check_kernels(cuda_code, case, spec, "silu", dtype, device)


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
def test_kernels_give_an_utterance_the_same_bits_alone(case, spec, cuda_code, device):
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
@pytest.mark.parametrize("case", ["dilated", "positional", "depthwise-strided"])
def test_a_padded_batch_equals_single_utterances(case, spec):
    x, weight, bias, residual, lengths, geometry = make_inputs(case, spec, torch.float64)
    n = int(lengths[1])
    T_out, options = geometry.frames_out(n), keywords(geometry)

    def run(x, residual, lengths=None):
        x = x.detach().requires_grad_()
        y = low_bit_conv1d(
            x, weight, bias, epilogue="gelu", residual=residual, lengths=lengths, **options
        )
        # only valid frames carry a loss
        y[..., :T_out].square().sum().backward()
        return y[..., :T_out], x.grad

    y, dx = run(x[1:], residual[1:], lengths[1:])
    alone, dx_alone = run(x[1:, :, :n], residual[1:, :, :T_out])
    high = alone.detach()
    assert_as_accurate(y.detach(), high, high)
    assert_as_accurate(dx[..., :n], dx_alone, dx_alone)
    assert dx[..., n:].count_nonzero() == 0


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("case", ["dilated", "grouped", "depthwise-strided"])
def test_gradients_match_finite_differences(case, epilogue):
    x, weight, bias, residual, lengths, geometry = make_inputs(
        case, FLOAT, torch.float64, epilogue=epilogue
    )
    torch.autograd.gradcheck(
        lambda x, bias, residual: low_bit_conv1d(
            x, weight, bias, epilogue=epilogue, residual=residual, lengths=lengths,
            **keywords(geometry),
        ),
        (x.nan_to_num().requires_grad_(), bias.requires_grad_(), residual.requires_grad_()),
    )  # fmt: skip


def test_rounding_of_int8_inputs_passes_gradients_straight_through():
    x, weight, bias, _, lengths, geometry = make_inputs("grouped", INT8)
    in_float = replace(weight, spec=FLOAT)
    grads = []
    for w in (weight, in_float):
        leaf = x.clone().requires_grad_()
        low_bit_conv1d(leaf, w, bias, lengths=lengths, **keywords(geometry)).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def flat_arguments(x, weight, bias, residual, lengths, geometry, epilogue):
    spec, g = weight.spec, geometry
    return (
        x, weight.qweight, weight.scale, weight.group_scale, weight.zero_point, None,
        bias, residual, lengths, spec.bits, spec.group, spec.inputs,
        g.kernel_size, g.stride, g.left, g.right, g.dilation, g.groups, epilogue,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
@pytest.mark.parametrize("case", ["front-end", "grouped", "depthwise"])
def test_ops_are_registered_correctly(case, layout, device):
    x, weight, bias, residual, lengths, geometry = make_inputs(
        case, FLOAT, torch.float16 if device == "cuda" else torch.float32, device
    )
    x = x.nan_to_num()
    if layout == "channel-last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    x.requires_grad_()
    for op, epilogue in (("conv1d", None), ("conv1d_train", "gelu")):
        args = flat_arguments(x, weight, bias, residual, lengths, geometry, epilogue)
        torch.library.opcheck(getattr(torch.ops.lowbit, op).default, args)
    y, z = torch.ops.lowbit.conv1d_train(*args)
    _, *parts = args[:5]
    torch.library.opcheck(
        torch.ops.lowbit.conv1d_backward.default,
        (torch.randn_like(y), z.detach(), *parts, lengths, *args[9:], *x.shape[1:], True, False),
    )


def test_memory_is_channel_last():
    x, weight, bias, *_, geometry = make_inputs("grouped", FLOAT)
    y = low_bit_conv1d(x, weight, bias, **keywords(geometry))
    N, T_out = y.shape[1:]
    assert y.stride() == (T_out * N, 1, N)
    assert channel_last(y).data_ptr() == y.data_ptr()
    y.add_(1.0)  # not a view of anything
    leaf = x.nan_to_num().requires_grad_()
    y = low_bit_conv1d(leaf, weight, bias, epilogue="gelu", **keywords(geometry))
    y.mul_(2.0).sum().backward()
    assert leaf.grad.shape == x.shape


def test_compiles_to_one_graph_for_every_length():
    _, weight, bias, *_, geometry = make_inputs("grouped", FLOAT)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def run(x):
        return low_bit_conv1d(x, weight, bias, epilogue="gelu", **keywords(geometry))

    for T in (20, 31, 47):
        x = torch.randn(2, 24, T)
        high = low_bit_conv1d(x, weight, bias, epilogue="gelu", **keywords(geometry))
        assert torch.equal(run(x), high)
    assert len(graphs) == 1


def test_autocast_casts_like_torch():
    x, weight, bias, residual, *_, geometry = make_inputs("grouped", FLOAT)
    with torch.autocast("cpu", torch.bfloat16):
        y = low_bit_conv1d(x, weight, bias, residual=residual, **keywords(geometry))
    assert y.dtype == torch.bfloat16


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


def test_same_padding_is_pytorchs():
    x, weight, bias, *_ = make_inputs("even-same", FLOAT)
    x = x.nan_to_num()
    y = low_bit_conv1d(x, weight, bias, padding="same")
    dense = weight.dequantize().view(24, 2, 20).transpose(1, 2)
    assert_as_accurate(
        y,
        F.conv1d(x, dense, bias, padding="same"),
        F.conv1d(x.double(), dense.double(), bias.double(), padding="same"),
    )


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    import lowbit_kernels.conv1d.flops  # noqa: F401

    x, weight, _, _, _, geometry = make_inputs("grouped", FLOAT)
    with FlopCounterMode(display=False) as counter:
        leaf = x.nan_to_num().requires_grad_()
        y = low_bit_conv1d(leaf, weight, epilogue="gelu", **keywords(geometry))
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (2 * y.numel() * 5 * 12)


def test_choice_of_kernel_is_a_pure_function(cuda_code):
    dense, grouped = Geometry(3, 2), Geometry(3, groups=2)

    def choose(geometry, inputs=None, dtype=torch.float16, M=100, is_depthwise=False):
        return cuda_code.choose_kernel(M, geometry, is_depthwise, inputs, dtype, (8, 0))

    assert choose(dense) == "matmul"
    assert choose(dense, dtype=torch.float32) == "dequant_cudnn"
    assert choose(dense, dtype=torch.float32, inputs="int8") == "matmul"
    assert choose(replace(dense, dilation=2)) == "implicit_gemm"
    assert choose(grouped) == choose(grouped, M=10**6) == "implicit_gemm"
    assert choose(grouped, dtype=torch.float32) == "dequant_cudnn"
    assert choose(grouped, is_depthwise=True, dtype=torch.float32) == "depthwise"
    with pytest.raises(NotImplementedError, match="capability"):
        cuda_code.choose_kernel(1, dense, False, None, torch.float16, (7, 5))


WRONG = [
    ({"x": torch.zeros(24, 13)}, r"x must be \[B, C, T\]"),
    ({"x": torch.zeros(2, 24, 13, dtype=torch.int32)}, "x must be fp16, bf16 or fp32"),
    ({"x": torch.zeros(2, 22, 13)}, "x has 22 channels"),
    ({"x": torch.zeros(2, 24, 1)}, "x must have at least 5 frames"),
    ({"stride": 0}, "stride must be an int >= 1, got 0"),
    ({"groups": 5}, "groups must divide the channels, got 5"),
    ({"padding": -1}, "padding must be an int >= 0"),
    ({"padding": "valid"}, "or 'same', got 'valid'"),
    ({"padding": "same"}, "padding='same' needs stride 1, got stride 2"),
    ({"epilogue": "tanh"}, "epilogue must be one of"),
    ({"bias": torch.zeros(35)}, r"bias must have shape \(36,\), got \(35,\)"),
    ({"bias": torch.zeros(36).half()}, "bias must be torch.float32"),
    ({"residual": torch.zeros(2, 36, 5)}, "residual must have shape"),
    ({"lengths": torch.zeros(2)}, "lengths must be torch.int32 or torch.int64"),
    ({"lengths": torch.zeros(3).long()}, r"lengths must have shape \(2,\)"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_named(change, message):
    x, weight, bias, _, lengths, geometry = make_inputs("grouped", FLOAT)
    arguments = {"x": x, "bias": bias, "lengths": lengths, **keywords(geometry), **change}
    with pytest.raises(ValueError, match=message):
        low_bit_conv1d(weight=weight, **arguments)


def test_wrong_weights_are_named():
    x, weight, *_, geometry = make_inputs("grouped", FLOAT)
    fp8 = replace(weight, spec=QuantSpec(bits=4, inputs="fp8"))
    with pytest.raises(NotImplementedError, match="inputs None and 'int8', got 'fp8'"):
        low_bit_conv1d(x, fp8, **keywords(geometry))
    static = replace(weight, spec=QuantSpec(bits=4, inputs="int8", input_scale="static"))
    with pytest.raises(ValueError, match=r"needs weight.input_scale, got None"):
        low_bit_conv1d(x, static, **keywords(geometry))
    depthwise = make_weight(24, 24, Geometry(3, groups=24), FLOAT)
    with pytest.raises(ValueError, match="a depthwise weight needs groups == input channels"):
        low_bit_conv1d(x, depthwise, groups=2)


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
