"""WavLM's attention, which reads its layers' raw weights, made to call the layers.

Dimension key: B batch, H heads, T frames, D head dimension, C = H * D.
"""

from torch import Tensor

from lowbit_kernels.attention import DenseBias, flash_attention
from lowbit_kernels.integrations.class_swap import Swapped


class FusedWavLMAttention(Swapped):
    """WavLM's attention with the gated relative bias added inside a fused kernel.

    Attention weights are not returned: ``output_attentions=True`` gives ``None`` for each layer.
    """

    def torch_multi_head_self_attention(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        gated_position_bias: Tensor,
        output_attentions: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend over [B, T, C].

        Args:
            hidden_states: [B, T, C].
            attention_mask: [B, T], true or 1 for valid frames, which come first.
            gated_position_bias: [B * H, T, T].
            output_attentions: without effect.

        Returns:
            [B, T, C], and None in place of the attention weights.
        """
        q, k, v = (
            self._heads(proj(hidden_states)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        B, _, T, _ = q.shape
        lengths = None if attention_mask is None else attention_mask.ne(0).sum(-1)
        bias = DenseBias(gated_position_bias.view(B, self.num_heads, T, T))
        dropout = self.dropout if self.training else 0.0
        out = flash_attention(q, k, v, lengths=lengths, position=bias, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).reshape(hidden_states.shape)), None

    def _heads(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        return x.view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2)
