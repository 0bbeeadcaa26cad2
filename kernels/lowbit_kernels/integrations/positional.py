"""Positional convolutions that see zeros where an utterance has ended.

Most families convolve the masked hidden states directly. HuBERT's batch norm and data2vec's layer
norms come between, and turn the zeros of padding into something else.

Dimension key: B batch, T frames, C features.
"""

from typing import Any

from torch import Tensor, nn

from lowbit_kernels.integrations.class_swap import Swapped, is_stock, swap_class
from lowbit_kernels.integrations.padding import attention_mask_of


class MaskedPositionalEmbedding(Swapped):
    """A positional embedding, told the mask by a hook on the encoder that calls it.

    Subclasses have ``_convolve``: [B, C, T] to [B, C, T], with ``padding`` [B, 1, T] true beyond
    each utterance.
    """

    # set by the hook, taken by the next forward
    _mask: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        mask, self._mask = self._mask, None
        if mask is None:
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        padding = ~mask.bool()[:, None]  # [B, 1, T]
        return self._convolve(hidden_states.transpose(1, 2), padding).transpose(1, 2)  # type: ignore[no-any-return]


class MaskedHubertEmbedding(MaskedPositionalEmbedding):
    """HuBERT's, with batch norm."""

    def _convolve(self, x: Tensor, padding: Tensor) -> Tensor:
        normalized = self.batch_norm(x).masked_fill(padding, 0)
        return self.activation(self.padding(self.conv(normalized)))  # type: ignore[no-any-return]


class MaskedData2VecEmbedding(MaskedPositionalEmbedding):
    """data2vec's stack of convolutions with layer norm."""

    def _convolve(self, x: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).masked_fill(padding, 0)
        return x


_MIXINS = {
    "HubertPositionalConvEmbedding": MaskedHubertEmbedding,
    "Data2VecAudioPositionalConvEmbedding": MaskedData2VecEmbedding,
}


def matches_encoder(module: nn.Module) -> bool:
    """Whether a module is an encoder of transformers with such a positional embedding."""
    embedding = module._modules.get("pos_conv_embed")
    return is_stock(embedding, *_MIXINS) and getattr(embedding, "batch_norm", True) is not None


def mask_positions(encoder: nn.Module) -> nn.Module:
    """Make an encoder's positional embedding ignore padding; in place."""
    embedding: Any = encoder.pos_conv_embed
    swap_class(embedding, _MIXINS[type(embedding).__name__])
    encoder.register_forward_pre_hook(_pass_mask, with_kwargs=True)
    return encoder


def _pass_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the encoder: hand the mask [B, T] on."""
    embedding: Any = module.pos_conv_embed
    embedding._mask = attention_mask_of(args, kwargs)
