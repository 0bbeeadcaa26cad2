"""Errors that travel: what is measured where, and what the measures mean."""

import json
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lowbit_kernels import QuantConfig, QuantSpec, quantize
from ssl_models.error_propagation import error_propagation
from ssl_models.error_propagation.interventions import noisy, swapped
from ssl_models.error_propagation.measures import (
    additivity,
    decibels,
    joint_excess,
    linear_cka,
    noise_to_signal,
    token_disagreement,
    token_divergence,
)
from ssl_models.error_propagation.propagate import run_model
from ssl_models.error_propagation.sources import find_blocks, find_sources, modules_of, rest_of
from ssl_models.error_propagation.trace import trace
from tests.ssl_cases import KINDS, SAMPLES, build

W4A8 = QuantSpec(bits=4, inputs="int8")


def utterances(count: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.randn(count, SAMPLES))


def tiny(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "vocab_size": 32, "conv_dim": (16, 16), "conv_kernel": (10, 8),
        "conv_stride": (5, 4), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**(sizes | changes))
    kind = getattr(transformers, f"{name}ForCTC", None) or getattr(transformers, f"{name}Model")
    model: nn.Module = kind(config)
    return model.eval()


def whisper() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64, max_source_positions=20,
        num_mel_bins=8, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_all_sources_and_the_rest_make_the_quantized_model(kind: str) -> None:
    model, donor = build(kind), build(kind)
    quantize(donor, W4A8)
    sources = find_sources(model)
    names = (*modules_of(sources), *rest_of(donor, sources))
    (audio,) = utterances(1)
    with torch.inference_mode():
        expected, plain = donor(audio[None])[0], model(audio[None])[0]
        with swapped(model, donor, names):
            assert torch.equal(model(audio[None])[0], expected)
        assert torch.equal(model(audio[None])[0], plain)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (lambda: build("pre-norm"), ["attention", "feed_forward"] * 4),
        (lambda: build("conformer"), ["feed_forward", "attention", "conv", "feed_forward"] * 4),
        (
            lambda: build("squeezeformer"),
            ["attention", "feed_forward", "conv", "feed_forward"] * 4 + ["rate"] * 2,
        ),
        (lambda: tiny("Wav2Vec2"), ["attention", "feed_forward"] * 2),
        (lambda: tiny("WavLM"), ["attention", "feed_forward"] * 2),
        (
            lambda: tiny("Wav2Vec2Conformer"),
            ["feed_forward", "attention", "conv", "feed_forward"] * 2,
        ),
        (whisper, ["attention", "feed_forward"] * 2),
    ],
    ids=["pre-norm", "conformer", "squeezeformer", "wav2vec2", "wavlm", "w2v-conformer", "whisper"],
)
def test_sources_are_the_residual_branches(model: Any, kinds: list[str]) -> None:
    sources = find_sources(model())
    assert [source.kind for source in sources] == kinds
    assert all("decoder" not in source.name for source in sources)


@pytest.mark.parametrize("name", ["Wav2Vec2", "WavLM", "Wav2Vec2Conformer"])
def test_models_of_transformers(name: str) -> None:
    model = tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = error_propagation(model, utterances(), W4A8)
    kinds = {"attention", "feed_forward", "front_end", "all"}
    assert set(found.kinds) == kinds | ({"conv"} if "Conformer" in name else set())
    assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())
    parts = [each.layers for kind, each in found.kinds.items() if kind != "all"]
    assert found.kinds["all"].layers == sum(parts)
    assert found.blocks == find_blocks(model)
    assert found.utterances == 2
    assert 0 <= (found.kinds["all"].disagreement or 0) <= 1


def test_an_error_starts_at_its_kind_and_is_in_the_report() -> None:
    model = build("conformer")
    found = error_propagation(model, utterances(), W4A8)
    conv = found.kinds["conv"]
    # more bits, less error
    better = error_propagation(model, utterances(), QuantSpec(bits=8, inputs="int8"))
    assert better.kinds["conv"].end_db < conv.end_db - 6
    assert all(0 < similarity <= 1 for similarity in conv.similarity)
    # an encoder gives frames, not tokens
    assert conv.disagreement is None
    # computed again, from the definition
    donor = build("conformer")
    quantize(donor, W4A8)
    names = [f"encoder.layers.{i}.conv_module" for i in range(4)]
    ratios = []
    for audio in utterances():
        wanted = trace(model, run_model, audio, found.blocks)
        with swapped(model, donor, names):
            got = trace(model, run_model, audio, found.blocks)
        a, b = (t.outputs[found.blocks[2]][0] for t in (got, wanted))
        ratios.append((a - b).double().square().sum() / (b - b.mean(0)).double().square().sum())
    assert conv.noise_to_signal_db[2] == pytest.approx(decibels(float(sum(ratios) / 2)), rel=1e-6)


