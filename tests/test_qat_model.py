"""prepare_qat() and convert(): what is replaced, what is left and why, and the same outputs."""

import copy

import pytest
import torch
from torch import nn

from lowbit_kernels import QLinear, QuantConfig, QuantSpec, convert, prepare_qat
from lowbit_kernels.modules import QATLinear
from lowbit_kernels.testing import assert_as_accurate

W4 = QuantSpec(4)


class Encoder(nn.Module):
    """A small stand-in with a layer of every kind that a plan tells apart."""

    def __init__(self):
        super().__init__()
        self.front = nn.Conv1d(1, 16, 10, stride=5)
        self.mixer = nn.MultiheadAttention(16, 2, batch_first=True)
        self.ffn = nn.Linear(16, 64)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.out = nn.Linear(64, 16)
        self.lm_head = nn.Linear(16, 5)

    def forward(self, wave):
        x = self.front(wave[:, None]).relu().transpose(1, 2)
        x = x + self.mixer(x, x, x, need_weights=False)[0]
        return self.lm_head(x + self.out(self.normed(self.ffn(x)).relu()))


def train(model, inputs, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(inputs)
        output = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        output.square().mean().backward()
        optimizer.step()


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
    assert not any(isinstance(module, QATLinear) for module in model.modules())
    assert isinstance(model.ffn, QLinear)
    assert [layer.spec for layer in report.quantized] == [str(spec)] * len(report.quantized)
    assert report.model_bytes_after < report.model_bytes_before


def test_the_report_says_what_is_left_and_why():
    model = Encoder()
    float_parameters = {id(p) for p in model.ffn.parameters()}
    report = prepare_qat(model, QuantConfig(W4, overrides={"front": W4}))
    assert {layer.name for layer in report.quantized} >= {"ffn", "out"}
    left = {layer.name: layer.reason for layer in report.left}
    assert left["front"] == "convolutions train in float"
    assert left["normed"] == "its weight is computed from other parameters"
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


@pytest.mark.parametrize("family", ["Wav2Vec2", "WavLM"])
def test_a_transformers_model_trains_and_saves(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, layerdrop=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, mask_time_prob=0.0,
        feat_proj_dropout=0.0,
    )  # fmt: skip
    model = getattr(transformers, f"{family}Model")(config)
    wave = torch.randn(2, 600)
    prepare_qat(model, QuantSpec(2, 32), "lsq")
    train(model.train(), wave)
    steps = [p for name, p in model.named_parameters() if name.endswith("weight_step")]
    assert len(steps) >= 12
    assert all(step.grad is not None for step in steps)
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
