"""Conformer encoders (arXiv 2005.08100) with Transformer-XL's relative positions.

Modules have the names that transformers' wav2vec2-conformer gives them, so its weights fit.

Dimension key: B batch, T frames, C features, H heads, D head dimension, N channels of a depthwise
convolution.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.attention import Position
from lowbit_kernels.integrations.conformer import convolve_module, fuses_module
from lowbit_kernels.integrations.padding import zero_padding
from lowbit_kernels.integrations.relative_attention import transformer_xl
from lowbit_kernels.modules import attend
from lowbit_kernels.modules.batch_norm import normalize_frames
from ssl_models.config import SpeechEncoderConfig
from ssl_models.transformer import ACTIVATIONS, FeedForward


class RelativeAttention(nn.Module):
    """Attention with Transformer-XL's relative positions (arXiv 1901.02860, section 3.3)."""

    # what transformers calls this scheme
    position_embeddings_type = "relative"

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        C, H = config.hidden_size, config.num_heads
        self.head_size, self.dropout = C // H, config.attention_dropout
        self.linear_q, self.linear_k = nn.Linear(C, C), nn.Linear(C, C)
        self.linear_v, self.linear_out = nn.Linear(C, C), nn.Linear(C, C)
        self.linear_pos = nn.Linear(C, C, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(H, C // H))
        self.pos_bias_v = nn.Parameter(torch.zeros(H, C // H))

    def forward(self, x: Tensor, frame_lengths: Tensor | None, positions: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C], with ``relative_positions`` [1, 2 T - 1, C]."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for project in (self.linear_q, self.linear_k, self.linear_v)
        )
        position = transformer_xl(self, self.linear_pos(positions[0]).to(q.dtype))
        out = self.attend(q, k, v, lengths=frame_lengths, position=position)
        y: Tensor = self.linear_out(out.transpose(1, 2).flatten(2))
        return y

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None, position: Position
    ) -> Tensor:
        """The one call of attention, [B, H, T, D] each."""
        dropout_p = self.dropout if self.training else 0.0
        return attend(self, q, k, v, lengths=lengths, position=position, dropout_p=dropout_p)


class ConvolutionModule(nn.Module):
    """Norm, pointwise convolution and GLU; depthwise convolution, BatchNorm and activation;
    pointwise convolution. Three ops in inference once they are quantized.
    """

    layer_norm: nn.LayerNorm | None

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.layer_norm = nn.LayerNorm(C)
        self._init_convolutions(C, C, config, bias=False)
        self.gate: nn.Module = nn.GLU(dim=1)

    def _init_convolutions(self, C: int, N: int, config: SpeechEncoderConfig, bias: bool) -> None:
        taps = config.depthwise_kernel
        self.pointwise_conv1 = nn.Conv1d(C, 2 * C, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(N, N, taps, padding=taps // 2, groups=N, bias=bias)
        self.batch_norm = nn.BatchNorm1d(N)
        self.activation = ACTIVATIONS[config.activation]()
        self.epilogue = config.activation
        self.pointwise_conv2 = nn.Conv1d(N, C, 1, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        if fuses_module(self, self.batch_norm):
            return convolve_module(self, x, self.batch_norm, frame_lengths, self.layer_norm)
        return self._convolve(x if self.layer_norm is None else self.layer_norm(x), frame_lengths)

    def _convolve(self, x: Tensor, frame_lengths: Tensor | None) -> Tensor:
        norm, y = self.batch_norm, self.gate(self.pointwise_conv1(x.transpose(1, 2)))
        if frame_lengths is not None:
            y = zero_padding(y, frame_lengths)
        y = self.depthwise_conv(y)
        if norm.training:
            y = normalize_frames(norm, y, frame_lengths, self.epilogue)
        else:
            y = self.activation(norm(y))
        out: Tensor = self.dropout(self.pointwise_conv2(y))
        return out.transpose(1, 2)


class ConformerLayer(nn.Module):
    """Half a feed-forward block, attention, convolution module, another half, norm."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.ffn1_layer_norm, self.ffn1 = nn.LayerNorm(C), FeedForward(config)
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.self_attn_dropout = nn.Dropout(config.dropout)
        self.self_attn = RelativeAttention(config)
        self.conv_module = ConvolutionModule(config)
        self.ffn2_layer_norm, self.ffn2 = nn.LayerNorm(C), FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(C)

    def forward(
        self,
        x: Tensor,
        frame_lengths: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
    ) -> Tensor:
        """[B, T, C] to [B, T, C], with ``relative_positions`` and valid frames [B]."""
        positions: Any = relative_position_embeddings
        x = x + 0.5 * self.ffn1(self.ffn1_layer_norm(x))
        attended = self.self_attn(self.self_attn_layer_norm(x), frame_lengths, positions)
        x = x + self.self_attn_dropout(attended)
        x = x + self.conv_module(x, frame_lengths)
        x = x + 0.5 * self.ffn2(self.ffn2_layer_norm(x))
        y: Tensor = self.final_layer_norm(x)
        return y


class ConformerEncoder(nn.Module):
    """Layers and a norm."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        positions, x = relative_positions(x), self.dropout(x)
        for layer in self.layers:
            x = layer(x, frame_lengths, relative_position_embeddings=positions)
        y: Tensor = self.layer_norm(x)
        return y


def relative_positions(x: Tensor) -> Tensor:
    """Sinusoids [1, 2 T - 1, C] of the offsets between frames of x [B, T, C].

    That of a key T - 1 frames to the left comes first; sines in even features.
    """
    T, C = x.shape[1:]
    wide = torch.promote_types(x.dtype, torch.float32)
    distances = torch.arange(T - 1, -T, -1, device=x.device, dtype=wide)
    features = torch.arange(0, C, 2, device=x.device, dtype=wide)
    angles = distances[:, None] * torch.exp(features * (-math.log(10000.0) / C))
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[None].to(x.dtype)
