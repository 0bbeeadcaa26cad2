"""Weights of transformers' models in a SpeechEncoder, and back.

transformers is imported where a model is read from a path, or made.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.modules import QATConv1d, QATLinear, QConv1d, QLinear
from ssl_models.config import SpeechEncoderConfig
from ssl_models.encoder import SpeechEncoder

# model types, and the kind of encoder that has their weights
_KINDS = {
    "wav2vec2": "transformer",
    "hubert": "transformer",
    "wavlm": "transformer",
    "data2vec-audio": "transformer",
    "wav2vec2-conformer": "conformer",
}
# keys of their configs, and the values that a SpeechEncoder computes with
_RULES: dict[str, Any] = {
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "position_embeddings_type": "relative",
    "add_adapter": False,
    "adapter_attn_dim": None,
}
# of WavLM's biases, which all layers share, in the first one there
_TABLE = "encoder.rel_attn_embed.weight"
_THEIR_TABLE = "encoder.layers.0.attention.rel_attn_embed.weight"
_ACTIVATIONS = {"gelu": "gelu", "silu": "silu", "swish": "silu", "relu": "relu"}


@torch.no_grad()
def from_hf(model: nn.Module | str | os.PathLike[str]) -> SpeechEncoder:
    """A SpeechEncoder with the weights of a model of transformers.

    Served are wav2vec 2.0, HuBERT, WavLM, data2vec-audio and wav2vec2-conformer. Its frames are the
    model's ``last_hidden_state``, to rounding; of a padded batch they are those of single
    utterances, where a GroupNorm, data2vec's positions or a convolution module of transformers see
    padding.

    Dropout is ``hidden_dropout`` everywhere but in attention, and no layer is dropped.

    Args:
        model: of transformers, in float, or where ``from_pretrained`` finds one; a head is left
            behind, as is what masks its inputs.

    Returns:
        A new encoder on the model's device, of its dtype and in its mode.

    Raises:
        ValueError: for a model of another kind, or with a part that a SpeechEncoder has not, naming
            the key, the rule and the value; for a path, too, whose weights do not fit its config.
    """
    if isinstance(model, str | os.PathLike):
        model = _read(model)
    theirs: Any = getattr(model, "config", None)
    _check_config(theirs, f"a {type(model).__name__}")
    base: Any = model.base_model
    parameter = next(base.parameters())
    encoder = SpeechEncoder(_config(theirs)).to(parameter.device, parameter.dtype)
    state = {
        _TABLE if key == _THEIR_TABLE else key: tensor
        for key, tensor in base.state_dict().items()
        if not _is_idle(key, theirs)
    }
    load_weights(encoder, state)
    return encoder.train(model.training)


def _read(path: str | os.PathLike[str]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    theirs = AutoConfig.from_pretrained(path)
    _check_config(theirs, os.fspath(path))
    model, info = AutoModel.from_pretrained(
        path, config=theirs, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for key, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{path}: {key} must be {list(wanted)}, got {list(found)}")
    for key in sorted(info["missing_keys"]):
        if not _is_idle(key, theirs):
            raise ValueError(f"{path}: {key} must be there, got a checkpoint without it")
    parts = ("feature_extractor.", "feature_projection.", "encoder.")
    for key in sorted(info["unexpected_keys"]):
        if key.removeprefix(f"{model.base_model_prefix}.").startswith(parts):
            raise ValueError(f"{path}: {key} must not be there, {theirs.model_type} has none")
    return model  # type: ignore[no-any-return]


def _check_config(theirs: Any, source: str) -> None:
    model_type = getattr(theirs, "model_type", None)
    if model_type not in _KINDS:
        raise ValueError(
            f"model must be one of transformers' {tuple(_KINDS)}, got {source} of type "
            f"{model_type!r}"
        )
    for key, value in _RULES.items():
        if (found := getattr(theirs, key, value)) != value:
            raise ValueError(f"model.config.{key} must be {value!r}, got {found!r}")
    if theirs.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"model.config.hidden_act must be one of {tuple(_ACTIVATIONS)}, "
            f"got {theirs.hidden_act!r}"
        )


def _is_idle(key: str, theirs: Any) -> bool:
    """Whether a tensor is not read in inference: a mask's, or a conformer's other positions."""
    is_other = theirs.model_type == "wav2vec2-conformer" and "pos_conv_embed" in key
    return key.endswith("masked_spec_embed") or is_other


def _config(theirs: Any) -> SpeechEncoderConfig:
    kind = _KINDS[theirs.model_type]
    is_stacked = theirs.model_type == "data2vec-audio"
    positions: dict[str, Any] = {"position_kernel": theirs.num_conv_pos_embeddings}
    if is_stacked:
        positions["position_layers"] = theirs.num_conv_pos_embeddings
        positions["position_kernel"] = theirs.conv_pos_kernel_size
    if theirs.model_type == "wavlm":
        positions["position_buckets"] = theirs.num_buckets
        positions["position_distance"] = theirs.max_bucket_distance
    return SpeechEncoderConfig(
        kind=kind,
        conv_norm="layer" if is_stacked else theirs.feat_extract_norm,
        conv_bias=theirs.conv_bias,
        conv_dims=tuple(theirs.conv_dim),
        conv_kernels=tuple(theirs.conv_kernel),
        conv_strides=tuple(theirs.conv_stride),
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        feed_forward_size=theirs.intermediate_size,
        activation=_ACTIVATIONS[theirs.hidden_act],
        norm_first=getattr(theirs, "do_stable_layer_norm", False),
        position_groups=theirs.num_conv_pos_embedding_groups,
        depthwise_kernel=getattr(theirs, "conv_depthwise_kernel_size", 31),
        dropout=theirs.hidden_dropout,
        attention_dropout=theirs.attention_dropout,
        **positions,
    )


def load_weights(encoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict``, after a look whether each key and shape fits.

    Raises:
        ValueError: naming the key, the rule and the value, before anything is changed.
    """
    own = encoder.state_dict()
    for key in own:
        if key not in state:
            raise ValueError(f"{key} must be there, got a state dict without it")
    for key, tensor in state.items():
        if key not in own:
            raise ValueError(f"{key} must be one of the encoder's weights, which has none such")
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{key} must be {list(own[key].shape)}, as the config has it, "
                f"got {list(tensor.shape)}"
            )
    encoder.load_state_dict(state)


