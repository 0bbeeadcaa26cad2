"""wav2vec2-conformer: convolutions that ignore padding, rotary positions without a cache.

Dimension key: B batch, T frames, C features, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.integrations.class_swap import (
    Swapped,
    is_stock,
    restore_class,
    swap_class,
)


class MaskedConformerLayer(Swapped):
    """An encoder layer that tells its convolution module which frames are valid.

    They are read from the layer's own argument, so gradient checkpointing recomputes with them.
    """

    conv_module: Any

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """[B, T, C] to [B, T, C]; ``attention_mask`` in any form but a block mask."""
        self.conv_module._mask = _valid_frames(attention_mask)
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]


class MaskedConvolutionModule(Swapped):
    """The convolution module, blind beyond each utterance."""

    layer_norm: nn.Module
    pointwise_conv1: nn.Module
    glu: nn.Module
    depthwise_conv: nn.Module
    batch_norm: nn.Module
    activation: Any
    pointwise_conv2: nn.Module
    dropout: nn.Module
    # set by the layer, taken by the next forward
    _mask: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        mask, self._mask = self._mask, None
        if mask is None:
            plain: Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return plain
        x = self.layer_norm(hidden_states).transpose(1, 2)
        x = self.glu(self.pointwise_conv1(x)).masked_fill(~mask[:, None], 0)
        x = self.activation(self.batch_norm(self.depthwise_conv(x)))
        out: Tensor = self.dropout(self.pointwise_conv2(x)).transpose(1, 2)
        return out


class UncachedRotaryEmbedding(Swapped):
    """Computes the embedding at each call.

    The cache holds one length: torch.compile makes a new graph for each, and a tensor that
    inference made breaks the training that follows.
    """

    cached_sequence_length: int | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [2, T, 1, 1, D], cosines and sines."""
        self.cached_sequence_length = None
        embedding: Tensor = super().forward(hidden_states)  # type: ignore[misc]
        return embedding


def matches_rotary_embedding(module: nn.Module) -> bool:
    """Whether a module is the rotary embedding of transformers' wav2vec2-conformer."""
    return is_stock(module, "Wav2Vec2ConformerRotaryPositionalEmbedding")


def matches_conformer_layer(module: nn.Module) -> bool:
    """Whether a module is an encoder layer of transformers' wav2vec2-conformer."""
    return is_stock(module, "Wav2Vec2ConformerEncoderLayer")


def mask_conformer_layer(layer: nn.Module) -> nn.Module:
    """Make a layer's convolution module ignore padding; in place."""
    swap_class(layer, MaskedConformerLayer)
    swap_class(layer.conv_module, MaskedConvolutionModule)  # type: ignore[arg-type]
    return layer


def restore_conformer_layer(module: nn.Module) -> nn.Module:
    """Undo ``mask_conformer_layer``."""
    if isinstance(module, MaskedConformerLayer):
        restore_class(module.conv_module)
        restore_class(module)
    return module


def _valid_frames(attention_mask: Any) -> Tensor | None:
    """[B, T] bool from what transformers gives its attention: [B, T], or [B, 1, T, T]."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise NotImplementedError(
            "attn_implementation must be 'eager', 'sdpa' or 'lowbit' for wav2vec2-conformer, "
            f"got a mask of type {type(attention_mask).__name__}"
        )
    # every query may attend to the same keys, the valid frames
    keys = attention_mask if attention_mask.dim() == 2 else attention_mask[:, 0, 0]
    return keys == 0 if attention_mask.is_floating_point() else keys.to(torch.bool)
