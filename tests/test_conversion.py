"""quantize() and dequantize(): what is replaced, what is left and why, all or nothing."""

import copy
import json

import pytest
import torch
from torch import nn

from lowbit_kernels import (
    QConv1d,
    QLinear,
    QuantConfig,
    QuantSpec,
    dequantize,
    load_quantized,
    quantize,
    save_quantized,
)
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


class Shared(nn.Module):
    """A layer, a block and an attention, each registered twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.block = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.blocks = nn.ModuleList([self.block])
        self.mixer = nn.MultiheadAttention(16, 2, batch_first=True)
        self.other_mixer = self.mixer

    def forward(self, x):
        x = self.blocks[0](self.again(self.block(self.first(x))))
        return self.other_mixer(*[self.mixer(x, x, x)[0]] * 3)[0]


def test_a_layer_with_two_names_is_replaced_under_both():
    shared = Shared().eval()
    report = quantize(shared, QuantSpec(bits=8))
    assert [layer.name for layer in report.layers] == [
        "first", "block.0", "mixer.in_proj", "mixer.out_proj",
    ]  # fmt: skip
    assert report.layers[0].note == "also registered as again"
    assert report.layers[1].note == "also registered as blocks.0.0"
    assert "first: also registered as again" in str(report)
    assert isinstance(shared.first, QLinear)
    assert shared.again is shared.first
    assert shared.blocks[0][0] is shared.block[0]
    assert shared.other_mixer is shared.mixer
    tensors = [*shared.parameters(), *shared.buffers()]
    assert report.model_bytes_after == sum(t.nbytes for t in tensors)
    dequantize(shared)
    assert type(shared.first) is nn.Linear
    assert shared.again is shared.first
    assert type(shared.mixer) is nn.MultiheadAttention
    assert shared.other_mixer is shared.mixer


def test_a_dry_run_leaves_two_names_on_one_module():
    shared = Shared()
    mixer = shared.mixer
    quantize(shared, dry_run=True)
    assert shared.other_mixer is shared.mixer is mixer


def test_a_layer_with_two_names_is_saved_once_and_loaded_under_both(tmp_path):
    shared, x = Shared().eval(), torch.randn(2, 5, 16)
    quantize(shared)
    wanted = shared(x)
    save_quantized(shared, tmp_path)
    loaded = load_quantized(tmp_path, Shared().eval())
    assert loaded.again is loaded.first
    assert loaded.other_mixer is loaded.mixer
    assert torch.equal(loaded(x), wanted)


def test_a_rule_for_any_name_of_a_layer_decides():
    shared = Shared()
    config = QuantConfig(overrides={"^again$": QuantSpec(bits=8)}, skip=("^first$", r"^blocks\."))
    report = quantize(shared, config)
    specs = {layer.name: layer.spec for layer in report.layers}
    assert specs["first"] == "w8 channel"
    assert specs["block.0"] is None
    assert report.notes == ()


def test_patterns_that_match_nothing_are_named(model):
    config = QuantConfig(
        overrides={"fnn": QuantSpec(bits=8), "^ffn$": None}, skip=("lm_haed", "lm_head")
    )
    report = quantize(model, config)
    assert report.notes == ("override 'fnn' matched no layer", "skip 'lm_haed' matched no layer")
    assert "note: override 'fnn' matched no layer" in str(report)
    assert quantize(Encoder()).notes == ()


def test_layers_of_other_kinds_are_listed(model):
    model.words = nn.Embedding(10, 16)
    model.image = nn.Conv2d(1, 4, 3)
    model.up = nn.ConvTranspose1d(16, 16, 2)
    model.memory = nn.LSTM(16, 16)
    report = quantize(model, QuantConfig(overrides={"^words$": None}))
    left = {layer.name: layer for layer in report.left}
    for name, kind in [
        ("words", "Embedding"),
        ("image", "Conv2d"),
        ("up", "ConvTranspose1d"),
        ("memory", "LSTM"),
    ]:
        assert left[name].reason == f"nn.{kind} is not served"
        assert left[name].bytes_before == left[name].bytes_after
        assert left[name].bytes_before == sum(p.nbytes for p in getattr(model, name).parameters())
    assert report.notes == ()


def test_tied_parameters_are_said_to_stay(model):
    model.words = nn.Embedding(5, 16)
    model.lm_head.weight = model.words.weight
    config = QuantConfig(overrides={"^lm_head$": QuantSpec(bits=8)})
    left = {layer.name: layer.reason for layer in quantize(model, config).left}
    assert left["lm_head"] == "its weight is shared with another module"
    assert model.lm_head.weight is model.words.weight


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_no_model_is_refused(dry_run):
    with pytest.raises(ValueError, match="model must contain the layer, got the layer itself"):
        quantize(nn.Linear(4, 4), dry_run=dry_run)
    with pytest.raises(ValueError, match=r"model must be an nn\.Module, got a Tensor"):
        quantize(torch.randn(4, 4), dry_run=dry_run)


def test_calibration_leaves_every_module_in_its_mode(model):
    model.train()
    model.first.eval()  # as a frozen front end
    model.front.eval()
    before = {name: module.training for name, module in model.named_modules()}
    quantize(model, QuantConfig.fast(), calibration=[torch.randn(800)])
    after = {name: module.training for name, module in model.named_modules()}
    kept = before.keys() & after.keys()
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert {"first", "front", "ffn"} <= kept


def test_a_model_quantized_in_inference_mode_trains(model, wave):
    with torch.inference_mode():
        quantize(model, QuantConfig.fast(), calibration=[torch.randn(800)])
    model(wave).sum().backward()
    assert model.ffn.bias.grad is not None
    assert not any(buffer.is_inference() for buffer in model.buffers())


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
        ({"config": QuantSpec(inputs="int2")}, NotImplementedError, "inputs must be one .*'int2'"),
        (
            {"config": QuantConfig(overrides={"nothing": QuantSpec(inputs="int4")})},
            NotImplementedError,
            "inputs must be one of .*'int4'",
        ),
        ({"calibration": 5}, ValueError, "calibration must be an iterable of clips, got 5"),
        (
            {"config": QuantConfig.fast(), "calibration": {"wave": torch.ones(800)}},
            ValueError,
            "calibration must be an iterable of clips, got {'wave'",
        ),
        (
            {"config": QuantConfig.fast(), "calibration": [torch.ones(800), "a.wav"]},
            ValueError,
            "calibration must hold waveforms .* got a str at 1",
        ),
        (
            {"config": QuantConfig.fast(), "calibration": torch.ones(800)},
            ValueError,
            "calibration must hold waveforms .* got a Tensor at 0",
        ),
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