@torch.no_grad()
def to_hf(encoder: SpeechEncoder, model_type: str | None = None) -> Any:
    """A model of transformers with the weights of a SpeechEncoder, and its outputs.

    Args:
        encoder: in float, of a kind that transformers has, with a convolutional front end.
        model_type: ``"wav2vec2"``, ``"hubert"``, ``"wavlm"``, ``"data2vec-audio"`` or
            ``"wav2vec2-conformer"``. None: that which has the encoder's parts, before HuBERT
            wav2vec 2.0.

    Returns:
        A new model without a head, on the encoder's device, of its dtype and in its mode; in
        training it masks and drops nothing but what ``dropout`` says.

    Raises:
        ValueError: naming what transformers, or a model of this type, has not.
    """
    from transformers import AutoConfig, AutoModel

    config = encoder.config
    types = _types_for(config)
    model_type = types[0] if model_type is None else model_type
    if model_type not in types:
        raise ValueError(f"model_type must be one of {types} for this config, got {model_type!r}")
    for name, module in encoder.named_modules():
        if isinstance(module, QLinear | QConv1d | QATLinear | QATConv1d):
            raise ValueError(
                f"encoder must be in float, see dequantize, got a {type(module).__name__}: {name}"
            )
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **_options(config, model_type)))
    parameter = next(encoder.parameters())
    model.to(parameter.device, parameter.dtype)
    state = encoder.state_dict()
    if _TABLE in state:
        state[_THEIR_TABLE] = state.pop(_TABLE)
    missing, unexpected = model.load_state_dict(state, strict=False)
    used = [key for key in missing if not _is_idle(key, model.config)]
    assert not used, f"no weights for {used}"
    assert not unexpected, f"no place for {unexpected}"
    return model.train(encoder.training)


def _types_for(config: SpeechEncoderConfig) -> tuple[str, ...]:
    """Which models of transformers have all that a config says."""
    if config.kind not in ("transformer", "conformer") or config.front_end == "fbank":
        raise ValueError(
            "encoder must be a transformer or conformer with a convolutional front end, "
            f"got {config.kind!r} with {config.front_end!r}"
        )
    if config.kind == "conformer":
        return ("wav2vec2-conformer",)
    if config.position_layers is None:
        return ("wav2vec2", "hubert") if config.position_buckets is None else ("wavlm",)
    if config.position_buckets or config.norm_first or config.conv_norm != "layer":
        raise ValueError(
            "encoder with position_layers must have position_buckets None, norm_first False and "
            f"conv_norm 'layer', got {config.position_buckets}, {config.norm_first} and "
            f"{config.conv_norm!r}"
        )
    return ("data2vec-audio",)


def _options(config: SpeechEncoderConfig, model_type: str) -> dict[str, Any]:
    """Arguments of a config of transformers."""
    dims, kernels, strides = zip(*config.conv_layers, strict=True)
    options: dict[str, Any] = {
        "conv_dim": dims, "conv_kernel": kernels, "conv_stride": strides,
        "num_feat_extract_layers": len(dims), "conv_bias": config.conv_bias,
        "feat_extract_norm": config.conv_norm, "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "intermediate_size": config.feed_forward_size, "hidden_act": config.activation,
        "do_stable_layer_norm": config.norm_first,
        "num_conv_pos_embeddings": config.position_kernel,
        "num_conv_pos_embedding_groups": config.position_groups,
        "conv_depthwise_kernel_size": config.depthwise_kernel,
        "num_buckets": config.position_buckets, "max_bucket_distance": config.position_distance,
        "hidden_dropout": config.dropout, "activation_dropout": config.dropout,
        "feat_proj_dropout": config.dropout, "conformer_conv_dropout": config.dropout,
        "attention_dropout": config.attention_dropout, "layerdrop": 0.0,
        "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
        "position_embeddings_type": "relative",
    }  # fmt: skip
    if model_type == "data2vec-audio":
        options["num_conv_pos_embeddings"] = config.position_layers
        options["conv_pos_kernel_size"] = config.position_kernel
    own = _OWN_OPTIONS.get(model_type, ())
    others = {name for names in _OWN_OPTIONS.values() for name in names} - set(own)
    return {name: value for name, value in options.items() if name not in others}


# what only one model type knows
_OWN_OPTIONS = {
    "wavlm": ("num_buckets", "max_bucket_distance"),
    "wav2vec2-conformer": (
        "conv_depthwise_kernel_size", "conformer_conv_dropout", "position_embeddings_type",
    ),
}  # fmt: skip
