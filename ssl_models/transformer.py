"""Transformer and Sparseformer encoders: a convolution for positions, attention, feed-forward.

Modules have the names that transformers' wav2vec2 gives them, so its weights fit.

Dimension key: B batch, T frames, C features, H heads, D head dimension.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.attention import BucketedBias, Position, block_attention
from lowbit_kernels.attention.position import Scheme, resolve_bias
from lowbit_kernels.integrations.padding import zero_padding
from lowbit_kernels.integrations.wavlm import gates
from lowbit_kernels.modules import QATLinear, QLinear, attend
from lowbit_kernels.norm import norm_activation
from ssl_models.config import SpeechEncoderConfig
from ssl_models.front_end import convolve_activated

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


class SelfAttention(nn.Module):
    """Attention of all frames, of a sliding window or within blocks.

    Args:
        config: a Sparseformer's is local.
    """

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.head_dim, self.dropout = C // config.num_heads, config.attention_dropout
        is_local = config.kind == "sparseformer"
        self.block = config.window_frames if is_local and config.window == "block" else None
        self.window = config.window_frames if is_local and config.window == "sliding" else None
        self.q_proj, self.k_proj = nn.Linear(C, C), nn.Linear(C, C)
        self.v_proj, self.out_proj = nn.Linear(C, C), nn.Linear(C, C)

    def forward(
        self, x: Tensor, frame_lengths: Tensor | None = None, offset_bias: Tensor | None = None
    ) -> Tensor:
        """[B, T, C] to [B, T, C], with the biases [H, 2 T - 1] of a ``GatedAttention``."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attend(q, k, v, lengths=frame_lengths, position=self._position(x, offset_bias))
        y: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return y

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        lengths: Tensor | None,
        position: Position | Scheme | None = None,
    ) -> Tensor:
        """The one call of attention, [B, H, T, D] each."""
        dropout_p = self.dropout if self.training else 0.0
        if self.block is not None:
            assert not isinstance(position, Scheme), "no Sparseformer has one"
            return block_attention(
                q, k, v, block=self.block, lengths=lengths, position=position, dropout_p=dropout_p,
                attention=partial(attend, self),
            )  # fmt: skip
        return attend(
            self, q, k, v,
            lengths=lengths, position=position, window=self.window, dropout_p=dropout_p,
        )  # fmt: skip

    def _position(self, x: Tensor, offset_bias: Tensor | None) -> Scheme | None:
        return None


class GatedAttention(SelfAttention):
    """Attention with a bias of the offset's bucket, which a gate weighs, as in WavLM.

    The encoder has the table, and computes the biases of all offsets for all layers. arXiv
    2110.13900, section 3.1.
    """

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__(config)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, config.num_heads, 1, 1))
        self.gru_rel_pos_linear = nn.Linear(self.head_dim, 8)

    def _position(self, x: Tensor, offset_bias: Tensor | None) -> Scheme:
        assert offset_bias is not None, "the encoder makes them"
        heads = x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        gate = gates(heads, self.gru_rel_pos_linear, self.gru_rel_pos_const)
        return Scheme("offset", offset_bias, gate)


