"""QLinear, QConv1d and QAttention as modules: drop-in behavior, state, the weight property."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lowbit_kernels import QAttention, QConv1d, QLinear, QuantSpec
from lowbit_kernels.testing import assert_as_accurate

SPECS = [QuantSpec(bits=b) for b in (1, 2, 4, 8)] + [
    QuantSpec(bits=4, symmetric=False),
    QuantSpec(bits=4, inputs="int8"),
    QuantSpec(bits=8, inputs="int8"),
]
CONVS = {
    "dense": {"in_channels": 6, "out_channels": 10, "kernel_size": 3, "stride": 2},
    "first": {"in_channels": 1, "out_channels": 8, "kernel_size": 10, "stride": 5, "bias": False},
    "grouped": {
        "in_channels": 8,
        "out_channels": 8,
        "kernel_size": 16,
        "padding": 8,
        "groups": 2,
    },
    "depthwise": {
        "in_channels": 7,
        "out_channels": 7,
        "kernel_size": 5,
        "padding": "same",
        "groups": 7,
    },
    "dilated": {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "dilation": 2},
}


def conv_of(kind):
    arguments = dict(CONVS[kind])
    return nn.Conv1d(**arguments)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_linear_computes_with_its_dequantized_weight(spec):
    linear = nn.Linear(65, 37)
    qlinear = QLinear.from_float(linear, spec)
    x = torch.randn(2, 5, 65)
    if spec.inputs:  # the input's own rounding
        scale = x.abs().amax(-1, keepdim=True) / 127
        x_used = (x / scale).round() * scale
    else:
        x_used = x
    low = nn.functional.linear(x_used, qlinear.weight.as_subclass(Tensor), linear.bias)
    weight = qlinear.quantized_weight().dequantize(torch.float64)
    high = x_used.double() @ weight.T + linear.bias.double()
    assert_as_accurate(qlinear(x), low, high)


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize("spec", [s for s in SPECS if not s.inputs], ids=str)
def test_conv_computes_with_its_dequantized_weight(kind, spec):
    conv = conv_of(kind)
    if not spec.symmetric and conv.groups > 1:
        pytest.skip("grouped convolutions take symmetric weights")
    qconv = QConv1d.from_float(conv, spec)
    twin = qconv.to_float()
    x = torch.randn(2, conv.in_channels, 40)
    assert_as_accurate(qconv(x), twin(x), copy.deepcopy(twin).double()(x.double()))
    assert qconv(x[0]).shape == conv(x[0]).shape


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_linear_takes_the_arguments_of_nn(spec):
    torch.manual_seed(3)
    expected = QLinear.from_float(nn.Linear(48, 24, bias=False), spec)
    torch.manual_seed(3)
    built = QLinear(48, 24, bias=False, spec=spec)
    assert built.bias is None
    assert torch.equal(built.qweight, expected.qweight)
    assert torch.equal(built.scale, expected.scale)


@pytest.mark.parametrize("kind", CONVS)
def test_conv_takes_the_arguments_of_nn(kind):
    torch.manual_seed(3)
    expected = QConv1d.from_float(conv_of(kind), QuantSpec(bits=8))
    torch.manual_seed(3)
    built = QConv1d(**CONVS[kind], spec=QuantSpec(bits=8))
    assert torch.equal(built.qweight, expected.qweight)
    assert (built.bias is None) == (expected.bias is None)
    assert repr(nn.Conv1d(**CONVS[kind]))[7:-1] in repr(built)


def test_quantized_layers_are_nn_layers():
    assert isinstance(QLinear(4, 4), nn.Linear)
    assert isinstance(QConv1d(4, 4, 3), nn.Conv1d)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("style", ["parametrization", "hook"])
@pytest.mark.parametrize("dim", [0, 2])
def test_weight_norm_is_folded(style, dim):
    conv = conv_of("grouped")
    if style == "parametrization":
        conv = nn.utils.parametrizations.weight_norm(conv, dim=dim)
        conv.parametrizations.weight.original0.data.mul_(1.7)
    else:
        conv = nn.utils.weight_norm(conv, dim=dim)
        conv.weight_g.data.mul_(1.7)  # leaves conv.weight stale until the next forward
    qconv = QConv1d.from_float(conv, QuantSpec(bits=8))
    x = torch.randn(1, 8, 30)
    wanted = conv(x)
    weight = conv.weight.detach()
    step = weight.abs().amax() / 127
    assert (qconv.weight - weight).abs().max() <= step
    assert (qconv(x) - wanted).abs().max() <= step * x.abs().max() * weight[0].numel()


@pytest.mark.parametrize(
    "module", [QLinear(40, 8), QConv1d(8, 8, 3), QConv1d(6, 6, 3, groups=6)], ids=lambda m: repr(m)
)
def test_state_dict_round_trip_and_deepcopy(module):
    twin = copy.deepcopy(module)
    with torch.no_grad(), pytest.warns(UserWarning, match="requantized"):
        twin.weight = torch.randn(module.weight.shape)
    assert not torch.equal(twin.qweight, module.qweight), "a deepcopy must not share tensors"
    twin.load_state_dict(module.state_dict())
    x = torch.randn(2, 40) if isinstance(module, QLinear) else torch.randn(2, module.in_channels, 9)
    assert torch.equal(twin(x), module(x))


def test_a_float_state_dict_is_quantized_on_the_way_in():
    linear = nn.Linear(40, 8)
    qlinear = QLinear(40, 8)
    qlinear.load_state_dict(linear.state_dict())
    expected = QLinear.from_float(linear, qlinear.spec)
    assert torch.equal(qlinear.qweight, expected.qweight)
    assert torch.equal(qlinear.bias, linear.bias)


def test_a_state_dict_with_rounded_scales_is_refused():
    qlinear = QLinear(40, 8)
    state = qlinear.state_dict()
    state["scale"] = state["scale"].bfloat16()
    before = qlinear.qweight.clone()
    with pytest.raises(ValueError, match=r"scale must be torch.float32, got torch.bfloat16"):
        qlinear.load_state_dict(state)
    assert torch.equal(qlinear.qweight, before)


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half"])
def test_scales_stay_fp32(cast):
    qlinear = QLinear(40, 8)
    scale = qlinear.scale.clone()
    if cast == "to":
        qlinear.to(dtype=torch.bfloat16)
    else:
        getattr(qlinear, cast)()
    assert qlinear.scale.dtype == torch.float32
    assert torch.equal(qlinear.scale, scale)
    assert qlinear.bias.dtype in (torch.bfloat16, torch.float16)
    assert qlinear.weight.dtype == qlinear.bias.dtype


def in_place(weight):
    weight.add_(1.0)


def through_data(weight):
    weight.data += 1.0


def by_assignment_to_data(weight):
    weight.data = weight.data + 1.0


def by_copy(weight):
    weight.copy_(weight + 1.0)


def by_index(weight):
    weight[:] = weight + 1.0


@pytest.mark.parametrize(
    "write", [in_place, through_data, by_assignment_to_data, by_copy, by_index]
)
def test_writing_into_the_weight_requantizes(write):
    qlinear = QLinear(64, 8, spec=QuantSpec(bits=8))
    wanted = qlinear.weight.as_subclass(Tensor) + 1.0
    with torch.no_grad(), pytest.warns(UserWarning, match=r"requantized: SQNR [0-9.]+ dB"):
        write(qlinear.weight)
    step = wanted.abs().amax(1, keepdim=True) / 127
    assert ((qlinear.weight - wanted).abs() <= 0.51 * step).all()


def test_reading_the_weight_gives_plain_tensors():
    qlinear = QLinear(64, 8)
    assert type(qlinear.weight + 1) is Tensor
    assert type(qlinear.weight.clone()) is Tensor
    assert type(qlinear.weight.float().to(torch.float16)) is Tensor
    out = nn.functional.linear(torch.randn(2, 64), qlinear.weight)
    assert type(out) is Tensor


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"weight must have shape \(8, 64\), got \(64, 8\)"):
        QLinear(64, 8).weight = torch.zeros(64, 8)


def test_gradients_reach_input_and_bias_only():
    qlinear = QLinear(64, 8)
    x = torch.randn(3, 64, requires_grad=True)
    qlinear(x).sum().backward()
    assert x.grad is not None
    assert qlinear.bias.grad is not None
    assert [name for name, _ in qlinear.named_parameters()] == ["bias"]


def test_meta_layers_have_the_right_shapes():
    for real, meta in [
        (QLinear(65, 8), QLinear(65, 8, device="meta")),
        (QConv1d(6, 8, 3), QConv1d(6, 8, 3, device="meta")),
        (QConv1d(6, 6, 3, groups=6), QConv1d(6, 6, 3, groups=6, device="meta")),
    ]:
        expected = {k: (v.shape, v.dtype) for k, v in real.state_dict().items()}
        assert {k: (v.shape, v.dtype) for k, v in meta.state_dict().items()} == expected


def test_padding_modes_are_refused():
    with pytest.raises(NotImplementedError, match=r"padding_mode must be 'zeros'.*got 'reflect'"):
        QConv1d(4, 4, 3, padding=1, padding_mode="reflect")


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        QLinear(0, 4)


@pytest.mark.parametrize(
    "build",
    [
        lambda spec: QLinear(8, 8, spec=spec),
        lambda spec: QLinear(8, 8, device="meta", spec=spec),
        lambda spec: QLinear.from_float(nn.Linear(8, 8), spec),
        lambda spec: QConv1d(8, 8, 3, spec=spec),
        lambda spec: QConv1d.from_float(nn.Conv1d(8, 8, 3), spec),
        lambda spec: QAttention(8, 2, spec=spec),
    ],
)
def test_wrong_specs_are_refused_when_a_layer_is_made(build):
    with pytest.raises(ValueError, match="spec must be a QuantSpec, got 'int4'"):
        build("int4")
    with pytest.raises(ValueError, match="spec must be a QuantSpec, got 0"):
        build(0)
    with pytest.raises(NotImplementedError, match=r"input_scale must be 'static'.* with 'int4'"):
        build(QuantSpec(inputs="int4"))


def test_attention_matches_nn_multihead_attention():
    float_attention = nn.MultiheadAttention(36, 4, batch_first=True)
    attention = QAttention.from_float(float_attention, QuantSpec(bits=8))
    x = torch.randn(2, 9, 36)
    lengths = torch.tensor([9, 5])
    padding = torch.arange(9) >= lengths[:, None]
    wanted, _ = float_attention(x, x, x, key_padding_mask=padding)
    got = attention(x, lengths=lengths)
    noise = (got - wanted)[~padding].square().mean().sqrt()
    # 8-bit weights: about 40 dB
    assert noise < 0.02 * wanted[~padding].square().mean().sqrt()
    high = copy.deepcopy(attention).double()(x[1:, :5].double())
    assert_as_accurate(got[1:, :5], attention(x[1:, :5]), high)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 10, "num_heads": 3}, "embed_dim must be a multiple of num_heads, got 10"),
        ({"embed_dim": 8, "num_heads": 2, "dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_attention_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        QAttention(**arguments)
