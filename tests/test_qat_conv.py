"""QATConv1d: what it computes, how it trains, and that its packed form is the same layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from lowbit_kernels import QConv1d, QuantSpec
from lowbit_kernels.conv1d import quantize_utterances
from lowbit_kernels.fake_quant import fake_quantize
from lowbit_kernels.modules import QATConv1d
from lowbit_kernels.testing import assert_as_accurate

# arguments of nn.Conv1d
CONVS = {
    "front-end": (24, 16, 3, 2),
    "grouped": (32, 32, 8, 1, 4, 1, 4),
    "depthwise": (24, 24, 5, 1, "same", 1, 24),
    "dilated": (24, 16, 3, 1, "valid", 2),
    "pointwise": (24, 16, 1),
}
SPECS = {
    "w8": QuantSpec(8),
    "w4": QuantSpec(4),
    "w2-channel": QuantSpec(2, None),
    "w1": QuantSpec(1),
    "w1-tensor": QuantSpec(1, "tensor"),
}
INPUTS = {
    "float": {},
    "token": {"inputs": "int8"},
    "static": {"inputs": "int8", "input_scale": "static"},
}
convs = pytest.mark.parametrize("name", CONVS)
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
quantizers = pytest.mark.parametrize("quantizer", ["ste", "lsq", "elastic"])


def with_inputs(spec, inputs):
    return QuantSpec(spec.bits, spec.group_size, **INPUTS[inputs])


def make_layer(name, spec, quantizer="lsq", device="cpu"):
    return QATConv1d.from_float(nn.Conv1d(*CONVS[name], device=device), spec, quantizer)


def train(layer, steps=3):
    """A few steps of plain gradient descent: the losses."""
    x = torch.randn(2, layer.in_channels, 21, device=next(layer.parameters()).device)
    target, losses = torch.randn_like(layer(x)), []
    for _ in range(steps):
        loss = F.mse_loss(layer(x, epilogue="gelu"), target)
        loss.backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        losses.append(loss.item())
    return losses


def output(layer, x, dtype):
    """The layer's output from its integers, computed in ``dtype``."""
    packed = layer.to_quantized()
    weight = packed._shape_weight(packed.quantized_weight().dequantize(dtype))
    if layer.spec.inputs is not None:
        if packed.kernel_size == (1,) and layer.spec.input_scale != "static":
            q, scale = quantize_utterances(x.mT.flatten(0, 1)[..., None])  # a frame each
            values = q.to(dtype) * scale.to(dtype)[:, None, None]
            x = values.view(x.shape[0], x.shape[2], -1).mT
        else:
            q, scale = quantize_utterances(x, packed.input_scale)
            x = q.to(dtype) * scale.to(dtype)[:, None, None]
    return layer._conv_forward(x.to(dtype), weight, layer.bias.to(dtype))


@torch.no_grad()
def check_packed(layer, x, dtype=torch.float32):
    """That the layer and its packed form are as accurate as torch with the layer's integers."""
    low, high = output(layer, x, dtype), output(layer, x, torch.float64)
    assert_as_accurate(layer(x), low, high, "the trained layer")
    assert_as_accurate(layer.to_quantized()(x), low, high, "the packed layer")


@pytest.mark.parametrize("inputs", INPUTS)
@specs
@quantizers
@convs
def test_the_packed_layer_is_the_trained_one(name, quantizer, spec, inputs, device):
    if quantizer == "ste" and inputs == "static":
        pytest.skip("a static scale is learned")
    layer = make_layer(name, with_inputs(spec, inputs), quantizer, device)
    losses = train(layer)
    assert losses[-1] < losses[0]
    packed = layer.to_quantized()
    assert isinstance(packed, QConv1d)
    assert packed.spec == layer.spec
    assert (packed.input_scale is not None) == (inputs == "static")
    # the same integers and scales
    matrix = layer._matrix(layer.weight.detach())
    trained = fake_quantize(matrix, layer.weight_quantizer())
    assert torch.equal(packed.quantized_weight().dequantize(), trained)
    check_packed(layer, torch.randn(2, layer.in_channels, 19, device=device))


@convs
def test_everything_learns(name, device):
    layer = make_layer(name, with_inputs(SPECS["w4"], "static"), "elastic", device)
    train(layer, 1)  # sets the scale of the inputs
    before = [p.detach().clone() for p in layer.parameters()]
    train(layer)
    for old, parameter in zip(before, layer.parameters(), strict=True):
        assert not torch.equal(old, parameter)


