"""Conformers: convolution modules fused and blind to padding, rotary positions without a cache.

The convolution modules of wav2vec2-conformer, wav2vec2-bert and parakeet run as three low-bit ops
in inference (``modules/conv_module.py``), and as transformers computes them where gradients are;
in training wav2vec2-conformer's BatchNorm counts valid frames only, in one op with its activation.

Dimension key: B batch, T frames, C features, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.integrations.activations import epilogue_of
from lowbit_kernels.integrations.class_swap import Swapped, swap_class
from lowbit_kernels.modules.batch_norm import normalize_frames
from lowbit_kernels.modules.conv_module import convolve, fuses_convolution

_BATCH_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)


class MaskedConformerLayer(Swapped):
    """An encoder layer that tells its convolution module which frames are valid.

    They are read from the layer's own argument, so gradient checkpointing recomputes with them.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """[B, T, C] to [B, T, C]; ``attention_mask`` in any form but a block mask."""
        self.conv_module._mask = _valid_frames(attention_mask)
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]


class MaskedConvolutionModule(Swapped):
    """The convolution module, blind beyond each utterance."""

    # set by the layer, taken by the next forward
    _mask: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        mask, self._mask = self._mask, None
        if fuses_module(self, self.batch_norm):
            # the model derives its masks from lengths
            lengths = None if mask is None else mask.sum(1)
            first = self.layer_norm if type(self.layer_norm) is nn.LayerNorm else None
            x = hidden_states if first else self.layer_norm(hidden_states)
            return convolve_module(self, x, self.batch_norm, lengths, first)
        norm, epilogue = self.batch_norm, epilogue_of(self.activation)
        trains = norm.training and epilogue is not None and type(norm) in _BATCH_NORMS
        if mask is None and not trains:
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        x, lengths = self.layer_norm(hidden_states).transpose(1, 2), None
        x = self.glu(self.pointwise_conv1(x))
        if mask is not None:
            x, lengths = x.masked_fill(~mask[:, None], 0), mask.sum(1)
        x = self.depthwise_conv(x)
        x = normalize_frames(norm, x, lengths, epilogue) if trains else self.activation(norm(x))
        out: Tensor = self.dropout(self.pointwise_conv2(x)).transpose(1, 2)
        return out


class FusedBertConvolutionModule(Swapped):
    """wav2vec2-bert's, which is causal and masks its input itself."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; ``attention_mask`` [B, T], of any form."""
        if not fuses_module(self, self.depthwise_layer_norm):
            return super().forward(hidden_states, attention_mask)  # type: ignore[no-any-return]
        x = self.layer_norm(hidden_states)
        if attention_mask is not None:
            # without biases it stays zero until the depthwise convolution
            x = x.masked_fill(~attention_mask.bool()[..., None], 0)
        left = self.depthwise_conv.kernel_size[0] - 1
        return convolve_module(self, x, self.depthwise_layer_norm, padding=(left, 0))


class FusedParakeetConvolutionModule(Swapped):
    """Parakeet's, whose masks the model derives from lengths."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; ``attention_mask`` [B, 1, T, T]."""
        readable = attention_mask is None or isinstance(attention_mask, Tensor)
        if not readable or not fuses_module(self, self.norm):
            return super().forward(hidden_states, attention_mask)  # type: ignore[no-any-return]
        valid = _valid_frames(attention_mask)
        return convolve_module(
            self, hidden_states, self.norm, None if valid is None else valid.sum(1)
        )


def fuses_module(module: Any, norm: nn.Module) -> bool:
    """Whether a convolution module of transformers can run as three ops here and now."""
    return (
        not (module.training or norm.training)
        and not torch.is_grad_enabled()
        and epilogue_of(module.activation) is not None
        and fuses_convolution(
            module.pointwise_conv1, module.depthwise_conv, norm, module.pointwise_conv2
        )
    )


def convolve_module(
    module: Any,
    x: Tensor,
    norm: nn.Module,
    lengths: Tensor | None = None,
    layer_norm: nn.LayerNorm | None = None,
    padding: tuple[int, int] | None = None,
) -> Tensor:
    """A convolution module of transformers as three ops, [B, T, C] to [B, T, C]."""
    return convolve(
        x, module.pointwise_conv1, module.depthwise_conv, norm, epilogue_of(module.activation),
        module.pointwise_conv2, padding=padding or module.depthwise_conv.padding[0],
        layer_norm=layer_norm, lengths=lengths,
    )  # fmt: skip


class UncachedRotaryEmbedding(Swapped):
    """Computes the embedding at each call.

    The cache holds one length: torch.compile makes a new graph for each, and a tensor that
    inference made breaks the training that follows.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [2, T, 1, 1, D], cosines and sines."""
        self.cached_sequence_length = None
        return super().forward(hidden_states)  # type: ignore[no-any-return]


def mask_conformer_layer(layer: nn.Module) -> nn.Module:
    """Make a layer's convolution module ignore padding; in place."""
    swap_class(layer, MaskedConformerLayer)
    swap_class(layer.conv_module, MaskedConvolutionModule)  # type: ignore[arg-type]
    return layer


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
