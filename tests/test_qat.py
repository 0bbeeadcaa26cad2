"""QATLinear: what it computes, how it trains, and that its packed form is the same layer."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowbit_kernels import QLinear, QuantSpec
from lowbit_kernels.fake_quant import Levels, Quantizer, fake_quantize, initial_scale
from lowbit_kernels.formats import quantize_weight
from lowbit_kernels.matmul.reference import input_scale_rows, quantize_rows
from lowbit_kernels.modules import QATLinear
from lowbit_kernels.testing import assert_as_accurate

SPECS = {
    "w8": QuantSpec(8),
    "w8-tensor": QuantSpec(8, "tensor"),
    "w4": QuantSpec(4),
    "w4-channel": QuantSpec(4, None),
    "w2": QuantSpec(2),
    "w1": QuantSpec(1),
    "w1-g32": QuantSpec(1, 32),
    "w1-tensor": QuantSpec(1, "tensor"),
}
INPUTS = {
    "float": {},
    "token": {"inputs": "int8"},
    "utterance": {"inputs": "int8", "input_scale": "utterance"},
    "static": {"inputs": "int8", "input_scale": "static"},
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
quantizers = pytest.mark.parametrize("quantizer", ["ste", "lsq", "elastic"])


def with_inputs(spec, inputs):
    return QuantSpec(spec.bits, spec.group_size, **INPUTS[inputs])


def make_layer(spec, quantizer="lsq", N=12, K=150, device="cpu"):
    return QATLinear.from_float(nn.Linear(K, N, device=device), spec, quantizer)


def train(layer, steps=3, x=None):
    """A few steps of plain gradient descent: the losses, inputs of two utterances."""
    device = layer.weight.device
    x = torch.randn(2, 20, layer.in_features, device=device) if x is None else x
    target = torch.randn(2, 20, layer.out_features, device=device)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(layer(x, epilogue="gelu"), target)
        loss.backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("inputs", INPUTS)
@specs
@quantizers
def test_the_packed_layer_is_the_trained_one(quantizer, spec, inputs, device):
    if quantizer == "ste" and inputs == "static":
        pytest.skip("a static scale is learned")
    layer = make_layer(with_inputs(spec, inputs), quantizer, device=device)
    train(layer)
    packed = layer.to_quantized()
    assert isinstance(packed, QLinear)
    assert packed.spec == layer.spec
    # the same integers and scales
    trained = fake_quantize(layer.weight.detach(), layer.weight_quantizer())
    assert torch.equal(packed.weight.as_subclass(torch.Tensor), trained)
    x = torch.randn(2, 7, 150, device=device)
    check_packed(layer, x)


@torch.no_grad()
def check_packed(layer, x, dtype=torch.float32):
    """That the layer and its packed form are as accurate as torch with the layer's integers."""
    low, high = output(layer, x, dtype), output(layer, x, torch.float64)
    assert_as_accurate(layer(x), low, high, "the trained layer")
    assert_as_accurate(layer.to_quantized()(x), low, high, "the packed layer")


def output(layer, x, dtype):
    """The layer's output from its integers, computed in ``dtype``."""
    if layer.spec.inputs is not None:
        kind = layer.spec.input_scale
        static = layer.input_step.detach() if kind == "static" else None
        scale = input_scale_rows(x, kind, static)
        rows = quantize_rows(x.reshape(-1, x.shape[-1]), scale).to(dtype) * scale.to(dtype)[:, None]
        x = rows.view(x.shape)
    weight = layer.to_quantized().quantized_weight().dequantize(dtype)
    return F.linear(x.to(dtype), weight, layer.bias.to(dtype))


@specs
@quantizers
def test_training_lowers_the_loss(quantizer, spec, device):
    layer = make_layer(spec, quantizer, device=device)
    before = [p.detach().clone() for p in layer.parameters()]
    losses = train(layer, 20)
    assert losses[-1] < losses[0]
    for old, parameter in zip(before, layer.parameters(), strict=True):
        assert not torch.equal(old, parameter)  # everything learns


@pytest.mark.parametrize("spec", [SPECS["w4"], SPECS["w2"], SPECS["w8"]], ids=str)
def test_training_starts_from_the_searched_rounding(spec):
    """At the weight quantize_weight(method="search") makes, not at LSQ's wider one."""
    layer = make_layer(spec)
    searched = quantize_weight(layer.weight.detach(), spec, "search").dequantize()
    start = fake_quantize(layer.weight, layer.weight_quantizer())
    torch.testing.assert_close(start, searched)
    high = Levels.of_weight(spec.bits).high
    step = 2 * layer.weight.abs().mean() / math.sqrt(high)
    published = fake_quantize(layer.weight, Quantizer(Levels.of_weight(spec.bits), step, "lsq"))
    assert (start - layer.weight).norm() < (published - layer.weight).norm()


def test_gradients_of_a_step_are_lsq_s(device):
    """One scale a row: the parameter is the scale, its factor 1 / sqrt(K * Q_P)."""
    layer = make_layer(SPECS["w4-channel"], device=device)
    x = torch.randn(5, 150, device=device)
    layer(x).sum().backward()
    grad = x.sum(0).expand(12, 150)
    v = layer.weight.detach() / layer.weight_step.detach()[:, None]
    inside = (v >= -8) & (v <= 7)
    slope = torch.where(inside, v.round() - v, v.round().clamp(-8, 7))
    factor = 1 / math.sqrt(150 * 7)
    torch.testing.assert_close(layer.weight_step.grad, (grad * slope).sum(1) * factor)
    torch.testing.assert_close(layer.weight.grad, grad * inside)


