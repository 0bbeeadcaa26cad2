"""Configs and presets of speech encoders: JSON, errors, published sizes."""

import dataclasses
import functools
import json
from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_models.config import SpeechEncoderConfig
from ssl_models.encoder import SpeechEncoder
from ssl_models.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_json_comes_back_the_same(name: str) -> None:
    config = PRESETS[name]
    assert SpeechEncoderConfig.from_json(config.to_json()) == config
    changed = dataclasses.replace(config, conv_dims=(8,), conv_kernels=(10,), conv_strides=(5,))
    assert SpeechEncoderConfig.from_json(changed.to_json()) == changed


def test_a_config_is_frozen_and_hashable() -> None:
    config = SpeechEncoderConfig.from_json(
        '{"conv_dims": [8], "conv_kernels": [4], "conv_strides": [2]}'
    )
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.conv_layers == ((8, 4, 2),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kind = "conformer"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "zipformer"}, "kind must be one of .*, got 'zipformer'"),
        ({"front_end": "mfcc"}, "front_end must be one of .*, got 'mfcc'"),
        ({"conv_norm": None}, "conv_norm must be one of .*, got None"),
        ({"conv_bias": 1}, "conv_bias must be True or False, got 1"),
        ({"norm_first": "yes"}, "norm_first must be True or False, got 'yes'"),
        ({"activation": "tanh"}, "activation must be one of .*, got 'tanh'"),
        ({"window": "causal"}, "window must be one of .*, got 'causal'"),
        ({"hidden_size": 0}, "hidden_size must be an int >= 1, got 0"),
        ({"num_layers": True}, "num_layers must be an int >= 1, got True"),
        ({"feed_forward_size": 3.0}, "feed_forward_size must be an int >= 1, got 3.0"),
        ({"window_frames": -1}, "window_frames must be an int >= 1, got -1"),
        ({"num_heads": 7}, "num_heads must be a divisor of hidden_size 768, got 7"),
        ({"position_groups": 5}, "position_groups must be a divisor of hidden_size 768, got 5"),
        ({"position_layers": 0}, "position_layers must be None or an int >= 1, got 0"),
        ({"position_buckets": 7}, "position_buckets must be None or an even int >= 4, got 7"),
        ({"position_buckets": 2}, "position_buckets must be None or an even int >= 4, got 2"),
        (
            {"position_buckets": 8, "kind": "sparseformer"},
            "position_buckets must be None but for a transformer, got 8",
        ),
        (
            {"position_buckets": 320, "position_distance": 80},
            "position_distance must be above a quarter of 320 buckets, got 80",
        ),
        ({"kind": "conformer", "hidden_size": 9, "num_heads": 3}, "hidden_size must be even"),
        ({"depthwise_kernel": 32}, "depthwise_kernel must be odd, got 32"),
        ({"reduce_kernel": 4}, "reduce_kernel must be odd, got 4"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"attention_dropout": "no"}, r"attention_dropout must be in \[0, 1\), got 'no'"),
        ({"conv_dims": [8]}, "conv_kernels must be ints >= 1, like the rest of conv_.*, got None"),
        (
            {"conv_dims": [8], "conv_kernels": [0], "conv_strides": [1]},
            r"conv_kernels must be ints >= 1, .*, got \[0\]",
        ),
        (
            {"conv_dims": [8, 8], "conv_kernels": [2], "conv_strides": [1]},
            "conv_dims, conv_kernels, conv_strides must match, got .*'conv_dims': 2",
        ),
        ({"reduce_layer": 2}, "reduce_layer must be None but for a squeezeformer, got 2"),
        (
            {"kind": "squeezeformer", "recover_layer": 2},
            "reduce_layer must be an int >= 1, or None with recover_layer, got None",
        ),
        (
            {"kind": "squeezeformer", "reduce_layer": 5, "recover_layer": 12},
            "recover_layer must be an int between reduce_layer 5 and num_layers 12, got 12",
        ),
        ({"layers": 3}, "layers must be one of .*, got it with 3"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeechEncoderConfig.from_json(json.dumps(changes))


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="text must be "):
        SpeechEncoderConfig.from_json(text)


def test_unknown_presets_and_changes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of .*, got 'hubert'"):
        preset("hubert")
    with pytest.raises(ValueError, match=r"changes must be of .*, got 'layers'"):
        preset("hubert-base", layers=3)
    assert preset("hubert-base", num_layers=2).num_layers == 2


@functools.cache
def count(name: str) -> tuple[int, int]:
    """Parameters of the front end and of what is behind it."""
    with FakeTensorMode():
        encoder = SpeechEncoder.from_preset(name)
    front = sum(p.numel() for p in encoder.feature_extractor.parameters())
    return front, sum(p.numel() for p in encoder.parameters()) - front


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("hubert-base", 94.37), ("wav2vec2-base", 94.37), ("hubert-large", 316),
        ("wav2vec2-large", 316),
        # with what pre-training alone needs
        ("wavlm-base", 94.70), ("data2vec-base", 93.75),
    ],
)  # fmt: skip
def test_transformers_have_the_published_parameters(name: str, millions: float) -> None:
    rel = 0.003 if name.startswith(("hubert", "wav2vec2")) else 0.008
    assert sum(count(name)) / 1e6 == pytest.approx(millions, rel=rel)


def test_front_ends_have_the_published_parameters() -> None:
    # with the scale and shift of one GroupNorm
    assert count("hubert-base")[0] == 4_199_424 + 2 * 512
    assert count("hubert-base-fast")[0] == pytest.approx(1_843_840, abs=2 * 64)


def subsampling(hidden_size: int, is_separable: bool) -> int:
    """Parameters of two strided 3x3 convolutions over 80 mel bins, and of the layer behind them."""
    C = hidden_size
    second = (9 * C + C) + (C * C + C) if is_separable else 9 * C * C + C
    return (9 * C + C) + second + (20 * C * C + C)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("squeezeformer-xs", 9.0),
        ("squeezeformer-s", 18.6),
        ("squeezeformer-sm", 28.2),
        ("squeezeformer-m", 55.6),
        ("squeezeformer-ml", 125.1),
        ("squeezeformer-l", 236.3),
    ],
)
def test_squeezeformers_have_the_published_parameters(name: str, millions: float) -> None:
    """With CTC's head of 128 pieces, and the paper's subsampling instead of our front end."""
    config = PRESETS[name]
    C = config.hidden_size
    projection = 2 * 512 + 512 * C + C
    encoder = count(name)[1] - projection
    total = encoder + subsampling(C, is_separable=True) + 129 * 128
    assert total / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize(("name", "millions"), [("conformer-s", 8.7), ("conformer-m", 27.4)])
def test_conformers_have_the_published_parameters(name: str, millions: float) -> None:
    """Those with CTC in the Squeezeformer's paper, again with its subsampling."""
    C = PRESETS[name].hidden_size
    encoder = count(name)[1] - (2 * 512 + 512 * C + C)
    total = encoder + subsampling(C, is_separable=False) + 129 * 128
    assert total / 1e6 == pytest.approx(millions, rel=0.03)


def test_the_two_sparseformers_have_equal_parameters() -> None:
    narrow, wide = count("sparseformer-dn-s"), count("sparseformer-sw-s")
    assert narrow[1] == pytest.approx(wide[1], rel=0.04)
