"""The adapters and the finisher that conversion runs on models of known libraries."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from lowbit_kernels.formats import QuantConfig
from lowbit_kernels.integrations.class_swap import Swapped, restore_class, swap_class
from lowbit_kernels.integrations.conformer import (
    UncachedRotaryEmbedding,
    mask_conformer_layer,
    matches_conformer_layer,
    matches_rotary_embedding,
    restore_conformer_layer,
)
from lowbit_kernels.integrations.front_end import (
    mask_front_end,
    matches_front_end,
    restore_front_end,
)
from lowbit_kernels.integrations.fused import (
    FusedFeedForward,
    FusedPositionalEmbedding,
    matches_feed_forward,
    matches_positional_embedding,
)
from lowbit_kernels.integrations.multihead import (
    expose_multihead,
    matches_multihead,
    restore_multihead,
)
from lowbit_kernels.integrations.positional import (
    mask_positions,
    matches_encoder,
    restore_positions,
)
from lowbit_kernels.integrations.sew import (
    MaskedSEWDEncoder,
    MaskedSEWEncoder,
    PooledFrameMask,
    matches_sew_encoder,
    matches_sew_head,
    matches_sewd_encoder,
)
from lowbit_kernels.integrations.silence import silence_offsets
from lowbit_kernels.integrations.subsampling import (
    MaskedSubsampling,
    mask_adapter,
    mask_attention_adapter,
    matches_adapter,
    matches_attention_adapter,
    matches_subsampling,
    restore_adapter,
    restore_attention_adapter,
)
from lowbit_kernels.integrations.torchaudio import (
    FusedWavLMSelfAttention,
    MaskedConvLayerBlock,
    matches_conv_layer_block,
    matches_wavlm_self_attention,
)
from lowbit_kernels.integrations.wavlm import FusedWavLMAttention, matches_wavlm_attention
from lowbit_kernels.integrations.xvector import (
    DilatedLengths,
    UnfoldedTDNNLayer,
    matches_tdnn_layer,
    matches_xvector_head,
)

if TYPE_CHECKING:
    from lowbit_kernels.conversion.registry import Adapter


def register() -> None:
    """Add what this package knows to conversion's lists; called once, when they come to exist."""
    from lowbit_kernels.conversion.registry import (
        ADAPTERS,
        EXPOSERS,
        FINISHERS,
        OFFSETS,
        Adapter,
    )

    ADAPTERS.append(Adapter(matches_front_end, mask_front_end, restore_front_end))
    ADAPTERS.append(Adapter(matches_encoder, mask_positions, restore_positions))
    ADAPTERS.append(Adapter(matches_adapter, mask_adapter, restore_adapter))
    ADAPTERS.append(
        Adapter(matches_attention_adapter, mask_attention_adapter, restore_attention_adapter)
    )
    ADAPTERS.append(_swap(matches_subsampling, MaskedSubsampling))
    ADAPTERS.append(Adapter(matches_conformer_layer, mask_conformer_layer, restore_conformer_layer))
    ADAPTERS.append(_swap(matches_sew_encoder, MaskedSEWEncoder))
    ADAPTERS.append(_swap(matches_sewd_encoder, MaskedSEWDEncoder))
    ADAPTERS.append(_swap(matches_sew_head, PooledFrameMask))
    ADAPTERS.append(_swap(matches_xvector_head, DilatedLengths))
    ADAPTERS.append(_swap(matches_conv_layer_block, MaskedConvLayerBlock))
    ADAPTERS.append(_swap(matches_rotary_embedding, UncachedRotaryEmbedding))
    ADAPTERS.append(_swap(matches_feed_forward, FusedFeedForward))
    ADAPTERS.append(_swap(matches_positional_embedding, FusedPositionalEmbedding))
    EXPOSERS.append(Adapter(matches_multihead, expose_multihead, restore_multihead))
    EXPOSERS.append(_swap(matches_wavlm_attention, FusedWavLMAttention))
    EXPOSERS.append(_swap(matches_wavlm_self_attention, FusedWavLMSelfAttention))
    EXPOSERS.append(_swap(matches_tdnn_layer, UnfoldedTDNNLayer))
    OFFSETS.append(silence_offsets)
    FINISHERS.append(_tell_transformers)


def _swap(matches: Callable[[nn.Module], bool], mixin: type[Swapped]) -> "Adapter":
    """An adapter that swaps the class of every module that ``matches``."""
    from lowbit_kernels.conversion.registry import Adapter

    def adapt(module: nn.Module) -> nn.Module:
        swap_class(module, mixin)
        return module

    def restore(module: nn.Module) -> nn.Module:
        if isinstance(module, mixin):
            restore_class(module)
        return module

    return Adapter(lambda m: not isinstance(m, Swapped) and matches(m), adapt, restore)


def _tell_transformers(model: nn.Module, config: QuantConfig | None) -> None:
    """Attach the quantization to a transformers model, so that it saves and loads quantized."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from lowbit_kernels.integrations.huggingface import attach, detach, is_pretrained

    if not is_pretrained(model):
        return
    if config is None:
        detach(model)
    else:
        attach(model, config)
