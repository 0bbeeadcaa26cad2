"""WavLM's layers in a handful of ops; see ``encoder_layers.py``.

Dimension key: B batch, T frames, C features, H heads.
"""

from typing import Any

from torch import Tensor, nn

from lowbit_kernels.attention.gate_op import position_gate
from lowbit_kernels.attention.position import BucketedBias, Scheme, resolve_bias
from lowbit_kernels.integrations.encoder_layers import (
    FusedLayer,
    Parts,
    PostNormLayer,
    PreNormLayer,
    has_hooks,
)
from lowbit_kernels.integrations.wavlm import SharedBias


class _WavLMLayer(FusedLayer):
    """A gate of the layer's own input, and a bias that the first layer computes for all."""

    _is_gated = True

    def _uses_our_attention(self, attention: Any) -> bool:
        return True

    def _fits(self, **_: Any) -> bool:
        linear = self.attention.gru_rel_pos_linear
        return type(linear) is nn.Linear and not has_hooks(linear)

    def _lengths(self, mask: Tensor | None, position_bias: Any = None, **_: Any) -> Tensor | None:
        if isinstance(position_bias, SharedBias):
            return position_bias.lengths
        return super()._lengths(mask)

    def _fused(self, x: Tensor, lengths: Tensor | None, parts: Parts, **kwargs: Any) -> Any:
        shared, attention = kwargs.get("position_bias"), self.attention
        if not isinstance(shared, SharedBias):
            table = attention.rel_attn_embed.weight if shared is None else shared
            bias = resolve_bias(BucketedBias(table, attention.max_distance), x.shape[1] - 1)
            shared = SharedBias(table, bias, lengths)
        kwargs["position_bias"] = shared
        return super()._fused(x, lengths, parts, **kwargs), shared

    def _as_tuple(self, y: Any) -> tuple[Any, ...]:
        return tuple(y)

    def _position(self, x: Tensor, **kwargs: Any) -> Scheme:
        attention = self.attention
        linear = attention.gru_rel_pos_linear
        gate = position_gate(x, linear.weight, linear.bias, attention.gru_rel_pos_const)
        return Scheme("offset", kwargs["position_bias"].bias, gate)


class FusedWavLMLayer(_WavLMLayer, PostNormLayer):
    """WavLM-base's: 8 launches, with int8 inputs 10."""


class FusedWavLMStableLayer(_WavLMLayer, PreNormLayer):
    """WavLM-large's, whose gate reads the normalized input: as many, with 16-bit inputs 7."""
