"""Weights of fairseq's wav2vec 2.0 and HuBERT in a SpeechEncoder, by their names.

Neither fairseq nor what else a checkpoint may have pickled is imported or run.
"""

import dataclasses
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssl_models.config import FRONT_ENDS, SpeechEncoderConfig
from ssl_models.encoder import SpeechEncoder
from ssl_models.huggingface import load_weights

# of a model that was fine-tuned
_PREFIX = "w2v_encoder.w2v_model."
# patterns of fairseq's names, and what a SpeechEncoder calls the same
_NAMES = {
    r"feature_extractor\.conv_layers\.(\d+)\.0\.(\w+)": r"feature_extractor.conv_layers.\1.conv.\2",
    # of a LayerNorm the second part, between two that transpose
    r"feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?(\w+)": (
        r"feature_extractor.conv_layers.\1.layer_norm.\2"
    ),
    r"layer_norm\.(\w+)": r"feature_projection.layer_norm.\1",
    r"post_extract_proj\.(\w+)": r"feature_projection.projection.\1",
    r"encoder\.pos_conv\.0\.bias": "encoder.pos_conv_embed.conv.bias",
    r"encoder\.pos_conv\.0\.weight_g": (
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0"
    ),
    r"encoder\.pos_conv\.0\.weight_v": (
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    ),
    r"encoder\.layer_norm\.(\w+)": r"encoder.layer_norm.\1",
    r"encoder\.layers\.(\d+)\.self_attn\.(\w+)\.(\w+)": r"encoder.layers.\1.attention.\2.\3",
    r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(\w+)": r"encoder.layers.\1.layer_norm.\2",
    r"encoder\.layers\.(\d+)\.fc1\.(\w+)": (
        r"encoder.layers.\1.feed_forward.intermediate_dense.\2"
    ),
    r"encoder\.layers\.(\d+)\.fc2\.(\w+)": r"encoder.layers.\1.feed_forward.output_dense.\2",
    r"encoder\.layers\.(\d+)\.final_layer_norm\.(\w+)": (r"encoder.layers.\1.final_layer_norm.\2"),
}
# heads, what masks inputs, and what pre-training compares with
_LEFT_BEHIND = re.compile(
    r"(mask_emb|label_embs_concat|(w2v_encoder\.proj|final_proj|project_q|quantizer"
    r"|input_quantizer|project_inp|target_glu)\..*)"
)


@torch.no_grad()
def from_fairseq(
    source: str | os.PathLike[str] | Mapping[str, Any], **changes: Any
) -> SpeechEncoder:
    """A SpeechEncoder with the weights of a wav2vec 2.0 or HuBERT that fairseq has trained.

    Dimensions are those of the tensors. What these do not tell is as in the published models:
    strides 5, 2, 2, 2, 2, 2, 2; 12 heads of 768 features, else 16; pre-norm with LayerNorms in the
    front end.

    Args:
        source: a file of tensors alone, or tensors by name; fairseq's checkpoints have them under
            ``"model"``. Its own files hold pickled objects, too, and are refused: where you trust
            one, ``torch.save(torch.load(path, weights_only=False)["model"], new_path)``.
        **changes: of ``SpeechEncoderConfig``, where the weights do not tell, such as ``num_heads``.

    Returns:
        A new encoder in fp32, in training mode.

    Raises:
        ValueError: for a file of more than tensors, an unknown name, weights that are missing or do
            not fit, naming the key, the rule and the value.
    """
    state: dict[str, Tensor] = {}
    for key, tensor in _tensors(source).items():
        name = key.removeprefix(_PREFIX)
        if _LEFT_BEHIND.fullmatch(name):
            continue
        renamed = [re.sub(old, new, name) for old, new in _NAMES.items() if re.fullmatch(old, name)]
        if not renamed:
            raise ValueError(f"{key} must be a name of fairseq's wav2vec 2.0 or HuBERT")
        state[renamed[0]] = tensor.float()
    encoder = SpeechEncoder(_config(state, changes))
    load_weights(encoder, state)
    return encoder


def _tensors(source: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Tensor]:
    found: Any = source
    if not isinstance(source, Mapping):
        try:
            found = torch.load(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            raise ValueError(
                f"{os.fspath(source)} must hold tensors alone, got more, or a broken file; of a "
                "file that you trust, save the entry 'model' by itself"
            ) from None
    found = found.get("model", found) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not found:
        raise ValueError("source must hold tensors by name, got none")
    for key, tensor in found.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{key} must be a tensor, got {type(tensor).__name__}")
    return found


def _config(state: Mapping[str, Tensor], changes: Mapping[str, Any]) -> SpeechEncoderConfig:
    """Dimensions of tensors."""
    known = {field.name for field in dataclasses.fields(SpeechEncoderConfig)}
    if unknown := sorted(changes.keys() - known):
        raise ValueError(f"changes must be of {sorted(known)}, got {unknown[0]!r}")
    convs = _shapes(state, "feature_extractor.conv_layers.{}.conv.weight", 3)
    layers = _shapes(state, "encoder.layers.{}.feed_forward.intermediate_dense.weight", 2)
    name = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    if name not in state or state[name].dim() != 3:
        raise ValueError("encoder.pos_conv.0.weight_v must be there, of 3 dimensions")
    C, per_group, taps = state[name].shape
    has_norms = "feature_extractor.conv_layers.1.layer_norm.weight" in state
    kernels, (_, usual, strides) = tuple(shape[2] for shape in convs), FRONT_ENDS["wav2vec2"]
    if kernels != usual and "conv_strides" not in changes:
        raise ValueError(f"conv_strides must be given for kernels other than {usual}: {kernels}")
    derived: dict[str, Any] = {
        "conv_dims": tuple(shape[0] for shape in convs),
        "conv_kernels": kernels,
        "conv_strides": strides,
        "conv_norm": "layer" if has_norms else "group",
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in state,
        "hidden_size": C,
        "num_layers": len(layers),
        "num_heads": 12 if C == 768 else 16,
        "feed_forward_size": layers[0][0],
        "norm_first": has_norms,
        "position_kernel": taps,
        "position_groups": C // per_group,
    }
    return SpeechEncoderConfig(**{**derived, **changes})


def _shapes(state: Mapping[str, Tensor], name: str, dims: int) -> list[torch.Size]:
    """Of the weights of consecutive layers."""
    shapes: list[torch.Size] = []
    while (key := name.format(len(shapes))) in state:
        if state[key].dim() != dims:
            raise ValueError(f"{key} must have {dims} dimensions, got {list(state[key].shape)}")
        shapes.append(state[key].shape)
    if not shapes:
        raise ValueError(f"{name.format(0)} must be there, got weights without it")
    return shapes
