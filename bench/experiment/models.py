"""The eight models of the experiment, matched in the weights that are quantized.

All have 80 log mel energies, a convolution of kernel 3 and stride 2, an encoder at 50 frames a
second, and 11 tokens: ten digits and CTC's blank. Positions of a Transformer are a depthwise
convolution in front of it, small enough not to matter in storage.

Dimension key: B utterances, S samples, T frames, C features, V tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ssl_models.config import SpeechEncoderConfig
from ssl_models.conformer import ConformerLayer, ConvolutionModule, RelativeAttention
from ssl_models.encoder import SpeechEncoder, initialize

TOKENS = 11
BLANK = 10

_COMMON: dict[str, Any] = {
    "front_end": "fbank", "conv_dims": (128,), "conv_kernels": (3,), "conv_strides": (2,),
    "conv_norm": "layer", "hidden_size": 128, "num_heads": 4, "position_kernel": 31,
    "depthwise_kernel": 31, "window_frames": 16, "norm_first": True, "dropout": 0.05,
    "attention_dropout": 0.05,
}  # fmt: skip


def _transformer(size: int, layers: int, kind: str = "transformer") -> SpeechEncoderConfig:
    shape = {"hidden_size": size, "position_groups": size, "feed_forward_size": 4 * size}
    return SpeechEncoderConfig(**{**_COMMON, **shape}, kind=kind, num_layers=layers)


def _macaron(feed_forward_size: int, kind: str = "conformer", **more: Any) -> SpeechEncoderConfig:
    return SpeechEncoderConfig(
        **_COMMON, kind=kind, num_layers=4, feed_forward_size=feed_forward_size, activation="silu",
        **more,
    )  # fmt: skip


# by their names in the protocol
CONFIGS = {
    "T": _transformer(128, 8),
    "T-win": _transformer(128, 8, "sparseformer"),
    # deep and narrow, shallow and wide
    "DN": _transformer(96, 14, "sparseformer"),
    "SW": _transformer(208, 3, "sparseformer"),
    "AC": _macaron(512),
    "Squeezeformer": _macaron(448, "squeezeformer", reduce_layer=1, recover_layer=3),
    # controls: attention in both places of a Conformer, convolution in both
    "AA": _macaron(448),
    "CC": _macaron(576),
}
# what is quantized in subsets, by the names of branches in a layer
SLOTS = {
    "AC": {"X": ("self_attn",), "Y": ("conv_module",), "F": ("ffn1", "ffn2")},
    "AA": {"X": ("self_attn",), "Y": ("second_attn",), "F": ("ffn1", "ffn2")},
    "CC": {"X": ("first_conv_module",), "Y": ("conv_module",), "F": ("ffn1", "ffn2")},
}
# the last layers of residual branches
_OUTPUTS = ("out_proj", "linear_out", "output_dense", "pointwise_conv2")


class TwoAttentionLayer(ConformerLayer):
    """A Conformer's layer with attention where the convolution module was."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__(config)
        del self.conv_module
        self.second_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.second_attn = RelativeAttention(config)

    def forward(
        self,
        x: Tensor,
        frame_lengths: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
    ) -> Tensor:
        """[B, T, C] to [B, T, C], with ``relative_positions`` and valid frames [B]."""
        positions: Any = relative_position_embeddings
        x = x + 0.5 * self.ffn1(self.ffn1_layer_norm(x))
        for norm, attend in (
            (self.self_attn_layer_norm, self.self_attn),
            (self.second_attn_layer_norm, self.second_attn),
        ):
            x = x + self.self_attn_dropout(attend(norm(x), frame_lengths, positions))
        x = x + 0.5 * self.ffn2(self.ffn2_layer_norm(x))
        y: Tensor = self.final_layer_norm(x)
        return y


class TwoConvolutionLayer(ConformerLayer):
    """A Conformer's layer with a convolution module where attention was."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__(config)
        del self.self_attn, self.self_attn_layer_norm, self.self_attn_dropout
        self.first_conv_module = ConvolutionModule(config)

    def forward(
        self,
        x: Tensor,
        frame_lengths: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
    ) -> Tensor:
        """[B, T, C] to [B, T, C], with valid frames [B]; positions are not used."""
        x = x + 0.5 * self.ffn1(self.ffn1_layer_norm(x))
        x = x + self.first_conv_module(x, frame_lengths)
        x = x + self.conv_module(x, frame_lengths)
        x = x + 0.5 * self.ffn2(self.ffn2_layer_norm(x))
        y: Tensor = self.final_layer_norm(x)
        return y


_LAYERS = {"AA": TwoAttentionLayer, "CC": TwoConvolutionLayer}


class DigitReader(nn.Module):
    """An encoder and a linear layer to tokens.

    Args:
        name: of a model of the experiment.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in CONFIGS:
            raise ValueError(f"name must be one of {tuple(CONFIGS)}, got {name!r}")
        config = CONFIGS[name]
        self.name, self.speech = name, SpeechEncoder(config)
        if name in _LAYERS:
            layers = [_LAYERS[name](config) for _ in range(config.num_layers)]
            self.speech.encoder.layers = nn.ModuleList(layers).apply(initialize)
        self.classifier = nn.Linear(config.hidden_size, TOKENS)
        # a deviation of 0.02 is meant for wider layers: here it would take hundreds of steps more
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        # without it the models of much attention do not begin to read within 800 steps
        _shrink([m for name, m in self.named_modules() if name.endswith(_OUTPUTS)])

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Waveforms [B, S] and valid samples [B] to logits [B, T, V] and valid frames [B]."""
        frames, frame_lengths = self.speech(waveforms, lengths)
        return self.classifier(frames), frame_lengths


@torch.no_grad()
def _shrink(outputs: list[Any]) -> None:
    """Divide what branches add at first by the root of their number (GPT-2, section 2.3)."""
    for layer in outputs:
        layer.weight /= len(outputs) ** 0.5


def greedy(logits: Tensor) -> tuple[int, ...]:
    """The digits that logits [T, V] read: the best tokens, repeats merged, blanks left out."""
    best = torch.unique_consecutive(logits.argmax(-1))
    return tuple(best[best != BLANK].tolist())
