"""Transformer and Sparseformer encoders: a convolution for positions, attention, feed-forward.

Modules have the names that transformers' wav2vec2 gives them, so its weights fit.

Dimension key: B batch, T frames, C features, H heads, D head dimension.
"""

from typing import Any

from torch import Tensor, nn

from lowbit_kernels.attention import Position, block_attention
from lowbit_kernels.integrations.padding import zero_padding
from lowbit_kernels.modules import QATLinear, QLinear, attend
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

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attend(q, k, v, lengths=frame_lengths)
        y: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return y

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        lengths: Tensor | None,
        position: Position | None = None,
    ) -> Tensor:
        """The one call of attention, [B, H, T, D] each."""
        dropout_p = self.dropout if self.training else 0.0
        if self.block is not None:
            return block_attention(
                q, k, v, block=self.block, lengths=lengths, position=position, dropout_p=dropout_p
            )
        return attend(
            self, q, k, v,
            lengths=lengths, position=position, window=self.window, dropout_p=dropout_p,
        )  # fmt: skip


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
        self.attention = SelfAttention(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        x = self.layer_norm(x + self.dropout(self.attention(x, frame_lengths)))
        y: Tensor = self.final_layer_norm(x + self.feed_forward(x))
        return y


class PreNormTransformerLayer(TransformerLayer):
    """Norm, attention, norm, feed-forward."""

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        x = x + self.dropout(self.attention(self.layer_norm(x), frame_lengths))
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

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C], zeros beyond each utterance, to [B, T, C]."""
        y = convolve_activated(self.conv, x.transpose(1, 2), "gelu", self.activation)
        # an even kernel gives one frame more
        return y[..., : x.shape[1]].transpose(1, 2)


class TransformerEncoder(nn.Module):
    """Positions and layers, with one more norm before post-norm layers, or after pre-norm ones."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.pos_conv_embed = ConvPosition(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        kind = PreNormTransformerLayer if config.norm_first else TransformerLayer
        self.layers = nn.ModuleList(kind(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        if frame_lengths is not None:
            x = zero_padding(x.transpose(1, 2), frame_lengths).transpose(1, 2)
        x = x + self.pos_conv_embed(x)
        x = self.dropout(x if self.norm_first else self.layer_norm(x))
        for layer in self.layers:
            x = layer(x, frame_lengths)
        return self.layer_norm(x) if self.norm_first else x
