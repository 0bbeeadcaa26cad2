"""Which layers of a model are fused by ``quantize(fuse=True)``, and how they know each other."""

import weakref
from itertools import pairwise
from typing import Any

from torch import nn

from lowbit_kernels.integrations.class_swap import Swapped, swap_class
from lowbit_kernels.integrations.conformer_layers import (
    FusedBertConformerLayer,
    FusedConformerLayer,
    SharedPositions,
)
from lowbit_kernels.integrations.encoder_layers import (
    FusedLayer,
    PostNormLayer,
    PreNormLayer,
    WhisperLayer,
)
from lowbit_kernels.integrations.wavlm_layers import FusedWavLMLayer, FusedWavLMStableLayer

FAMILIES = ("Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat", "Data2VecAudio", "SEW")
_MIXINS: dict[str, type[FusedLayer]] = {
    **{f"{family}EncoderLayer": PostNormLayer for family in FAMILIES},
    **{f"{family}EncoderLayerStableLayerNorm": PreNormLayer for family in FAMILIES},
    "WhisperEncoderLayer": WhisperLayer,
    "WavLMEncoderLayer": FusedWavLMLayer,
    "WavLMEncoderLayerStableLayerNorm": FusedWavLMStableLayer,
    "Wav2Vec2ConformerEncoderLayer": FusedConformerLayer,
    "Wav2Vec2BertEncoderLayer": FusedBertConformerLayer,
}
_REGISTERED: dict[type[nn.Module], type[FusedLayer]] = {}


def register_fused(kind: type[nn.Module], mixin: type[FusedLayer]) -> None:
    """Let ``fuse_layers`` put ``mixin`` in front of a layer class that is not transformers'."""
    _REGISTERED[kind] = mixin


def is_fused(model: nn.Module) -> bool:
    """Whether a model has fused encoder layers."""
    return any(isinstance(module, FusedLayer) for module in model.modules())


def fuse_layers(model: nn.Module) -> int:
    """Make the encoder layers of a model fused ones, in place; returns how many there are now."""
    for module in list(model.modules()):
        # a conformer's is swapped already, for a mixin that the fused one extends
        origin = module._origin if isinstance(module, Swapped) else type(module)
        mixin = _REGISTERED.get(origin)
        if mixin is None and origin.__module__.startswith("transformers."):
            mixin = _MIXINS.get(origin.__name__)
            mixin = mixin if mixin and _chooses_attention(mixin, module) else None
        if mixin is not None:
            module.__class__ = origin
            swap_class(module, mixin)
    for module in model.modules():
        is_known = introduce_layers in module._forward_pre_hooks.values()
        if not is_known and any(_is_stack(child) for child in module.children()):
            module.register_forward_pre_hook(introduce_layers, with_kwargs=True)
    return sum(isinstance(module, FusedLayer) for module in model.modules())


def _chooses_attention(mixin: type[FusedLayer], layer: nn.Module) -> bool:
    """Not so in conformers of older versions of transformers."""
    return not issubclass(mixin, FusedConformerLayer) or hasattr(layer.self_attn, "config")


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(isinstance(m, FusedLayer) for m in module)


def introduce_layers(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an encoder: tell its layers of each other, if they changed places."""
    for stack in filter(_is_stack, encoder.children()):
        layers = [layer for layer in stack.children() if isinstance(layer, FusedLayer)]
        for layer, after in pairwise(layers):
            if layer.following() is not after:
                layer.__dict__["_next"] = weakref.ref(after)
        layers[-1].__dict__.pop("_next", None)
        conformers = [layer for layer in layers if isinstance(layer, FusedConformerLayer)]
        shared = conformers[0].__dict__.get("_positions") if conformers else None
        if conformers and (shared is None or shared.layers != conformers):
            shared = SharedPositions(conformers)
            for layer in conformers:
                layer.__dict__["_positions"] = shared