class FeedForward(nn.Module):
    """Two linear layers and an activation, which is in the first one's epilogue if it has one."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.epilogue = config.activation
        self.intermediate_dense = nn.Linear(config.hidden_size, config.feed_forward_size)
        self.intermediate_act_fn = ACTIVATIONS[config.activation]()
        self.intermediate_dropout = nn.Dropout(config.dropout)
        self.output_dense = nn.Linear(config.feed_forward_size, config.hidden_size)
        self.output_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        first = self.intermediate_dense
        if isinstance(first, QLinear | QATLinear):
            x = first(x, epilogue=self.epilogue)
        else:
            x = self.intermediate_act_fn(first(x))
        y: Tensor = self.output_dropout(self.output_dense(self.intermediate_dropout(x)))
        return y


class TransformerLayer(nn.Module):
    """Attention, norm, feed-forward, norm."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        is_gated = config.position_buckets is not None
        self.attention = (GatedAttention if is_gated else SelfAttention)(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(
        self, x: Tensor, frame_lengths: Tensor | None = None, offset_bias: Tensor | None = None
    ) -> Tensor:
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        attended = self.attention(x, frame_lengths, offset_bias)
        x = self.layer_norm(x + self.dropout(attended))
        y: Tensor = self.final_layer_norm(x + self.feed_forward(x))
        return y


class PreNormTransformerLayer(TransformerLayer):
    """Norm, attention, norm, feed-forward."""

    def forward(
        self, x: Tensor, frame_lengths: Tensor | None = None, offset_bias: Tensor | None = None
    ) -> Tensor:
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        x = x + self.dropout(self.attention(self.layer_norm(x), frame_lengths, offset_bias))
        y: Tensor = x + self.feed_forward(self.final_layer_norm(x))
        return y


class ConvPosition(nn.Module):
    """What stands for positions: a grouped convolution with weight norm, and GELU."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        C, kernel = config.hidden_size, config.position_kernel
        conv = nn.Conv1d(C, C, kernel, padding=kernel // 2, groups=config.position_groups)
        self.conv: Any = nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2)
        self.activation = nn.GELU()

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C], zeros beyond each utterance, to [B, T, C]."""
        y = convolve_activated(self.conv, x.transpose(1, 2), "gelu", self.activation)
        # an even kernel gives one frame more
        return y[..., : x.shape[1]].transpose(1, 2)


class PositionLayer(nn.Module):
    """A grouped convolution, a LayerNorm without parameters, and GELU."""

    # the norm's scale and shift
    ones: Tensor
    zeros: Tensor

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        C, kernel = config.hidden_size, config.position_kernel
        self.conv = nn.Conv1d(C, C, kernel, padding=kernel // 2, groups=config.position_groups)
        self.register_buffer("ones", torch.ones(C), persistent=False)
        self.register_buffer("zeros", torch.zeros(C), persistent=False)

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C], zeros beyond each utterance, to the same."""
        y = self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return norm_activation(y, self.ones, self.zeros, activation="gelu", lengths=frame_lengths)


class StackedConvPosition(nn.Module):
    """What stands for positions in data2vec (arXiv 2202.03555): several layers."""

    def __init__(self, config: SpeechEncoderConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PositionLayer(config) for _ in range(num_layers))

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C], zeros beyond each utterance, to the same."""
        for layer in self.layers:
            x = layer(x, frame_lengths)
        return x


class TransformerEncoder(nn.Module):
    """Positions and layers, with one more norm before post-norm layers, or after pre-norm ones."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        count = config.position_layers
        self.pos_conv_embed = (
            ConvPosition(config) if count is None else StackedConvPosition(config, count)
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        kind = PreNormTransformerLayer if config.norm_first else TransformerLayer
        self.layers = nn.ModuleList(kind(config) for _ in range(config.num_layers))
        self.max_distance, buckets = config.position_distance, config.position_buckets
        table = None if buckets is None else nn.Embedding(buckets, config.num_heads)
        self.rel_attn_embed = table

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        if frame_lengths is not None:
            x = zero_padding(x.transpose(1, 2), frame_lengths).transpose(1, 2)
        x = x + self.pos_conv_embed(x, frame_lengths)
        x = self.dropout(x if self.norm_first else self.layer_norm(x))
        options = self._options(x.shape[1])
        for layer in self.layers:
            x = layer(x, frame_lengths, **options)
        return self.layer_norm(x) if self.norm_first else x

    def _options(self, T: int) -> dict[str, Tensor]:
        """What all layers take: the biases [H, 2 T - 1] of all offsets, if there are any."""
        if self.rel_attn_embed is None:
            return {}
        position = BucketedBias(self.rel_attn_embed.weight, self.max_distance)
        return {"offset_bias": resolve_bias(position, T - 1)}
