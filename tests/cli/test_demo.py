"""``lowbit demo``, on the shipped model and on shapes that are small enough for a test."""

import re

import pytest
import torch

from lowbit_kernels.cli import demo
from lowbit_kernels.conversion import quantize
from lowbit_kernels.cpu import cpu_backend
from lowbit_kernels.formats import QuantConfig


def tiny_shapes(device):
    """Three models in the place of wav2vec2-base's."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    models = {"float32": Wav2Vec2Model(config).eval()}
    for preset in ("small", "fast"):
        models[preset] = Wav2Vec2Model(config).eval()
        quantize(models[preset], getattr(QuantConfig, preset)())
    return models


@pytest.fixture
def tiny_demo(monkeypatch, float_model):
    """The demo with a tiny model to time, and to read with where none is shipped."""
    import ssl_models.digits

    monkeypatch.setattr(demo, "_base_shapes", tiny_shapes)
    monkeypatch.setattr(demo, "SECONDS", 1)
    if not (ssl_models.digits.checkpoint_path() / "config.json").is_file():
        monkeypatch.setattr(ssl_models.digits, "checkpoint_path", lambda: float_model)


@pytest.mark.usefixtures("tiny_demo")
def test_the_demo_reads_and_times_three_variants(lowbit):
    from ssl_models.digits import load_clips

    called = lowbit("demo", "--json", "--device", "cpu")
    assert called.code == 0
    assert called.err == ""
    found = called.json
    assert found["said"] == [clip.text for clip in load_clips()]
    assert [reading["variant"] for reading in found["readings"]] == ["float32", "int8", "int4"]
    plain, int8, int4 = found["readings"]
    assert plain["agreement"] == 1
    assert plain["words"] == sum(len(text.split()) for text in found["said"])
    assert plain["checkpoint_bytes"] > int8["checkpoint_bytes"] > int4["checkpoint_bytes"]
    for timing in found["timings"]:
        assert len(timing["seconds"]) >= demo._LEAST_ROUNDS
        ratio = found["timings"][0]["median_seconds"] / timing["median_seconds"]
        assert timing["speed_up"] == pytest.approx(ratio)
    assert [timing["variant"] for timing in found["timings"]] == ["float32", "small", "fast"]


@pytest.mark.usefixtures("tiny_demo")
def test_the_demo_says_what_ran_where(lowbit):
    called = lowbit("demo", "--device", "cpu")
    assert called.code == 0
    assert cpu_backend() in " ".join(called.out.split())
    assert re.search(rf"\b{torch.get_num_threads()} threads?\b", called.out)
    assert "random weights" in called.out
    assert "synthetic voices" in called.out


def test_a_missing_checkpoint_is_said(lowbit, monkeypatch, tmp_path):
    import ssl_models.digits

    monkeypatch.setattr(ssl_models.digits, "checkpoint_path", lambda: tmp_path)
    called = lowbit("demo")
    assert called.code == 2
    assert "the shipped checkpoint is missing" in called.err
