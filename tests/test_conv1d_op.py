"""low_bit_conv1d: the CPU against the reference, registration, gradients, masks, errors."""

from dataclasses import astuple, replace

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.conv1d import Geometry, conv1d_reference, low_bit_conv1d
from lowbit_kernels.conv1d.layout import channel_last
from lowbit_kernels.formats import QuantSpec
from lowbit_kernels.matmul.op import flatten
from lowbit_kernels.testing import assert_as_accurate
from tests.conv1d_cases import (
    CASES,
    EPILOGUES,
    FLOAT,
    INT8,
    keywords,
    make_inputs,
    make_weight,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [FLOAT, INT8], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_cpu_is_as_accurate_as_torch(case, spec, dtype):
    x, weight, bias, residual, lengths, geometry = make_inputs(case, spec, dtype)
    y = low_bit_conv1d(
        x, weight, bias, epilogue="gelu", residual=residual, lengths=lengths, **keywords(geometry)
    )
    low, high = (
        conv1d_reference(
            x.to(wide), weight, bias.to(wide), geometry, "gelu", residual.to(wide), lengths
        )
        for wide in (dtype, torch.float64)
    )
    assert_as_accurate(y, low, high)


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
        fast_mode=True,
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
    return (x, bias, residual, lengths, epilogue, *astuple(geometry), *flatten(weight))


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
    grad_y = torch.randn_like(y)
    torch.library.opcheck(
        torch.ops.lowbit.conv1d_backward.default,
        (grad_y, z.detach(), lengths, "gelu", *x.shape[1:], True, False, *args[5:]),
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


@pytest.mark.filterwarnings("ignore:Using padding='same'")
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
    ({"bias": torch.zeros(35)}, r"bias must be \[36\], got \[35\]"),
    ({"bias": torch.zeros(36).half()}, "bias must be torch.float32"),
    ({"residual": torch.zeros(2, 36, 5)}, "residual must be"),
    ({"lengths": torch.zeros(2)}, "lengths must be int32 or int64"),
    ({"lengths": torch.zeros(3).long()}, r"lengths must be \[2\]"),
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
    with pytest.raises(NotImplementedError, match=r"inputs must be one of .* got 'fp8'"):
        low_bit_conv1d(x, fp8, **keywords(geometry))
    static = replace(weight, spec=QuantSpec(bits=4, inputs="int8", input_scale="static"))
    with pytest.raises(ValueError, match=r"weight.input_scale must be .* got None"):
        low_bit_conv1d(x, static, **keywords(geometry))
    with pytest.raises(ValueError, match="weight must be a QuantizedWeight, got Tensor"):
        low_bit_conv1d(x, weight.dequantize())
    depthwise = make_weight(24, 24, Geometry(3, groups=24), FLOAT)
    with pytest.raises(ValueError, match="a depthwise weight needs groups == input channels"):
        low_bit_conv1d(x, depthwise, groups=2)
