"""Kinds of layers of a speech encoder: attention, feed-forward, convolution, front end.

Each can be float, trained in low bits, or packed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lowbit_kernels import QuantConfig, QuantSpec, prepare_qat, quantize
from lowbit_kernels.fake_quant.quantizer import METHODS
from lowbit_kernels.formats.config import DEFAULT_SKIP

# what the residual branches of each kind are called
BRANCHES = {
    "attention": ("attention", "self_attn", "second_attn"),
    "feed_forward": ("feed_forward", "ffn1", "ffn2"),
    "conv": ("conv_module", "first_conv_module"),
}
# of a Squeezeformer, between layers: convolutions and what undoes them
RATES = ("reduce", "recover")
# all modules that hold layers of a kind
_PARTS = BRANCHES | {
    "conv": (*BRANCHES["conv"], "pos_conv_embed", *RATES),
    "front_end": ("feature_extractor", "feature_projection"),
}
MODULE_KINDS = tuple(_PARTS)
MODES = ("float", "qat", "packed")


def _pattern(kinds: Iterable[str]) -> str:
    parts = (part for kind in kinds for part in _PARTS[kind])
    return rf"(?:^|\.)(?:{'|'.join(parts)})\."


def module_kind(name: str) -> str | None:
    """Of which kind a linear layer or convolution is, by its dotted name.

    Returns:
        One of ``MODULE_KINDS``; None for heads, position gates and all else.
    """
    if any(re.search(pattern, name) for pattern in DEFAULT_SKIP):
        return None
    return next((kind for kind in MODULE_KINDS if re.search(_pattern([kind]), name)), None)


def config_for(
    kinds: Iterable[str],
    spec: QuantSpec,
    overrides: Mapping[str, QuantSpec | None] | None = None,
    **options: Any,
) -> QuantConfig:
    """A config that quantizes the layers of some kinds, and leaves all others in float.

    A convolution over the waveform itself, of one channel, stays in float as it always does.

    Args:
        kinds: of ``MODULE_KINDS``, at least one.
        spec: of their layers.
        overrides: those of ``QuantConfig`` for layers of these kinds.
        **options: ``QuantConfig``'s, such as ``attention_matmuls``.

    Raises:
        ValueError: for an unknown kind, or none.
    """
    kinds = tuple(kinds)
    if not kinds or not set(kinds) <= set(MODULE_KINDS):
        raise ValueError(f"kinds must be of {MODULE_KINDS}, at least one, got {kinds}")
    others = rf"^(?!.*{_pattern(kinds)})"
    return QuantConfig(spec, overrides={others: None, **(overrides or {})}, **options)


def check_quantization(quantization: Any) -> dict[str, dict[str, Any]]:
    """``SpeechEncoderConfig.quantization``, copied.

    Raises:
        ValueError: naming the key, the rule and the value.
    """
    if not isinstance(quantization, Mapping) or not quantization.keys() <= set(MODULE_KINDS):
        raise ValueError(
            f"quantization must be a mapping from kinds of {MODULE_KINDS}, got {quantization!r}"
        )
    for kind, choice in quantization.items():
        where = f"quantization[{kind!r}]"
        if not isinstance(choice, Mapping) or choice.get("mode") not in MODES:
            raise ValueError(f"{where} must have a 'mode' of {MODES}, got {choice!r}")
        try:
            mode, quantizer, _ = _read(kind, choice)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{where} must hold a mode and its options: {error}") from None
        if quantizer not in METHODS:
            raise ValueError(f"{where} must have a 'quantizer' of {METHODS}, got {quantizer!r}")
        needless = choice.keys() - {"mode"} if mode == "float" else choice.keys() & _OF_TRAINING
        if mode != "qat" and needless:
            raise ValueError(f"{where} must not have {sorted(needless)} with mode {mode!r}")
    return {kind: dict(choice) for kind, choice in quantization.items()}


_OF_ATTENTION = ("attention_matmuls", "attention_shift")
_OF_TRAINING = {"quantizer", *_OF_ATTENTION}


def _read(kind: str, choice: Mapping[str, Any]) -> tuple[str, str, QuantConfig]:
    """The mode, the quantizer of training, and the config."""
    rest = dict(choice)
    mode, quantizer = rest.pop("mode"), rest.pop("quantizer", "lsq")
    changes = rest.pop("overrides", {}).items()
    names = _OF_ATTENTION if kind == "attention" else ()
    options = {name: rest.pop(name) for name in names if name in rest}
    overrides = {
        pattern: None if change is None else QuantSpec(**{**rest, **change})
        for pattern, change in changes
    }
    return mode, quantizer, config_for([kind], QuantSpec(**rest), overrides, **options)


def quantize_kinds(encoder: nn.Module, quantization: Mapping[str, Mapping[str, Any]]) -> None:
    """Make the layers of each kind what ``SpeechEncoderConfig.quantization`` says, in place."""
    for kind, choice in quantization.items():
        mode, quantizer, config = _read(kind, choice)
        if mode == "qat":
            prepare_qat(encoder, config, quantizer)
        elif mode == "packed":
            quantize(encoder, config)
