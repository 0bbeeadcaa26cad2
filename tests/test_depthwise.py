"""Depthwise convolution: float weights, their gradient, and the fused end of a Conformer's middle.

Triton's interpreter runs the kernels where there is no GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.conv1d import Geometry
from lowbit_kernels.conv1d.depthwise_op import (
    _cuda,
    depthwise_conv1d_norm,
    depthwise_conv1d_norm_reference,
)
from lowbit_kernels.conv1d.kernels.depthwise import (
    depthwise_conv1d_dx_triton,
    depthwise_conv1d_triton,
    frame_tile,
    run_tile,
)
from lowbit_kernels.conv1d.kernels.depthwise_dw import depthwise_conv1d_dw_triton
from lowbit_kernels.formats import QuantSpec, quantize_depthwise_weight
from lowbit_kernels.matmul.quantize_kernel import quantize_rows_triton
from lowbit_kernels.testing import assert_as_accurate
from tests.interpreter_memory import checked_memory

GEOMETRIES = {  # C, T, geometry
    "same": (36, 43, Geometry(31, left=15, right=15)),
    "causal": (18, 21, Geometry(3, left=2)),
    "one-frame": (7, 5, Geometry(5)),
    "long": (6, 20, Geometry(65, left=32, right=32)),
    "strided": (18, 40, Geometry(5, 2, 1, 2)),
    "stride-dilation": (18, 41, Geometry(4, 4, 3, 3, dilation=6)),
}
DTYPES = [
    torch.float16,
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter lacks bf16
]


def float_conv(x, weight, geometry):
    """[B, T_out, C] of x [B, T, C] and weight [taps, C]."""
    padded = F.pad(x.transpose(1, 2), (geometry.left, geometry.right))
    y = F.conv1d(
        padded, weight.t()[:, None], stride=geometry.stride, dilation=geometry.dilation,
        groups=x.shape[2],
    )  # fmt: skip
    return y.transpose(1, 2)


def make_float(case, dtype, device, B=2):
    """x, weight [taps, C], lengths, geometry and an output gradient; padded frames hold NaN."""
    C, T, geometry = GEOMETRIES[case]
    lengths = torch.tensor([T, T // 2 + 1], device=device)[:B]
    x = torch.randn(B, T, C, device=device, dtype=dtype)
    x[torch.arange(T, device=device) >= lengths[:, None]] = torch.nan
    weight = torch.randn(geometry.kernel_size, C, device=device, dtype=dtype)
    weight /= geometry.kernel_size**0.5
    dz = torch.randn(B, geometry.frames_out(T), C, device=device, dtype=dtype)
    return x, weight, lengths, geometry, dz


def check_float(case, dtype, device):
    x, weight, lengths, geometry, dz = make_float(case, dtype, device)
    valid = (torch.arange(x.shape[1], device=device) < lengths[:, None])[..., None]

    def reference(wide):
        leaves = [torch.where(valid, x, 0).to(wide), weight.to(wide)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = float_conv(*leaves, geometry)
        dx, dw = torch.autograd.grad(y, leaves, dz.to(wide))
        return y.detach(), dx * valid, dw

    low, high = reference(dtype), reference(torch.float64)
    y, dx = torch.empty_like(dz), torch.empty_like(x)
    depthwise_conv1d_triton(x, weight, None, None, lengths, geometry, None, y)
    depthwise_conv1d_dx_triton(dz, weight, lengths, geometry, dx)
    dw = depthwise_conv1d_dw_triton(dz, x, lengths, geometry)
    assert dw.dtype == torch.float32
    assert torch.equal(dw, depthwise_conv1d_dw_triton(dz, x, lengths, geometry))
    for name, actual, i in (("y", y, 0), ("dx", dx, 1), ("dw", dw.to(dtype), 2)):
        assert_as_accurate(actual, low[i], high[i], name)


@pytest.mark.parametrize("case", GEOMETRIES)
def test_float_weights_and_gradients(case, device):
    check_float(case, torch.float16, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_float_weights(dtype, device):
    check_float("same", dtype, device)


def test_more_frames_than_a_part_of_the_sum(device, monkeypatch):
    monkeypatch.setitem(GEOMETRIES, "parts", (4, 150, Geometry(20, left=19)))
    check_float("parts", torch.float32, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks Triton's interpreter")
def test_kernels_stay_inside_their_arguments(monkeypatch):
    with checked_memory():
        x, _, lengths, geometry, dz = make_float("long", torch.float16, "cpu")
        depthwise_conv1d_dw_triton(dz, x, lengths, geometry)
        call(_cuda, monkeypatch, **make_op("odd", torch.float16, "cpu"), int8_rows=True)


def test_no_utterances(device):
    x = torch.empty(0, 9, 4, device=device)
    dw = depthwise_conv1d_dw_triton(x, x, None, Geometry(3, left=2))
    assert torch.equal(dw, torch.zeros(3, 4, device=device))


def test_lanes_are_in_use():
    for C in (144, 196, 324, 512, 1024):
        block_c, block, *_ = run_tile(C, 2, True)
        assert C * (block // block_c * block_c) / (-(-C // block_c) * block_c * block) > 0.9
        assert frame_tile(C, True)[1] >= C


# C, T, taps, padding
SHAPES = {
    "same": (36, 22, 31, "same"),
    "causal": (10, 9, 3, (2, 0)),
    "odd": (7, 18, 5, "same"),
    "one-frame": (12, 5, 5, 0),
}


def make_op(shape, dtype, device, inputs=None, norm=True, B=2):
    """Keyword arguments of depthwise_conv1d_norm."""
    C, T, taps, padding = SHAPES[shape]
    levels = quantize_depthwise_weight(
        torch.randn(C, taps, device=device) / taps**0.5, QuantSpec(8, inputs=inputs)
    )
    lengths = torch.tensor([T, T // 2 + 1], device=device)[:B]
    x = torch.randn(B, T, C, device=device).to(dtype)
    x[torch.arange(T, device=device) >= lengths[:, None]] = torch.nan
    bias, scale = torch.randn(C, device=device), torch.rand(C, device=device) / 20
    affine = torch.randn(2, C, device=device).to(dtype)
    return {
        "x": x, "weight": levels, "bias": bias, "scale": scale, "padding": padding,
        "norm": (affine[0], affine[1], 1e-5) if norm else None, "epilogue": "silu",
        "lengths": lengths,
    }  # fmt: skip


def call(implementation, monkeypatch, **kwargs):
    """The op by one implementation, through the public function and its checks."""
    from types import SimpleNamespace

    with monkeypatch.context() as patch:
        op = SimpleNamespace(depthwise_conv1d_norm=SimpleNamespace(default=implementation))
        patch.setattr(torch.ops, "lowbit", op)
        return depthwise_conv1d_norm(**kwargs)


def check_op(kwargs, monkeypatch):
    """The kernel against the reference in fp32, and its int8 against its own result."""
    dtype = kwargs.get("dtype", kwargs["x"].dtype)
    y, none = call(_cuda, monkeypatch, **kwargs)
    assert none.numel() == 0
    high = call(depthwise_conv1d_norm_reference, monkeypatch, **kwargs | {"dtype": torch.float32})[
        0
    ].double()
    assert_as_accurate(y, high.to(dtype), high)
    q, q_scale = call(_cuda, monkeypatch, **kwargs, int8_rows=True)
    expected, expected_scale = quantize_rows_triton(y, None)
    assert torch.equal(q_scale.flatten(), expected_scale)
    assert torch.equal(q, expected)
    out_scale = q_scale.amax() / 2
    q, _ = call(_cuda, monkeypatch, **kwargs, out_scale=out_scale)
    rows = out_scale.expand(q_scale.numel()).contiguous()
    assert torch.equal(q, quantize_rows_triton(y, rows)[0])


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_end(shape, norm, monkeypatch, device):
    check_op(make_op(shape, torch.float16, device, norm=norm), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_end_of_every_dtype(dtype, monkeypatch, device):
    check_op(make_op("same", dtype, device, inputs="int8"), monkeypatch)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("per_frame", [True, False])
def test_int8_in(per_frame, norm, monkeypatch, device):
    kwargs = make_op("same", torch.float32, device, norm=norm)
    B, T, C = kwargs["x"].shape
    kwargs["x"] = torch.randint(-127, 128, (B, T, C), device=device, dtype=torch.int8)
    shape = (B, T) if per_frame else (B,)
    kwargs |= {"input_scale": torch.rand(shape, device=device), "dtype": torch.float16}
    check_op(kwargs, monkeypatch)


def test_no_batch(monkeypatch, device):
    y, y_scale = call(_cuda, monkeypatch, **make_op("same", torch.float16, device, B=0),
                      int8_rows=True)  # fmt: skip
    assert (y.shape, y_scale.shape) == ((0, 22, 36), (0, 22, 1))


@pytest.mark.parametrize("int8_rows", [False, True])
def test_an_utterance_alone_gives_the_same_bits(int8_rows, monkeypatch, device):
    kwargs = make_op("same", torch.float16, device) | {"int8_rows": int8_rows}
    n = int(kwargs["lengths"][1])
    together = call(_cuda, monkeypatch, **kwargs)
    alone = call(_cuda, monkeypatch, **kwargs | {"x": kwargs["x"][1:, :n], "lengths": None})
    for t, a in zip(together, alone, strict=True):
        assert torch.equal(t[1:, :n], a) if t.numel() else a.numel() == 0


@pytest.mark.parametrize("options", [{}, {"int8_rows": True}, {"weight": torch.randn(31, 36)}],
                         ids=["levels", "int8", "float"])  # fmt: skip
def test_op_is_registered_correctly(options, monkeypatch):
    kwargs = make_op("same", torch.float32, "cpu") | options
    kwargs["x"] = torch.nan_to_num(kwargs["x"]).transpose(0, 1).contiguous().transpose(0, 1)
    captured = []
    call(lambda *args: captured.append(args) or (None, None), monkeypatch, **kwargs)
    torch.library.opcheck(torch.ops.lowbit.depthwise_conv1d_norm.default, captured[0])
    compiled = torch.compile(depthwise_conv1d_norm, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(**kwargs), depthwise_conv1d_norm(**kwargs), strict=True):
        assert torch.equal(a, b)


def test_it_has_no_gradient():
    kwargs = make_op("same", torch.float32, "cpu")
    kwargs["x"] = torch.nan_to_num(kwargs["x"]).requires_grad_()
    y, _ = depthwise_conv1d_norm(**kwargs)
    with pytest.raises(RuntimeError, match="has no gradient"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(1, 4, 35)}, r"x must be \[B, T, C\] and weight"),
        ({"x": torch.zeros(2, 4, 36), "padding": 0}, "at least 31 frames"),
        ({"weight": torch.zeros(31, 36, dtype=torch.int8)}, "weight must be quantized or float"),
        ({"x": torch.zeros(2, 22, 36, dtype=torch.int8)}, r"input_scale must be \[B\] or"),
        ({"input_scale": torch.ones(2)}, "input_scale is for an int8 x"),
        ({"epilogue": "glu"}, "activation must be one of"),
        ({"scale": torch.ones(35)}, r"scale must be \[36\]"),
        ({"bias": torch.ones(36).half()}, "bias must be torch.float32"),
        ({"norm": (torch.ones(35), torch.ones(36), 1e-5)}, r"norm's weight must be \[36\]"),
        ({"lengths": torch.ones(2)}, "lengths must be int32 or int64"),
        ({"int8_rows": True, "out_scale": torch.ones(())}, "out_scale must be None"),
        ({"dtype": torch.int8}, "dtype must be floating point"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv1d_norm(**make_op("same", torch.float32, "cpu") | options)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("C", "T"), [(512, 1500), (1024, 499), (324, 499), (768, 100)])
def test_real_shapes(C, T, dtype, norm, monkeypatch):
    monkeypatch.setitem(SHAPES, "real", (C, T, 31, "same"))
    monkeypatch.setitem(GEOMETRIES, "real", (C, T, Geometry(31, left=15, right=15)))
    check_op(make_op("real", dtype, "cuda", norm=norm), monkeypatch)
    check_float("real", dtype, "cuda")


@pytest.mark.gpu
def test_graph_capture_replays():
    kwargs = make_op("same", torch.bfloat16, "cuda") | {"int8_rows": True}
    depthwise_conv1d_norm(**kwargs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = depthwise_conv1d_norm(**kwargs)
    kwargs["x"].copy_(torch.randn_like(kwargs["x"]))
    graph.replay()
    for a, b in zip(captured, depthwise_conv1d_norm(**kwargs), strict=True):
        assert torch.equal(a, b)
