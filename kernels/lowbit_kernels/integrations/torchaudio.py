"""Modules of torchaudio's Wav2Vec2Model, known by the names of their classes and children.

Dimension key: B batch, C channels, T frames, E embedding, H heads, D = E / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_kernels.attention import BucketedBias, flash_attention
from lowbit_kernels.integrations.class_swap import Swapped
from lowbit_kernels.integrations.multihead import LinearMultiheadAttention
from lowbit_kernels.integrations.padding import zero_padding
from lowbit_kernels.integrations.wavlm import gates
from lowbit_kernels.norm import masked_group_norm


class MaskedConvLayerBlock(Swapped):
    """A convolution of the front end; its GroupNorm sees valid frames only."""

    def forward(self, x: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, C_in, T_in] and valid frames [B] to [B, C, T] and valid frames [B]."""
        if length is None:
            return super().forward(x, None)  # type: ignore[no-any-return]
        spec = getattr(self.conv, "spec", None)
        if spec is not None and spec.inputs is not None:
            x = zero_padding(x, length)  # an input scale is one an utterance
        frames = torch.div(length - self.kernel_size, self.stride, rounding_mode="floor") + 1
        frames = frames.clamp(min=0)
        x, norm = self.conv(x), self.layer_norm
        if isinstance(norm, nn.GroupNorm):
            x = masked_group_norm(
                x, norm.weight, norm.bias,
                lengths=frames, num_groups=norm.num_groups, eps=norm.eps, activation="gelu",
            )  # fmt: skip
            return x, frames
        return F.gelu(x if norm is None else norm(x)), frames


class FusedWavLMSelfAttention(Swapped):
    """WavLM's attention, calling layers where it reads the weights of nn.MultiheadAttention."""

    def forward(
        self,
        query: Tensor,
        key_padding_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over [B, T, E].

        Args:
            query: [B, T, E].
            key_padding_mask: [B, T], true for padding, which comes last.
            attention_mask: must be None, as in torchaudio.
            position_bias: [buckets, H], what the layer before returned.

        Returns:
            [B, T, E], and the table of biases for the next layer.

        Raises:
            ValueError: if ``attention_mask`` is given.
        """
        if attention_mask is not None:
            raise ValueError("attention_mask must be None in WavLM; use key_padding_mask")
        if self.rel_attn_embed is not None and position_bias is None:
            position_bias = self.rel_attn_embed.weight
        heads, q, k, v = (
            x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for x in (query, *self.attention.in_proj(query).chunk(3, -1))
        )
        bias = None
        if position_bias is not None:
            gate = None
            if self.gru_rel_pos:
                gate = gates(heads, self.gru_rel_pos_linear, self.gru_rel_pos_const)
            bias = BucketedBias(position_bias, self.max_distance, gate)
        lengths = None if key_padding_mask is None else (~key_padding_mask.bool()).sum(-1)
        dropout = self.dropout if self.training else 0.0
        out = flash_attention(q, k, v, lengths=lengths, position=bias, dropout_p=dropout)
        return self.attention.out_proj(out.transpose(1, 2).flatten(2)), position_bias


def matches_conv_layer_block(module: nn.Module) -> bool:
    """Whether a module is a convolution of torchaudio's front end."""
    return (
        type(module).__name__ == "ConvLayerBlock"
        and isinstance(getattr(module, "conv", None), nn.Conv1d)
        and hasattr(module, "layer_norm")
        and isinstance(getattr(module, "kernel_size", None), int)
        and isinstance(getattr(module, "stride", None), int)
    )


def matches_wavlm_self_attention(module: nn.Module) -> bool:
    """Whether a module is torchaudio's WavLM attention with its weights made layers."""
    return type(module).__name__ == "WavLMSelfAttention" and isinstance(
        getattr(module, "attention", None), LinearMultiheadAttention
    )
