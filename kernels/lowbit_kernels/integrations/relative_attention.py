"""Conformers' attention with relative positions that are computed inside a fused kernel.

With ``attn_implementation="lowbit"``; any other makes scores [B, H, T, T], or twice as many.

Dimension key: B batch, H heads, T frames, D head dimension, C = H * D.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.attention import Position, RelativeKey, TransformerXL
from lowbit_kernels.integrations.chosen_attention import attend, chosen
from lowbit_kernels.integrations.class_swap import Swapped


class FusedRelativeAttention(Swapped):
    """The attention of wav2vec2-conformer and wav2vec2-bert."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] to [B, T, C], and the attention weights or None."""
        known = self.position_embeddings_type == "relative_key" or (
            self.position_embeddings_type == "relative" and relative_position_embeddings is not None
        )
        if not known or not _is_fused(self, attention_mask):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, attention_mask, relative_position_embeddings, **kwargs
            )
        q, k, v = (
            proj(hidden_states).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for proj in (self.linear_q, self.linear_k, self.linear_v)
        )
        position: Position
        if relative_position_embeddings is None or self.position_embeddings_type != "relative":
            position = relative_keys(self, q.dtype)
        else:
            keys = self.linear_pos(relative_position_embeddings[0]).to(q.dtype)
            position = transformer_xl(self, keys)
        out = attend(
            self, q, k, v, lengths=_lengths(attention_mask), position=position, scale=self.scaling,
            dropout_p=self.dropout.p if self.training else 0.0,
        )  # fmt: skip
        return self.linear_out(out.transpose(1, 2).flatten(2)), None


def relative_keys(attention: Any, dtype: torch.dtype) -> RelativeKey:
    """The position scheme of w2v-BERT."""
    table = attention.distance_embedding.weight.to(dtype)
    return RelativeKey(table, attention.left_max_position_embeddings)


def transformer_xl(attention: Any, keys: Tensor) -> TransformerXL:
    """That of wav2vec2-conformer, from the projected positions [2 T - 1, C]."""
    keys = keys.view(keys.shape[0], -1, attention.head_size).transpose(0, 1)
    return TransformerXL(keys, attention.pos_bias_u, attention.pos_bias_v)


class FusedParakeetAttention(Swapped):
    """The attention of parakeet."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor | None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] to [B, T, C], and the attention weights or None."""
        known = position_embeddings is not None and self.num_key_value_groups == 1
        if not known or position_embeddings is None or not _is_fused(self, attention_mask):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, position_embeddings, attention_mask, **kwargs
            )
        q, k, v = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # the same for every utterance
        keys = self.relative_k_proj(position_embeddings[0]).to(q.dtype)
        keys = keys.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        out = attend(
            self, q, k, v, lengths=_lengths(attention_mask), scale=self.scaling,
            position=TransformerXL(keys, self.bias_u, self.bias_v),
            dropout_p=self.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def _is_fused(module: Any, mask: Tensor | None) -> bool:
    """Whether the model asks for this library's attention, with a mask of padding alone."""
    return chosen(module) is not None and (mask is None or not mask.is_floating_point())


def _lengths(mask: Tensor | None) -> Tensor | None:
    """Valid frames [B] of a mask [B, T], or of [B, 1, T, T] that has the valid of both."""
    # loaded already, where a model has this implementation; transformers need not be there
    from lowbit_kernels.integrations.huggingface_attention import lengths_of

    if mask is not None and mask.dim() == 4:
        mask = mask[:, 0].diagonal(dim1=1, dim2=2)
    return None if mask is None else lengths_of(mask.bool())
