"""Convolutional front ends: waveforms to features, of valid frames what they are alone.

Dimension key: B batch, S samples, T frames, C channels.
"""

from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from lowbit_kernels.conv1d.front_end import describe_layers, flatten_layers, front_end, serves
from lowbit_kernels.integrations.front_end_layers import front_end_layers, needs_gradient
from lowbit_kernels.integrations.padding import fill_padding, frames_after, zero_padding
from lowbit_kernels.modules import QATConv1d, QConv1d
from lowbit_kernels.norm import masked_group_norm, norm_activation
from ssl_models.config import SpeechEncoderConfig


class ConvLayer(nn.Module):
    """A convolution, perhaps a norm, and GELU.

    Args:
        shape: channels before and after, kernel size and stride.
        bias: of the convolution.
        norm: ``"group"``, one channel a group; ``"layer"``; or None.
    """

    def __init__(self, shape: tuple[int, int, int, int], bias: bool, norm: str | None) -> None:
        super().__init__()
        channels, dim, kernel, stride = shape
        self.conv = nn.Conv1d(channels, dim, kernel, stride, bias=bias)
        self.layer_norm: Any = None
        if norm is not None:
            self.layer_norm = nn.GroupNorm(dim, dim) if norm == "group" else nn.LayerNorm(dim)
        self.activation = nn.GELU()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, C_in, T_in] to [B, C, T]; ``lengths`` [B] counts valid frames of the result."""
        norm = self.layer_norm
        if isinstance(norm, nn.GroupNorm):
            return masked_group_norm(
                self.conv(x), norm.weight, norm.bias,
                lengths=lengths, num_groups=norm.num_groups, eps=norm.eps, activation="gelu",
            )  # fmt: skip
        if norm is None:
            return convolve_activated(self.conv, x, "gelu", self.activation)
        frames = self.conv(x).transpose(1, 2)
        y = norm_activation(frames, norm.weight, norm.bias, activation="gelu", eps=norm.eps)
        return y.transpose(1, 2)


class ConvFrontEnd(nn.Module):
    """The stack of convolutions; one call in inference once they are quantized."""

    # channels of what it takes
    in_channels = 1
    # of that call, as ``describe_layers`` gives it; None: the layers run one by one
    _layout: str | None = None

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        layers: list[ConvLayer] = []
        channels = self.in_channels
        for dim, kernel, stride in config.conv_layers:
            norm = config.conv_norm if config.conv_norm == "layer" or not layers else None
            layers.append(ConvLayer((channels, dim, kernel, stride), config.conv_bias, norm))
            channels = dim
        self.channels, self.conv_layers = channels, nn.ModuleList(layers)

    def forward(self, waveform: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Waveforms [B, S] and valid samples [B] to features [B, T, C] and valid frames [B]."""
        first: Any = self.conv_layers[0]
        fuses = self._layout is not None and not needs_gradient(self.conv_layers, waveform)
        if fuses and serves(waveform, first.conv.weight):
            tensors = flatten_layers(front_end_layers(self.conv_layers) or [])
            x = front_end(waveform, lengths, tensors, self._layout or "")
            return x, self.frames(lengths)
        return self.convolve(waveform[:, None], lengths)

    def convolve(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, C_in, T_in] and valid frames [B] to [B, T, C] and valid frames [B]."""
        for layer, following in zip_longest(self.conv_layers, self.conv_layers[1:]):
            lengths = None if lengths is None else _frames(lengths, layer)
            x = layer(x, lengths)
            # an input scale is one an utterance: padding must not raise it
            if lengths is not None and following is not None:
                x = _quiet_padding(x, lengths, following.conv)
        return x.transpose(1, 2), lengths

    def frames(self, lengths: Tensor | None) -> Tensor | None:
        """Valid frames [B] of valid samples [B]."""
        for layer in self.conv_layers:
            lengths = None if lengths is None else _frames(lengths, layer)
        return lengths

    @property
    def min_samples(self) -> int:
        """What one frame sees."""
        samples = 1
        for layer in self.conv_layers[::-1]:
            conv: Any = layer.conv
            samples = (samples - 1) * conv.stride[0] + conv.kernel_size[0]
        return samples

    def find_layout(self) -> None:
        """Look whether one call serves the layers as they are now."""
        layers = front_end_layers(self.conv_layers)
        self._layout = None if layers is None else describe_layers(layers)


class FeatureProjection(nn.Module):
    """LayerNorm and a linear layer to the encoder's width."""

    def __init__(self, channels: int, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(channels)
        self.projection = nn.Linear(channels, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C_in] to [B, T, C]."""
        y: Tensor = self.dropout(self.projection(self.layer_norm(x)))
        return y


def convolve_activated(conv: nn.Module, x: Tensor, epilogue: str, activation: nn.Module) -> Tensor:
    """A convolution and its activation, in one op where the convolution is this library's."""
    if isinstance(conv, QConv1d | QATConv1d):
        return conv(x, epilogue=epilogue)  # type: ignore[no-any-return]
    return activation(conv(x))  # type: ignore[no-any-return]


def _frames(lengths: Tensor, layer: Any) -> Tensor:
    return frames_after(lengths, layer.conv).clamp(min=0)


def _quiet_padding(x: Tensor, lengths: Tensor, conv: Any) -> Tensor:
    """x [B, C, T] with padding that a convolution rounds to zero, if it rounds its input."""
    if getattr(conv, "input_offset", None) is not None:
        return fill_padding(x, lengths, conv.input_offset)
    spec = getattr(conv, "spec", None)
    return x if spec is None or spec.inputs is None else zero_padding(x, lengths)
