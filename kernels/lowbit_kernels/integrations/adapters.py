"""The adapters and the finisher that conversion runs on models of known libraries.

Importing this module adds them to conversion's lists.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lowbit_kernels.conversion.registry import (
    ADAPTERS,
    ATTENTIONS,
    EXPOSERS,
    FINISHERS,
    OFFSETS,
    Adapter,
    AttentionModules,
)
from lowbit_kernels.formats import QuantConfig
from lowbit_kernels.integrations import (
    conformer,
    front_end,
    fused,
    multihead,
    positional,
    relative_attention,
    sew,
    silence,
    subsampling,
    torchaudio,
    wavlm,
    xvector,
)
from lowbit_kernels.integrations.chosen_attention import NAME, require_lowbit
from lowbit_kernels.integrations.class_swap import (
    Swapped,
    is_one_of,
    is_stock,
    restore_class,
    swap_class,
)
from lowbit_kernels.integrations.fuse import FAMILIES

_in_place = partial(Adapter, restore=restore_class)


def _swap(mixin: type[Swapped], matches: Callable[[nn.Module], bool]) -> Adapter:
    """An adapter that swaps the class of every module that ``matches``."""
    return _in_place(
        lambda module: not isinstance(module, Swapped) and matches(module),
        partial(swap_class, mixin=mixin),
    )


def _named(*names: str) -> Callable[[nn.Module], bool]:
    return lambda module: is_stock(module, *names)


def _tell_transformers(model: nn.Module, config: QuantConfig | None) -> str | None:
    """Attach the quantization to a transformers model, so that it saves and loads quantized."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from lowbit_kernels.integrations.huggingface import attach, detach, is_pretrained

    if is_pretrained(model):
        if config is not None:
            return attach(model, config)
        detach(model)
    return None


# whose forwards end in this library's attention: by the model's choice of it, or once swapped
_ATTENTION = (
    *(f"{family}Attention" for family in FAMILIES), "ParakeetEncoderAttention",
    "Wav2Vec2ConformerSelfAttention", "Wav2Vec2BertSelfAttention",
)  # fmt: skip


def _find_attention(model: nn.Module) -> list[nn.Module]:
    # without a config, as a conformer's in older versions, it cannot ask for ours; WavLM's need not
    return [
        module
        for module in model.modules()
        if is_one_of(module, "WavLMAttention")
        or (is_one_of(module, *_ATTENTION) and hasattr(module, "config"))
    ]


def _use_attention(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation(NAME)
    for module in _find_attention(model):
        if require_lowbit not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(require_lowbit)


ATTENTIONS.append(AttentionModules(_find_attention, _use_attention))
ADAPTERS.extend([
    _in_place(front_end.matches_front_end, front_end.mask_front_end),
    _in_place(positional.matches_encoder, positional.mask_positions),
    _in_place(subsampling.matches_adapter, subsampling.mask_adapter),
    _in_place(_named("Wav2Vec2BertAdapter"), subsampling.mask_attention_adapter),
    _swap(subsampling.MaskedSubsampling, _named("ParakeetEncoderSubsamplingConv2D")),
    _in_place(_named("Wav2Vec2ConformerEncoderLayer"), conformer.mask_conformer_layer),
    _swap(conformer.FusedBertConvolutionModule, _named("Wav2Vec2BertConvolutionModule")),
    _swap(conformer.FusedParakeetConvolutionModule, _named("ParakeetEncoderConvolutionModule")),
    _swap(
        relative_attention.FusedRelativeAttention,
        _named("Wav2Vec2ConformerSelfAttention", "Wav2Vec2BertSelfAttention"),
    ),
    _swap(relative_attention.FusedParakeetAttention, _named("ParakeetEncoderAttention")),
    _swap(sew.MaskedSEWEncoder, _named("SEWEncoder")),
    _swap(sew.MaskedSEWDEncoder, _named("SEWDEncoder")),
    _swap(sew.PooledFrameMask, _named("SEW*ForSequenceClassification")),
    _swap(xvector.DilatedLengths, _named("*ForXVector")),
    _swap(torchaudio.MaskedConvLayerBlock, torchaudio.matches_conv_layer_block),
    _swap(conformer.UncachedRotaryEmbedding, _named("Wav2Vec2ConformerRotary*Embedding")),
    _swap(fused.FusedConvLayer, fused.matches_conv_layer),
    _swap(fused.FusedFeedForward, fused.matches_feed_forward),
    _swap(fused.FusedPositionalEmbedding, fused.matches_positional_embedding),
])  # fmt: skip
EXPOSERS.extend([
    Adapter(
        multihead.matches_multihead,
        multihead.LinearMultiheadAttention,
        multihead.restore_multihead,
    ),
    _swap(wavlm.FusedWavLMAttention, _named("WavLMAttention")),
    _swap(torchaudio.FusedWavLMSelfAttention, torchaudio.matches_wavlm_self_attention),
    _swap(xvector.UnfoldedTDNNLayer, _named("TDNNLayer")),
])  # fmt: skip
OFFSETS.append(silence.silence_offsets)
FINISHERS.append(_tell_transformers)