@pytest.mark.parametrize("inputs", ["float", "token"])
@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, parametrizations.weight_norm], ids=["hook", "parametrization"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weight_norm_stays_and_trains(norm, inputs, device):
    conv = norm(nn.Conv1d(*CONVS["grouped"], device=device), dim=2)
    spec = with_inputs(SPECS["w4"], inputs)
    layer = QATConv1d.from_float(conv, spec)
    assert {id(p) for p in conv.parameters()} < {id(p) for p in layer.parameters()}
    before = [p.detach().clone() for p in layer.parameters()]
    losses = train(layer)
    assert losses[-1] < losses[0]
    for old, parameter in zip(before, layer.parameters(), strict=True):
        assert not torch.equal(old, parameter)
    packed, x = layer.to_quantized(), torch.randn(2, 32, 19, device=device)
    check_packed(layer, x)
    assert not hasattr(packed, "weight_g")
    assert not hasattr(packed, "parametrizations")
    with torch.no_grad():
        layer.zero_grad()
        copied = copy.deepcopy(layer) if norm is parametrizations.weight_norm else layer
        assert torch.equal(copied(x), layer(x))


@convs
def test_a_padded_batch_equals_single_utterances(name, device):
    """Zeros raise no scale of the inputs."""
    layer = make_layer(name, with_inputs(SPECS["w4"], "token"), device=device)
    channels, span = layer.in_channels, layer.dilation[0] * (layer.kernel_size[0] - 1)
    short = 10 * torch.randn(1, channels, 11 + span, device=device)
    batch = torch.cat([torch.randn(1, channels, 19 + span, device=device), F.pad(short, (0, 8))])
    with torch.no_grad():
        alone = layer(short)
        valid = alone.shape[2] - (0 if layer.padding in ("valid", (0,)) else span)
        together = layer(batch)[1:, :, :valid]
        exact = output(layer, short, torch.float64)
    assert_as_accurate(together, alone[..., :valid], exact[..., :valid])


@pytest.mark.parametrize("inputs", ["float", "static"])
@convs
def test_state_dict_round_trip(name, inputs, device):
    layer = make_layer(name, with_inputs(SPECS["w4"], inputs), device=device)
    train(layer)
    other = QATConv1d(*CONVS[name], device=device, spec=layer.spec)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, layer.in_channels, 15, device=device)
    assert torch.equal(other(x), layer(x))
    # unbatched, too; torch may add another batch in another order
    with torch.no_grad():
        exact = output(layer, x[:1], torch.float64)[0]
        assert_as_accurate(copy.deepcopy(layer)(x[0]), layer(x)[0], exact)
    meta = QATConv1d(*CONVS[name], device="meta", spec=layer.spec)
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), layer(x))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", ["front-end", "depthwise", "pointwise"])
def test_compiles_to_one_graph(name, inputs, device):
    torch._dynamo.reset()  # layers of many kinds in one process
    layer = make_layer(name, with_inputs(SPECS["w4"], inputs), device=device)
    other, x = copy.deepcopy(layer), torch.randn(2, 24, 15, device=device)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the first batch may set a scale
        layer(x, epilogue="gelu").sum().backward()
        compiled(x, epilogue="gelu").sum().backward()
    for a, b in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("inputs", ["float", "token"])
@convs
def test_autocast(name, inputs, device):
    layer = make_layer(name, with_inputs(SPECS["w4"], inputs), device=device)
    x = torch.randn(2, layer.in_channels, 15, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
        check_packed(layer, x.detach().bfloat16(), torch.bfloat16)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    for parameter in (x, *layer.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_parameters_are_shared_with_the_float_layer(device):
    conv = nn.Conv1d(*CONVS["front-end"], device=device)
    layer = QATConv1d.from_float(conv.eval(), QuantSpec(4))
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias is layer.to_quantized().bias
    assert not layer.training
    assert "stride=(2,), w4 g64, quantizer='lsq'" in repr(layer)
    assert QATConv1d(8, 4, 3, bias=False).to_quantized().bias is None


def test_wrong_arguments_are_named():
    with pytest.raises(NotImplementedError, match=r"padding_mode must be 'zeros' .* got 'reflect'"):
        QATConv1d(4, 4, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match=r"quantizer must be one of .* got 'pact'"):
        QATConv1d(4, 4, 3, quantizer="pact")
    with pytest.raises(NotImplementedError, match="got symmetric=False"):
        QATConv1d.from_float(nn.Conv1d(4, 4, 3), QuantSpec(4, symmetric=False))
