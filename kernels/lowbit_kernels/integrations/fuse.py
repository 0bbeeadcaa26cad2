"""Which layers of a model are fused by ``quantize(fuse=True)``, and how they know each other."""

import weakref
from itertools import pairwise

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

_FAMILIES = ("Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat", "Data2VecAudio", "SEW")
_MIXINS: dict[str, type[FusedLayer]] = {
    **{f"{family}EncoderLayer": PostNormLayer for family in _FAMILIES},
    **{f"{family}EncoderLayerStableLayerNorm": PreNormLayer for family in _FAMILIES},
    "WhisperEncoderLayer": WhisperLayer,
    "Wav2Vec2ConformerEncoderLayer": FusedConformerLayer,
    "Wav2Vec2BertEncoderLayer": FusedBertConformerLayer,
}


def is_fused(model: nn.Module) -> bool:
    """Whether a model has fused encoder layers."""
    return any(isinstance(module, FusedLayer) for module in model.modules())


def fuse_layers(model: nn.Module) -> bool:
    """Make the encoder layers of a model fused ones, in place; whether there are any now."""
    for module in list(model.modules()):
        # a conformer's is swapped already, for a mixin that the fused one extends
        origin = module._origin if isinstance(module, Swapped) else type(module)
        mixin = _MIXINS.get(origin.__name__)
        if mixin is not None and origin.__module__.startswith("transformers."):
            module.__class__ = origin
            swap_class(module, mixin)
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            _introduce(stack)
    return is_fused(model)


def _introduce(stack: nn.ModuleList) -> None:
    """Tell the layers of an encoder of each other."""
    for layer, after in pairwise(stack):
        if isinstance(layer, PostNormLayer) and isinstance(after, PostNormLayer):
            layer.__dict__["_next"] = weakref.ref(after)
    conformers = [layer for layer in stack if isinstance(layer, FusedConformerLayer)]
    positions = SharedPositions(conformers)
    for layer in conformers:
        layer.__dict__["_positions"] = positions
