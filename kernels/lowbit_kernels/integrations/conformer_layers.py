"""Layers of wav2vec2-conformer and wav2vec2-bert in a handful of ops; see ``encoder_layers.py``.

Dimension key: B batch, T frames, C features, L layers.
"""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lowbit_kernels.attention import Position
from lowbit_kernels.integrations.activations import epilogue_of
from lowbit_kernels.integrations.conformer import (
    MaskedConformerLayer,
    fuses_module,
)
from lowbit_kernels.integrations.encoder_layers import (
    Attention,
    FeedForward,
    FusedLayer,
    Parts,
    is_affine,
)
from lowbit_kernels.integrations.relative_attention import relative_keys, transformer_xl
from lowbit_kernels.modules import QLinear
from lowbit_kernels.modules.blocks import (
    Reader,
    add_linear,
    can_join,
    joined,
    linear,
    normalize,
    normalize_twice,
    operand,
)
from lowbit_kernels.modules.conv_module import convolve_rows


class SharedPositions:
    """The positions of Transformer-XL, projected for all layers of an encoder by one matmul."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._embeddings: Any = lambda: None
        self._keys: list[Tensor] = []

    @property
    def layers(self) -> list[Any]:
        """The layers, None for those that are gone."""
        return [ref() for ref in self._layers]

    def of(self, layer: Any, embeddings: Tensor) -> Tensor | None:
        """[2 T - 1, C] for a layer, of positions [1, 2 T - 1, C]; None where layers differ."""
        layers = self.layers
        if self._embeddings() is not embeddings:
            projections = [each.self_attn.linear_pos for each in layers if each is not None]
            if len(projections) < len(layers) or not can_join(projections):
                return None
            weight = joined(self, projections)
            keys = linear(embeddings[0], weight, embeddings.dtype)
            self._keys = list(keys.chunk(len(layers), -1))
            self._embeddings = weakref.ref(embeddings)
        place = next(i for i, each in enumerate(layers) if each is layer)
        keys = self._keys[place]
        if place == len(layers) - 1:
            # nobody reads them again
            self._embeddings, self._keys = lambda: None, []
        return keys


class FusedConformerLayer(FusedLayer, MaskedConformerLayer):
    """Feed-forward, attention, convolution module, feed-forward and norm.

    Two matmuls; norm, one matmul, attention and one matmul; four launches; norm and two matmuls;
    two norms in one: 14, with int8 inputs 18, and one an encoder for the projected positions. With
    16-bit inputs 11: what is between two matmuls is part of them.
    """

    _scratch = (*FusedLayer._scratch, "_positions")

    def _parts(self) -> Parts:
        a, first, second = self.self_attn, self.ffn1, self.ffn2
        return Parts(
            Attention(a, (a.linear_q, a.linear_k, a.linear_v), a.linear_out, a.head_size),
            tuple(
                FeedForward(f.intermediate_dense, f.intermediate_act_fn, f.output_dense, 0.5)
                for f in (first, second)
            ),
            (
                self.ffn1_layer_norm, self.self_attn_layer_norm, self.ffn2_layer_norm,
                self.final_layer_norm,
            ),
            (first, second, self.conv_module),
        )  # fmt: skip

    def _fits(self, relative_position_embeddings: Tensor | None = None, **_: Any) -> bool:
        has_positions = relative_position_embeddings is not None
        kind, conv = self.self_attn.position_embeddings_type, self.conv_module
        known = kind == "relative_key" or (kind == "relative" and has_positions)
        return known and type(conv.layer_norm) is nn.LayerNorm and fuses_module(conv, self._norm())

    def _norm(self) -> Any:
        return self.conv_module.batch_norm

    def _padding(self) -> Any:
        return self.conv_module.depthwise_conv.padding[0]

    def _fused(
        self,
        x: Tensor,
        lengths: Tensor | None,
        parts: Parts,
        **kwargs: Any,
    ) -> Tensor:
        attention, (first, second), norms, _others = parts
        rows = self._take(x)
        rows = normalize(x, norms[0], operand(first.first)) if rows is None else rows
        qkv, conv = joined(self, attention.inputs), self.conv_module
        dtype = x.dtype
        readers = (
            Reader(norms[1], qkv),
            Reader(conv.layer_norm, operand(conv.pointwise_conv1)),
            Reader(norms[2], operand(second.first)),
        )
        x, stats = add_linear(first.hidden(rows, dtype), first.last, x, readers[0])
        rows, position = normalize(x, *readers[0], stats), self._position(x, **kwargs)
        rows = self._attended(rows, qkv, dtype, lengths, attention, position)
        x, stats = add_linear(rows, operand(attention.output), x, readers[1])
        rows = convolve_rows(
            normalize(x, *readers[1], stats), conv.pointwise_conv1, conv.depthwise_conv,
            self._norm(), epilogue_of(conv.activation), conv.pointwise_conv2, dtype=dtype,
            padding=self._padding(), lengths=lengths,
        )  # fmt: skip
        x, stats = add_linear(rows, operand(conv.pointwise_conv2), x, readers[2])
        rows = second.hidden(normalize(x, *readers[2], stats), dtype)
        x = linear(rows, second.last, dtype, residual=x)
        following = self.following()
        after = None if following is None else following._parts()
        to = None if after is None else after.feed_forwards[0].first
        if after is None or type(to) is not QLinear or not is_affine(after.norms[0]):
            return norms[3](x)  # type: ignore[no-any-return]
        y, made = normalize_twice(x, norms[3], after.norms[0], operand(to))
        following._hand(y, made)
        return y

    def _as_tuple(self, y: Any) -> tuple[Any, ...]:
        return y, None

    def _position(self, x: Tensor, **kwargs: Any) -> Position:
        attention, shared = self.self_attn, self.__dict__.get("_positions")
        embeddings = kwargs.get("relative_position_embeddings")
        if attention.position_embeddings_type == "relative_key" or embeddings is None:
            return relative_keys(attention, x.dtype)
        keys = None if shared is None else shared.of(self, embeddings)
        keys = attention.linear_pos(embeddings[0]) if keys is None else keys
        return transformer_xl(attention, keys.to(x.dtype))


class FusedBertConformerLayer(FusedConformerLayer):
    """wav2vec2-bert's, whose convolution is causal and followed by a LayerNorm."""

    def _norm(self) -> Any:
        return self.conv_module.depthwise_layer_norm

    def _padding(self) -> Any:
        return self.conv_module.depthwise_conv.kernel_size[0] - 1, 0