def test_json_has_no_infinities() -> None:
    found = error_propagation(build("squeezeformer"), utterances(1), W4A8)
    assert found.kinds["rate"].noise_to_signal_db[0] == -math.inf
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["kinds"]["rate"]["noise_to_signal_db"][0] is None
    assert again["kinds"]["all"]["layers"] == found.kinds["all"].layers


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"model must have blocks called layers\.0, .* a Linear"):
        error_propagation(nn.Linear(2, 2), utterances())
    with pytest.raises(ValueError, match="audio must hold at least one utterance, got none"):
        error_propagation(build("pre-norm"), [])
    with pytest.raises(ValueError, match="config must quantize a layer of the model's blocks"):
        error_propagation(build("pre-norm"), utterances(), QuantConfig(skip=(".",)))
    packed = build("pre-norm")
    quantize(packed)
    with pytest.raises(ValueError, match="model must be in float, got low-bit layers: "):
        error_propagation(packed, utterances())


def test_noise_has_its_level_and_its_own_draw() -> None:
    model = build("pre-norm")
    name, other = "encoder.layers.1.attention", "encoder.layers.2.feed_forward"
    audio = utterances(1)[0].expand(3, -1)

    def run(levels: dict[str, float], seed: int = 0, times: float = 1.0) -> Tensor:
        with noisy(model, levels, seed, times=times):
            return trace(model, lambda m, x: m(x)[0], audio, (name,)).outputs[name]

    clean, noise = run({}), run({name: 20.0})
    error = noise - clean
    ratios = error.flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
    torch.testing.assert_close(ratios, torch.full((3,), 0.1))
    # draws of one utterance differ, runs do not, nor does noise elsewhere matter
    assert not torch.allclose(error[0], error[1])
    assert torch.equal(run({name: 20.0, other: 10.0}), noise)
    assert not torch.equal(run({name: 20.0}, seed=1), noise)
    torch.testing.assert_close(run({name: 20.0}, times=2.0) - clean, 2 * error)
    assert torch.equal(run({}), clean)


def test_measures_of_known_errors() -> None:
    torch.manual_seed(0)
    h, a, b = torch.randn(3, 4000, 64)
    assert noise_to_signal(0.1 * a, h) == pytest.approx(0.01, rel=0.02)
    # a constant is no signal
    assert noise_to_signal(0.1 * a, h + 100) == pytest.approx(0.01, rel=0.02)
    assert joint_excess(2 * a, a, a) == pytest.approx(10 * math.log10(2))
    assert joint_excess(a + b, a, b) == pytest.approx(0, abs=0.1)
    same = additivity(2 * a, [a, a])
    assert (same.ratio, same.alignment, same.interaction) == (2, 2, 0)
    cancel = additivity(a, [a, a, -a])
    assert cancel.ratio == pytest.approx(1 / 3)
    assert cancel.interaction == pytest.approx(0, abs=1e-12)
    amplified = additivity(3 * (a + b), [a, b])
    assert amplified.interaction == pytest.approx(4 / 9)
    rotation = torch.linalg.qr(torch.randn(64, 64))[0]
    assert linear_cka(h, 3 * h @ rotation + 1) == pytest.approx(1)
    assert linear_cka(h, a) < 0.05
    logits = torch.randn(50, 7)
    assert token_divergence(logits, logits + 3) == pytest.approx(0, abs=1e-9)
    p, q = logits.log_softmax(-1), torch.zeros(50, 7).log_softmax(-1)
    assert token_divergence(torch.zeros(50, 7), logits) == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5
    )
    assert token_disagreement(-logits, logits) == 1
    with pytest.raises(ValueError, match="parts must be errors of which one is not zero, got 0"):
        additivity(a, [])
