"""prepare_qat() and convert(): what is replaced, what is left and why, and the same outputs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lowbit_kernels import QConv1d, QLinear, QuantConfig, QuantSpec, convert, prepare_qat
from lowbit_kernels.modules import QATConv1d, QATLinear, QATModule
from lowbit_kernels.testing import assert_as_accurate

W4 = QuantSpec(4)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


class Encoder(nn.Module):
    """A small stand-in with a layer of every kind that a plan tells apart."""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv1d(1, 16, 10, stride=5)
        self.conv = nn.Conv1d(16, 16, 3, stride=2)
        self.depthwise = nn.Conv1d(16, 16, 5, padding="same", groups=16)
        self.positional = weight_norm(nn.Conv1d(16, 16, 8, padding=4, groups=2), dim=2)
        self.older = nn.utils.weight_norm(nn.Conv1d(16, 16, 1))
        self.mixer = nn.MultiheadAttention(16, 2, batch_first=True)
        self.ffn = nn.Linear(16, 64)
        self.normed = weight_norm(nn.Linear(64, 64))
        self.out = nn.Linear(64, 16)
        self.lm_head = nn.Linear(16, 5)

    def forward(self, wave):
        x = self.conv(self.front(wave[:, None]).relu()).relu()
        x = x + self.older(self.depthwise(x)) + self.positional(x)[..., :-1]
        x = x.transpose(1, 2)
        x = x + self.mixer(x, x, x, need_weights=False)[0]
        return self.lm_head(x + self.out(self.normed(self.ffn(x)).relu()))


def train(model, inputs, steps=2):
    """A few steps towards zero: the losses."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(inputs)
        output = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        loss = output.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("spec", [W4, QuantSpec(1), QuantSpec(2, 32)], ids=str)
@pytest.mark.parametrize("quantizer", ["ste", "lsq", "elastic"])
def test_outputs_stay_to_rounding(quantizer, spec):
    model, wave = Encoder(), torch.randn(2, 400)
    prepare_qat(model, spec, quantizer)
    train(model, wave)
    with torch.no_grad():
        trained = model.eval()(wave)
        high = copy.deepcopy(model).double()(wave.double())
        report = convert(model)
        assert_as_accurate(model(wave), trained, high)
    assert not any(isinstance(module, QATModule) for module in model.modules())
    assert isinstance(model.ffn, QLinear)
    convs = (model.conv, model.depthwise, model.positional, model.older)
    assert all(isinstance(conv, QConv1d) for conv in convs)
    assert [layer.spec for layer in report.quantized] == [str(spec)] * len(report.quantized)
    assert report.model_bytes_after < report.model_bytes_before


def test_the_report_says_what_is_left_and_why():
    model = Encoder()
    float_parameters = {id(p) for p in model.ffn.parameters()}
    report = prepare_qat(model, W4)
    assert {layer.name for layer in report.quantized} >= {"ffn", "out"}
    assert {layer.name for layer in report.quantized} >= {"conv", "positional", "normed", "older"}
    left = {layer.name: layer.reason for layer in report.left}
    assert left["front"] == "one input channel: little to gain"
    assert left["lm_head"].startswith("skip")
    assert isinstance(model.mixer.out_proj, QATLinear)  # called, no longer read
    assert float_parameters <= {id(p) for p in model.parameters()}


def test_a_twin_keeps_its_own_spec():
    model = Encoder()
    prepare_qat(model, QuantConfig(W4, overrides={"ffn": QuantSpec(1)}), "elastic")
    assert (model.ffn.spec.bits, model.out.spec.bits) == (1, 4)
    assert copy.deepcopy(model).ffn.spec.bits == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((QuantSpec(4, symmetric=False),), NotImplementedError, "got symmetric=False"),
        ((W4, "pact"), ValueError, "quantizer must be one of .* got 'pact'"),
        (("w4",), ValueError, "config must be a QuantConfig"),
    ],
)
def test_wrong_arguments_change_nothing(arguments, kind, message):
    model = Encoder()
    before = repr(model)
    with pytest.raises(kind, match=message):
        prepare_qat(model, *arguments)
    assert repr(model) == before


def test_what_cannot_be_converted_is_named():
    with pytest.raises(ValueError, match="layers that prepare_qat made, got none"):
        convert(Encoder())
    with pytest.raises(ValueError, match="got the layer itself"):
        convert(QATLinear(64, 4))
    with pytest.raises(ValueError, match="model must contain the layer"):
        prepare_qat(nn.Linear(64, 4))
    model = Encoder()
    prepare_qat(model, QuantSpec(4, inputs="int8", input_scale="static"))
    before = repr(model)
    with pytest.raises(ValueError, match="input_step must be set by a first batch"):
        convert(model)
    assert repr(model) == before


@pytest.mark.parametrize("inputs", [None, "int8"])
@pytest.mark.parametrize("family", ["Wav2Vec2", "WavLM", "Wav2Vec2Conformer"])
def test_a_transformers_model_trains_and_saves(family, inputs, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, layerdrop=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, mask_time_prob=0.0,
        feat_proj_dropout=0.0, conv_depthwise_kernel_size=5, conformer_conv_dropout=0.0,
    )  # fmt: skip
    model = getattr(transformers, f"{family}Model")(config)
    wave = torch.randn(2, 600)
    prepare_qat(model, QuantSpec(2, 32, inputs=inputs), "lsq")
    losses = train(model.train(), wave, 3)
    assert losses == sorted(losses, reverse=True)
    twins = [module for module in model.modules() if isinstance(module, QATConv1d)]
    assert len(twins) >= (8 if family == "Wav2Vec2Conformer" else 2)
    steps = {n: p for n, p in model.named_parameters() if n.endswith("weight_step")}
    assert len(steps) >= 14
    # the conformer of transformers has a positional convolution and does not call it
    unused = [n for n, step in steps.items() if step.grad is None]
    assert unused == ["encoder.pos_conv_embed.conv.weight_step"] * ("Conformer" in family)
    with torch.no_grad():
        trained = model.eval()(wave).last_hidden_state
        high = copy.deepcopy(model).double()(wave.double()).last_hidden_state
        convert(model)
        packed = model(wave).last_hidden_state
    assert_as_accurate(packed, trained, high)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(wave).last_hidden_state, packed)
