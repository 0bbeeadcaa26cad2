"""Dimensions of published speech encoders, by name.

Where a paper publishes none, the entry says that they are our choice.
"""

import dataclasses
from typing import Any

from ssl_models.config import SpeechEncoderConfig

# as trained on Libri-Light
_LARGE: dict[str, Any] = {
    "hidden_size": 1024, "num_layers": 24, "num_heads": 16, "feed_forward_size": 4096,
    "norm_first": True, "conv_norm": "layer", "conv_bias": True,
}  # fmt: skip


def _conformer(hidden_size: int, num_layers: int, num_heads: int) -> SpeechEncoderConfig:
    """The encoder of arXiv 2005.08100, at 50 frames a second behind a convolutional front end.

    Its kernel of 32 is 31 in every implementation. Our choice is the front end, SEW's.
    """
    return SpeechEncoderConfig(
        kind="conformer", front_end="sew", hidden_size=hidden_size, num_layers=num_layers,
        num_heads=num_heads, feed_forward_size=4 * hidden_size, activation="silu",
    )  # fmt: skip


def _squeezeformer(
    hidden_size: int, num_layers: int, num_heads: int, reduce_layer: int, recover_layer: int
) -> SpeechEncoderConfig:
    """The encoder of arXiv 2206.00888, at 50 and 25 frames a second behind the same front end.

    Without its two-dimensional subsampling, which would make 25 of 100 mel frames: our choice.
    """
    return SpeechEncoderConfig(
        kind="squeezeformer", front_end="sew", hidden_size=hidden_size, num_layers=num_layers,
        num_heads=num_heads, feed_forward_size=4 * hidden_size, activation="silu",
        reduce_layer=reduce_layer, recover_layer=recover_layer,
    )  # fmt: skip


def _sparseformer(hidden_size: int, num_layers: int, num_heads: int) -> SpeechEncoderConfig:
    """A Transformer with attention in a window of 32 frames on each side: all our choice.

    arXiv 2311.02772 names a deep-narrow and a shallow-wide shape and publishes no dimension. These
    two have equal parameters, to 4 %.
    """
    return SpeechEncoderConfig(
        kind="sparseformer", front_end="sew", hidden_size=hidden_size, num_layers=num_layers,
        num_heads=num_heads, feed_forward_size=4 * hidden_size, position_kernel=32,
    )  # fmt: skip


PRESETS: dict[str, SpeechEncoderConfig] = {
    "wav2vec2-base": SpeechEncoderConfig(),
    "wav2vec2-large": SpeechEncoderConfig(**_LARGE),
    "hubert-base": SpeechEncoderConfig(),
    "hubert-large": SpeechEncoderConfig(**_LARGE),
    # arXiv 2110.13900
    "wavlm-base": SpeechEncoderConfig(position_buckets=320),
    # arXiv 2202.03555
    "data2vec-base": SpeechEncoderConfig(conv_norm="layer", position_layers=5, position_kernel=19),
    # HuBERT with SEW's front end, the float model of arXiv 2301.00652
    "hubert-base-fast": SpeechEncoderConfig(front_end="sew"),
    "wav2vec2-conformer-base": SpeechEncoderConfig(kind="conformer", activation="silu"),
    "wav2vec2-conformer-large": SpeechEncoderConfig(
        **{**_LARGE, "norm_first": False}, kind="conformer", activation="silu"
    ),
    "conformer-s": _conformer(144, 16, 4),
    "conformer-m": _conformer(256, 16, 4),
    "conformer-l": _conformer(512, 17, 8),
    "squeezeformer-xs": _squeezeformer(144, 16, 4, 7, 15),
    "squeezeformer-s": _squeezeformer(196, 18, 4, 8, 17),
    "squeezeformer-sm": _squeezeformer(256, 16, 4, 7, 15),
    "squeezeformer-m": _squeezeformer(324, 20, 4, 9, 19),
    "squeezeformer-ml": _squeezeformer(512, 18, 8, 8, 17),
    "squeezeformer-l": _squeezeformer(640, 22, 8, 10, 21),
    "sparseformer-dn-s": _sparseformer(192, 20, 4),
    "sparseformer-sw-s": _sparseformer(384, 5, 6),
}


def preset(name: str, **changes: Any) -> SpeechEncoderConfig:
    """The dimensions of a preset, some of them changed.

    Raises:
        ValueError: for an unknown name, or as ``SpeechEncoderConfig``.
    """
    if name not in PRESETS:
        raise ValueError(f"name must be one of {sorted(PRESETS)}, got {name!r}")
    known = {field.name for field in dataclasses.fields(SpeechEncoderConfig)}
    if unknown := sorted(changes.keys() - known):
        raise ValueError(f"changes must be of {sorted(known)}, got {unknown[0]!r}")
    return dataclasses.replace(PRESETS[name], **changes)