def test_steps_of_groups_are_those_of_the_coarsest(device):
    layer = make_layer(SPECS["w4"], device=device)
    quantizer = layer.weight_quantizer()
    assert torch.equal(quantizer.scale, layer.weight_step / 16)
    assert layer.group_scale.amax() == 16
    layer(torch.randn(5, 150, device=device)).sum().backward()
    assert layer.weight_step.grad.shape == (12,)


def published(weight, dims):
    """mean|W| * sign(W - mean W)."""
    sign = (weight - weight.mean(dims, keepdim=True)).sign()
    return weight.abs().mean(dims, keepdim=True) * sign


def test_elastic_weights_are_bit_s(device):
    for spec, dims in ((QuantSpec(1, "tensor"), (0, 1)), (QuantSpec(1), (1,))):
        layer = make_layer(spec, "elastic", device=device)
        with torch.no_grad():
            layer.weight += 0.02  # a mean to subtract
        actual = fake_quantize(layer.weight, layer.weight_quantizer())
        low, high = (
            published(layer.weight.detach().to(t), dims) for t in (torch.float32, torch.float64)
        )
        assert_as_accurate(actual.detach(), low, high)
        actual.sum().backward()
        assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))


def test_a_learned_input_scale_starts_with_the_first_batch(device):
    layer = make_layer(with_inputs(SPECS["w4"], "static"), "lsq", device=device)
    with pytest.raises(ValueError, match="input_step must be set by a first batch"):
        layer.to_quantized()
    layer(torch.empty(0, 150, device=device))  # nothing to start from
    x = torch.randn(4, 150, device=device)
    layer(x)
    assert torch.equal(layer.input_step, initial_scale(x, Levels.of_input(8)))
    layer(100 * x).sum().backward()
    assert torch.equal(layer.input_step, initial_scale(x, Levels.of_input(8)))
    assert layer.input_step.grad != 0


@pytest.mark.parametrize("inputs", ["float", "static"])
@quantizers
def test_state_dict_round_trip(quantizer, inputs, device):
    if quantizer == "ste" and inputs == "static":
        pytest.skip("a static scale is learned")
    layer = make_layer(with_inputs(SPECS["w4"], inputs), quantizer, device=device)
    train(layer)
    other = QATLinear(150, 12, device=device, spec=layer.spec, quantizer=quantizer)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 150, device=device)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    meta = QATLinear(150, 12, device="meta", spec=layer.spec, quantizer=quantizer)
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), layer(x))
    assert not torch.equal(make_layer(layer.spec, quantizer, device=device)(x), layer(x))


@pytest.mark.parametrize("inputs", ["float", "token", "static"])
def test_gradient_checkpointing(inputs, device):
    layer = make_layer(with_inputs(SPECS["w2"], inputs), device=device)
    x = torch.randn(2, 5, 150, device=device)
    other = copy.deepcopy(layer)
    layer(x, epilogue="gelu").sum().backward()
    checkpoint(other, x, use_reentrant=False, epilogue="gelu").sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("inputs", ["float", "token", "utterance", "static"])
@quantizers
def test_compiles_to_one_graph(quantizer, inputs, device):
    if quantizer == "ste" and inputs == "static":
        pytest.skip("a static scale is learned")
    torch._dynamo.reset()  # layers of many kinds in one process
    layer = make_layer(with_inputs(SPECS["w1-g32"], inputs), quantizer, device=device)
    other, x = copy.deepcopy(layer), torch.randn(2, 5, 150, device=device)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the first batch may set a scale
        layer(x, epilogue="gelu").sum().backward()
        compiled(x, epilogue="gelu").sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("inputs", ["float", "token", "static"])
def test_autocast(inputs, device):
    layer = make_layer(with_inputs(SPECS["w4"], inputs), device=device)
    x = torch.randn(2, 5, 150, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
        check_packed(layer, x.detach().bfloat16(), torch.bfloat16)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    for parameter in (x, *layer.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_a_weight_of_zeros_trains():
    linear = nn.Linear(64, 4)
    nn.init.zeros_(linear.weight)
    for quantizer in ("ste", "lsq", "elastic"):
        layer = QATLinear.from_float(copy.deepcopy(linear), QuantSpec(4), quantizer)
        x = torch.randn(8, 64)
        assert torch.equal(layer(x), linear.bias.expand(8, 4))
        layer(x).square().sum().backward()
        assert layer.weight.grad.abs().sum() > 0


def test_parameters_are_shared_with_the_float_layer(device):
    linear = nn.Linear(64, 4, device=device)
    layer = QATLinear.from_float(linear.eval(), QuantSpec(4))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert layer.to_quantized().bias is linear.bias
    assert "w4 g64, quantizer='lsq'" in repr(layer)
    assert QATLinear(64, 4, bias=False).to_quantized().bias is None


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("w4",), ValueError, "spec must be a QuantSpec, got 'w4'"),
        ((QuantSpec(4), "pact"), ValueError, "quantizer must be one of .* got 'pact'"),
        ((QuantSpec(4, symmetric=False),), NotImplementedError, "got symmetric=False"),
        ((QuantSpec(4, inputs="fp8"),), NotImplementedError, "got 'fp8'"),
        ((QuantSpec(4, inputs="int4"),), NotImplementedError, "got 'token' with 'int4'"),
        (
            (QuantSpec(4, inputs="int8", input_scale="static"), "ste"),
            NotImplementedError,
            "is learned by quantizer 'lsq' or 'elastic', got 'ste'",
        ),
        (
            (QuantSpec(4, inputs="int8", input_offset=True),),
            ValueError,
            "spec.input_offset must be False",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        QATLinear.from_float(nn.Linear(64, 4), *arguments)
