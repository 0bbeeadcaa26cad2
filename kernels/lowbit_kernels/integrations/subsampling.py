"""Strided convolutions before or after an encoder that see zeros where an utterance has ended.

Models with ``add_adapter=True`` shorten the encoder's output. Their convolutions reach over an
utterance's end into frames that transformers leaves as they come.

Dimension key: B batch, T frames, C features, F mel features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.integrations.class_swap import Swapped, is_stock, swap_class
from lowbit_kernels.integrations.padding import attention_mask_of, frames_after, zero_padding


class _Adapter(Swapped):
    """What the adapters have in common."""

    def _project(self, hidden_states: Tensor) -> Tensor:
        if self.proj is None or self.proj_layer_norm is None:
            return hidden_states
        return self.proj_layer_norm(self.proj(hidden_states))  # type: ignore[no-any-return]

    def _drops_layer(self) -> bool:
        return self.training and self.layerdrop > 0 and bool(torch.rand([]) <= self.layerdrop)


class MaskedAdapter(_Adapter):
    """Strided convolutions with GLU, told the lengths by a hook on the model that calls them."""

    # set by the hook, taken by the next forward
    _lengths: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [B, T_out, C_out]."""
        lengths, self._lengths = self._lengths, None
        x = self._project(hidden_states).transpose(1, 2)
        for layer in self.layers:
            if self._drops_layer():
                continue
            if lengths is not None:
                x, lengths = zero_padding(x, lengths), frames_after(lengths, layer.conv)
            x = layer(x)
        return x.transpose(1, 2)


class MaskedAttentionAdapter(_Adapter):
    """Wav2Vec2-BERT's: strided convolutions before an attention layer and beside it."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """[B, T, C] to [B, T_out, C_out]; ``attention_mask`` [B, T]."""
        x = self._project(hidden_states)
        lengths = None if attention_mask is None else attention_mask.sum(-1)
        for layer in self.layers:
            if self._drops_layer():
                continue
            layer.residual_layer_norm._lengths = layer.self_attn_layer_norm._lengths = lengths
            if lengths is not None:
                lengths = frames_after(lengths, layer.residual_conv)
            x = layer(x, attention_mask=attention_mask, sub_sampled_lengths=lengths, **kwargs)
        return x


class MaskedLayerNorm(Swapped):
    """A LayerNorm before a convolution: padding comes out as zero."""

    # set by the adapter, taken by the next forward
    _lengths: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        lengths, self._lengths = self._lengths, None
        normalized: Tensor = super().forward(x)  # type: ignore[misc]
        if lengths is None:
            return normalized
        return zero_padding(normalized.transpose(1, 2), lengths).transpose(1, 2)


class MaskedSubsampling(Swapped):
    """Parakeet's subsampling, which masks what its convolutions give but not what they get."""

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, F] to [B, T_out, C]; ``attention_mask`` [B, T]."""
        if attention_mask is not None:
            input_features = input_features.masked_fill(~attention_mask.bool()[..., None], 0)
        return super().forward(input_features, attention_mask)  # type: ignore[no-any-return]


_CONV_ADAPTERS = tuple(
    f"{family}Adapter" for family in ("Wav2Vec2", "WavLM", "Data2VecAudio", "Wav2Vec2Conformer")
)


def matches_adapter(module: nn.Module) -> bool:
    """Whether a module is a model of transformers with convolutions after its encoder."""
    return is_stock(module._modules.get("adapter"), *_CONV_ADAPTERS)


def mask_adapter(model: nn.Module) -> nn.Module:
    """Make a model's adapter ignore padding; in place."""
    swap_class(model.adapter, MaskedAdapter)  # type: ignore[arg-type]
    model.register_forward_pre_hook(_pass_lengths, with_kwargs=True)
    return model


def mask_attention_adapter(adapter: nn.Module) -> nn.Module:
    """Make Wav2Vec2-BERT's adapter ignore padding; in place."""
    layers: Any = adapter.layers
    for layer in layers:
        swap_class(layer.residual_layer_norm, MaskedLayerNorm)
        swap_class(layer.self_attn_layer_norm, MaskedLayerNorm)
    return swap_class(adapter, MaskedAttentionAdapter)


def _pass_lengths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the model: hand the adapter each utterance's frames."""
    model: Any = module
    mask = attention_mask_of(args, kwargs)
    lengths = None if mask is None else mask.sum(-1)
    if lengths is not None:
        lengths = model._get_feat_extract_output_lengths(lengths, add_adapter=False)
    model.adapter._lengths = lengths
