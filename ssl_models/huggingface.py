"""Weights of transformers' models in a SpeechEncoder.

transformers is not imported: a model that the caller has is read by its names.
"""

from typing import Any

import torch
from torch import nn

from ssl_models.config import SpeechEncoderConfig
from ssl_models.encoder import SpeechEncoder

# model types, and the kind of encoder that has their weights
_KINDS = {
    "wav2vec2": "transformer",
    "hubert": "transformer",
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
_ACTIVATIONS = {"gelu": "gelu", "silu": "silu", "swish": "silu", "relu": "relu"}


@torch.no_grad()
def from_hf(model: nn.Module) -> SpeechEncoder:
    """A SpeechEncoder with the weights of a wav2vec 2.0, HuBERT or wav2vec2-conformer model.

    Its frames are the model's ``last_hidden_state``, to rounding; of a padded batch they are those
    of single utterances, where a GroupNorm or a convolution module of transformers sees padding.

    Dropout is ``hidden_dropout`` everywhere but in attention, and no layer is dropped.

    Args:
        model: of transformers, in float; a head is left behind, as is what masks its inputs.

    Returns:
        A new encoder on the model's device, of its dtype and in its mode.

    Raises:
        ValueError: for a model of another kind, or with a part that a SpeechEncoder has not, naming
            the key, the rule and the value.
    """
    theirs: Any = getattr(model, "config", None)
    name = getattr(theirs, "model_type", None)
    if name not in _KINDS:
        raise ValueError(
            f"model must be one of transformers' {tuple(_KINDS)}, got a {type(model).__name__}"
        )
    for key, value in _RULES.items():
        if (found := getattr(theirs, key, value)) != value:
            raise ValueError(f"model.config.{key} must be {value!r}, got {found!r}")
    if theirs.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"model.config.hidden_act must be one of {tuple(_ACTIVATIONS)}, "
            f"got {theirs.hidden_act!r}"
        )
    base: Any = model.base_model
    parameter = next(base.parameters())
    encoder = SpeechEncoder(_config(theirs, _KINDS[name]))
    state = {key: tensor for key, tensor in base.state_dict().items() if key != "masked_spec_embed"}
    if name == "wav2vec2-conformer":
        # there, and not called
        state = {key: tensor for key, tensor in state.items() if "pos_conv_embed" not in key}
    encoder.to(parameter.device, parameter.dtype).load_state_dict(state)
    return encoder.train(model.training)


def _config(theirs: Any, kind: str) -> SpeechEncoderConfig:
    return SpeechEncoderConfig(
        kind=kind,
        conv_norm=theirs.feat_extract_norm,
        conv_bias=theirs.conv_bias,
        conv_dims=tuple(theirs.conv_dim),
        conv_kernels=tuple(theirs.conv_kernel),
        conv_strides=tuple(theirs.conv_stride),
        hidden_size=theirs.hidden_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        feed_forward_size=theirs.intermediate_size,
        activation=_ACTIVATIONS[theirs.hidden_act],
        norm_first=kind == "transformer" and theirs.do_stable_layer_norm,
        position_kernel=theirs.num_conv_pos_embeddings,
        position_groups=theirs.num_conv_pos_embedding_groups,
        depthwise_kernel=getattr(theirs, "conv_depthwise_kernel_size", 31),
        dropout=theirs.hidden_dropout,
        attention_dropout=theirs.attention_dropout,
    )
