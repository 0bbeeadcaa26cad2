"""Squeezeformer encoders (arXiv 2206.00888): post-norm blocks and a temporal U-Net.

Dimension key: B batch, T frames, C features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.integrations.padding import frames_after, zero_padding
from ssl_models.config import SpeechEncoderConfig
from ssl_models.conformer import ConvolutionModule, RelativeAttention, relative_positions
from ssl_models.transformer import FeedForward


class ChannelScale(nn.Module):
    """A learned scale and shift of each channel, where a pre-norm block has a norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return torch.addcmul(self.bias, x, self.weight)


class SwishConvolutionModule(ConvolutionModule):
    """Pointwise convolution and Swish; depthwise convolution, BatchNorm and Swish; pointwise.

    Without a GLU the depthwise convolution has 2 C channels.
    """

    def __init__(self, config: SpeechEncoderConfig) -> None:
        nn.Module.__init__(self)
        self.layer_norm = None
        self._init_convolutions(config.hidden_size, 2 * config.hidden_size, config, bias=True)
        self.gate = type(self.activation)()

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        return self._convolve(x, frame_lengths)


class SqueezeformerLayer(nn.Module):
    """Attention, feed-forward, convolution module, feed-forward; each y = LN(x + f(scale(x)))."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.self_attn_scale, self.self_attn = ChannelScale(C), RelativeAttention(config)
        self.self_attn_dropout = nn.Dropout(config.dropout)
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.ffn1_scale, self.ffn1 = ChannelScale(C), FeedForward(config)
        self.ffn1_layer_norm = nn.LayerNorm(C)
        self.conv_scale, self.conv_module = ChannelScale(C), SwishConvolutionModule(config)
        self.conv_layer_norm = nn.LayerNorm(C)
        self.ffn2_scale, self.ffn2 = ChannelScale(C), FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(C)

    def forward(
        self,
        x: Tensor,
        frame_lengths: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
    ) -> Tensor:
        """[B, T, C] to [B, T, C], with ``relative_positions`` and valid frames [B]."""
        positions: Any = relative_position_embeddings
        attended = self.self_attn(self.self_attn_scale(x), frame_lengths, positions)
        x = self.self_attn_layer_norm(x + self.self_attn_dropout(attended))
        x = self.ffn1_layer_norm(x + self.ffn1(self.ffn1_scale(x)))
        x = self.conv_layer_norm(x + self.conv_module(self.conv_scale(x), frame_lengths))
        y: Tensor = self.final_layer_norm(x + self.ffn2(self.ffn2_scale(x)))
        return y

    def readers(self) -> tuple[tuple[ChannelScale, tuple[Any, ...]], ...]:
        """Each scale, and the layers that read what it gives."""
        a = self.self_attn
        return (
            (self.self_attn_scale, (a.linear_q, a.linear_k, a.linear_v)),
            (self.ffn1_scale, (self.ffn1.intermediate_dense,)),
            (self.conv_scale, (self.conv_module.pointwise_conv1,)),
            (self.ffn2_scale, (self.ffn2.intermediate_dense,)),
        )


class TimeReduction(nn.Module):
    """A depthwise-separable convolution that leaves every second frame."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        C, taps = config.hidden_size, config.reduce_kernel
        self.depthwise_conv = nn.Conv1d(C, C, taps, stride=2, padding=taps // 2, groups=C)
        self.pointwise_conv = nn.Conv1d(C, C, 1)

    def forward(self, x: Tensor, frame_lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] to [B, ceil(T / 2), C], and its valid frames."""
        x = x.transpose(1, 2)
        if frame_lengths is not None:
            x = zero_padding(x, frame_lengths)
            frame_lengths = frames_after(frame_lengths, self.depthwise_conv)
        return self.pointwise_conv(self.depthwise_conv(x)).transpose(1, 2), frame_lengths


class TimeRecovery(nn.Module):
    """Each frame twice, a linear layer, and what was there at the full rate."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, full_rate: Tensor) -> Tensor:
        """[B, ceil(T / 2), C] and [B, T, C] to [B, T, C]."""
        # the same numbers as of repeated frames, from half as many
        repeated: Tensor = self.projection(x).repeat_interleave(2, 1)
        return full_rate + repeated[:, : full_rate.shape[1]]


class SqueezeformerEncoder(nn.Module):
    """A norm and layers, of which those between ``reduce`` and ``recover`` run at half the rate.

    The paper multiplies its input by sqrt(C), which the norm takes away again.
    """

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        layers = [SqueezeformerLayer(config) for _ in range(config.num_layers)]
        first, last = config.reduce_layer, config.recover_layer
        self.layers = nn.ModuleList(layers[:first])
        self.has_unet = first is not None
        if self.has_unet:
            self.reduce, self.recover = TimeReduction(config), TimeRecovery(config)
            self.reduced_layers = nn.ModuleList(layers[first:last])
            self.recovered_layers = nn.ModuleList(layers[last:])

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None) -> Tensor:
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        x = self.layer_norm(self.dropout(x))
        positions = relative_positions(x)
        full_rate = _run(self.layers, x, frame_lengths, positions)
        if not self.has_unet:
            return full_rate
        x, lengths = self.reduce(full_rate, frame_lengths)
        x = _run(self.reduced_layers, x, lengths, relative_positions(x))
        return _run(self.recovered_layers, self.recover(x, full_rate), frame_lengths, positions)


def _run(layers: nn.ModuleList, x: Tensor, lengths: Tensor | None, positions: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, lengths, relative_position_embeddings=positions)
    return x
