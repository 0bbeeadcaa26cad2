"""WavLM's attention, which reads its layers' raw weights, made to call the layers.

Dimension key: B batch, H heads, T frames, D head dimension, C = H * D.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from lowbit_kernels.attention import BucketedBias
from lowbit_kernels.integrations.chosen_attention import attend
from lowbit_kernels.integrations.class_swap import Swapped


class SharedBias(NamedTuple):
    """What the first fused layer hands on: its table, the biases of all offsets, the lengths."""

    table: Tensor
    bias: Tensor
    lengths: Tensor | None


class FusedWavLMAttention(Swapped):
    """WavLM's attention with the gated relative bias computed inside a fused kernel.

    The first layer hands its table of biases on, where the original hands on scores [B * H, T, T].
    Attention weights are not returned: ``output_attentions=True`` gives ``None`` for each layer.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | SharedBias | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Tensor]:
        """Attend over [B, T, C].

        Args:
            hidden_states: [B, T, C].
            attention_mask: [B, T], true or 1 for valid frames, which come first.
            position_bias: [buckets, H], what the layer before returned.
            *args: without effect: whether to return attention weights, the layer's number.
            **kwargs: without effect: the same.

        Returns:
            [B, T, C], None in place of the attention weights, and the table of biases.
        """
        if isinstance(position_bias, SharedBias):
            position_bias = position_bias.table
        table = self.rel_attn_embed.weight if position_bias is None else position_bias
        heads, q, k, v = (
            x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for x in (
                hidden_states,
                *(proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)),
            )
        )
        gate = gates(heads, self.gru_rel_pos_linear, self.gru_rel_pos_const)
        lengths = None if attention_mask is None else attention_mask.ne(0).sum(-1)
        out = attend(
            self, q, k, v, lengths=lengths, position=BucketedBias(table, self.max_distance, gate),
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.out_proj(out.transpose(1, 2).flatten(2)), None, table


def gates(heads: Tensor, linear: nn.Module, const: Tensor) -> Tensor:
    """What multiplies the position bias of each query: [B, H, T] of the inputs [B, H, T, D].

    Args:
        heads: [B, H, T, D].
        linear: D to 8 features, which are summed in two groups of 4.
        const: [1, H, 1, 1].
    """
    update, reset = linear(heads).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)
    gate: Tensor = update * (reset * const.squeeze(-1) - 1) + 2
    return gate
