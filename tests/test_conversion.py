"""quantize() and dequantize(): what is replaced, what is left and why, all or nothing."""

import copy
import json

import pytest
import torch
from torch import nn

from lowbit_kernels import QConv1d, QLinear, QuantConfig, QuantSpec, dequantize, quantize
from lowbit_kernels.testing import assert_as_accurate


class Encoder(nn.Module):
    """A small stand-in with one layer of every kind a speech encoder has."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(1, 16, 10, stride=5, bias=False)
        self.front = nn.Conv1d(16, 16, 3, stride=2)
        conv = nn.Conv1d(16, 16, 8, padding=4, groups=4)
        self.pos_conv = nn.utils.parametrizations.weight_norm(conv, dim=2)
        self.mixer = nn.MultiheadAttention(16, 2, batch_first=True)
        self.ffn = nn.Linear(16, 64)
        self.out = nn.Linear(64, 16)
        self.lm_head = nn.Linear(16, 5)

    def forward(self, wave):
        x = self.front(self.first(wave[:, None]).relu()).relu()
        x = (x + self.pos_conv(x)[..., :-1]).transpose(1, 2)
        x = x + self.mixer(x, x, x, need_weights=False)[0]
        return self.lm_head(x + self.out(self.ffn(x).relu()))


@pytest.fixture
def model():
    return Encoder().eval()


@pytest.fixture
def wave():
    return torch.randn(2, 400)


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_layer_is_accounted_for(model):
    report = quantize(model)
    decisions = {layer.name: layer for layer in report.layers}
    assert set(decisions) == {
        "first", "front", "pos_conv", "mixer.in_proj", "mixer.out_proj", "ffn", "out", "lm_head",
    }  # fmt: skip
    assert {layer.name for layer in report.quantized} >= {"front", "pos_conv", "ffn", "out"}
    assert decisions["first"].reason == "one input channel: little to gain"
    assert decisions["lm_head"].reason.startswith("skip")
    assert isinstance(model.ffn, QLinear)
    assert isinstance(model.pos_conv, QConv1d)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("config", [QuantConfig.small(8), QuantConfig.fast(8)], ids=str)
def test_eight_bits_change_little(model, wave, config):
    wanted = model(wave)
    quantize(model, config)
    error = (model(wave) - wanted).square().mean().sqrt()
    assert error < 0.03 * wanted.square().mean().sqrt()


def test_bytes_in_the_report_are_the_models_own(model):
    report = quantize(model)
    tensors = [*model.parameters(), *model.buffers()]
    assert report.model_bytes_after == sum(t.nbytes for t in tensors)
    assert report.model_bytes_after < report.model_bytes_before
    assert report.model_bytes_before == sum(p.nbytes for p in Encoder().parameters())


def test_both_sizes_of_an_int8_model_are_stated(model, wave):
    report = quantize(model, QuantConfig.fast())
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, QLinear | QConv1d))
    assert report.cpu_bytes == report.model_bytes_after + weights
    assert "in use on a CPU" in report.summary
    assert "in use" not in quantize(Encoder()).summary


def test_reported_sqnr_is_the_weights(model):
    weight = model.ffn.weight.detach().clone()
    report = quantize(model)
    (layer,) = [entry for entry in report.layers if entry.name == "ffn"]
    noise = weight - model.ffn.weight
    sqnr = 10 * torch.log10(weight.square().sum() / noise.square().sum())
    assert layer.sqnr_db == pytest.approx(sqnr.item(), abs=0.01)


def test_a_row_that_one_group_makes_coarse_is_named():
    model = nn.Sequential(nn.Linear(256, 16))
    with torch.no_grad():
        model[0].weight[3, :64] *= 1000
        # the other groups of the row then have no levels left
    report = quantize(model, QuantSpec(bits=4))
    assert report.layers[0].note == "" or "3" in report.layers[0].note
    model = nn.Sequential(nn.Linear(256, 16))
    with torch.no_grad():
        model[0].weight[5, 0] = 50.0
    assert "coarse rows" in quantize(model, QuantSpec(bits=4)).layers[0].note


def test_dry_run_changes_nothing(model, wave):
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    dry = quantize(model, QuantConfig.fast(), dry_run=True)
    assert states_equal(before, model.state_dict())
    assert kinds == [type(m) for m in model.modules()]
    assert quantize(model, QuantConfig.fast()).to_dict() == dry.to_dict()


def test_an_error_leaves_the_model_as_it_was(model):
    with torch.no_grad():
        model.out.weight[0, 0] = float("nan")  # among the last to be reached
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="out: weight must be finite, got 1"):
        quantize(model)
    assert all(type(m) is not QLinear for m in model.modules())
    assert before.keys() == model.state_dict().keys()


def test_nothing_to_quantize_is_said():
    report = quantize(nn.Sequential(nn.ReLU()))
    assert report.notes == ("nothing was quantized: no layer matched the config",)
    assert report.layers == ()


def test_subclasses_and_shared_weights_are_left(model):
    class Custom(nn.Linear):
        pass

    model.custom = Custom(4, 4)
    model.out.weight = nn.Parameter(model.ffn.weight.detach().T.clone())
    model.tied = nn.Linear(16, 64)
    model.tied.weight = model.ffn.weight
    reasons = {layer.name: layer.reason for layer in quantize(model).left}
    assert reasons["custom"] == "Custom is not plain nn"
    assert reasons["ffn"] == reasons["tied"] == "its weight is shared with another module"


def test_overrides_decide(model):
    config = QuantConfig(
        QuantSpec(bits=4),
        overrides={"^ffn$": None, "^lm_head$": QuantSpec(bits=8), "^first$": QuantSpec(bits=8)},
    )
    report = quantize(model, config)
    specs = {layer.name: layer.spec for layer in report.layers}
    assert specs["ffn"] is None
    assert specs["lm_head"] == specs["first"] == "w8 channel"
    assert isinstance(model.first, QConv1d)


def test_quantizing_twice_leaves_quantized_layers_alone(model, wave):
    quantize(model)
    before = model(wave)
    report = quantize(model)
    assert "quantized already" in {layer.reason for layer in report.left}
    assert torch.equal(model(wave), before)


def test_dequantize_gives_plain_modules_back(model, wave):
    quantize(model)
    wanted = model(wave)
    assert dequantize(model) is model
    kinds = {type(m) for m in model.modules()}
    assert not kinds & {QLinear, QConv1d}
    assert_as_accurate(wanted, model(wave), copy.deepcopy(model).double()(wave.double()))


def test_calibration_makes_static_scales_that_serve_other_clips(model):
    clips = [torch.randn(800) for _ in range(8)]
    other = torch.randn(2, 800)
    wanted = model(other)
    inputs = []
    handle = model.ffn.register_forward_pre_hook(lambda m, a: inputs.append(a[0].abs().max()))
    for clip in clips:
        model(clip[None])
    handle.remove()
    quantize(model, QuantConfig.fast(8), calibration=clips)
    assert model.ffn.spec.input_scale == "static"
    assert model.ffn.input_scale.item() == pytest.approx(max(inputs).item() / 127)
    error = (model(other) - wanted).square().mean().sqrt()
    assert error < 0.05 * wanted.square().mean().sqrt()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": "fast"}, ValueError, "config must be a QuantConfig.*got 'fast'"),
        ({"method": "best"}, ValueError, "method must be one of .*got 'best'"),
        ({"config": QuantSpec(inputs="fp8")}, NotImplementedError, "inputs must be one of .*'fp8'"),
        (
            {"config": QuantSpec(inputs="int8", input_scale="static")},
            ValueError,
            "calibration must be given",
        ),
        (
            {"config": QuantConfig.fast(), "calibration": []},
            ValueError,
            "calibration must hold at least one clip",
        ),
        (
            {"config": QuantConfig.fast(), "calibration": [torch.zeros(800)]},
            ValueError,
            "finite, non-zero input",
        ),
    ],
)
def test_wrong_arguments_change_nothing(model, arguments, error, message):
    if "zero" in message:
        nn.init.zeros_(model.front.bias)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        quantize(model, **arguments)
    assert kinds == [type(m) for m in model.modules()]


def test_a_model_on_meta_is_refused():
    with pytest.raises(ValueError, match="layers on the meta device"):
        quantize(nn.Sequential(nn.Linear(4, 4, device="meta")))


def test_the_report_prints_and_serializes(model):
    report = quantize(model)
    text = str(report)
    assert "pos_conv" in text
    assert "left: one input channel" in text
    assert " dB" in text
    assert json.loads(report.to_json())["layers"][0]["name"] == "first"
