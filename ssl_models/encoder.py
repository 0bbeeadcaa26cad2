"""SpeechEncoder: waveforms to frames.

Dimension key: B batch, S samples, T frames, C features.
"""

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor, nn

from lowbit_kernels.checks import check_lengths
from lowbit_kernels.integrations import rebuild
from ssl_models import fused as fused  # what quantize does to these layers registers itself
from ssl_models.config import SpeechEncoderConfig
from ssl_models.conformer import ConformerEncoder
from ssl_models.fbank import FbankConvFrontEnd, FbankFrontEnd
from ssl_models.front_end import ConvFrontEnd, FeatureProjection
from ssl_models.module_kinds import quantize_kinds
from ssl_models.presets import preset
from ssl_models.squeezeformer import SqueezeformerEncoder
from ssl_models.transformer import TransformerEncoder

_ENCODERS = {
    "transformer": TransformerEncoder,
    "sparseformer": TransformerEncoder,
    "conformer": ConformerEncoder,
    "squeezeformer": SqueezeformerEncoder,
}


class SpeechEncoder(nn.Module):
    """A front end and an encoder; ``lowbit_kernels.quantize`` and its kin serve it.

    >>> encoder = SpeechEncoder.from_preset("squeezeformer-xs").eval()
    >>> waveforms, lengths = torch.randn(2, 16000), torch.tensor([16000, 9000])
    >>> with torch.inference_mode():
    ...     frames, frame_lengths = encoder(waveforms, lengths)  # [2, 49, 144], [49, 27]

    A padded utterance has the frames that it has alone, in training, too: statistics of norms run
    over valid frames. No tensor grows with the square of the frames on a GPU.

    Args:
        config: dimensions, and which layers are in low bits.
    """

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.config = config
        front_end = _front_end(config)
        self.feature_extractor = front_end
        self.feature_projection = FeatureProjection(front_end.channels, config)
        self.encoder = _ENCODERS[config.kind](config)
        self.apply(initialize)
        quantize_kinds(self, config.quantization)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """An encoder with random weights and the dimensions of a preset, some of them changed.

        Raises:
            ValueError: for an unknown name, or as ``SpeechEncoderConfig``.
        """
        return cls(preset(name, **changes))

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode waveforms.

        Args:
            waveforms: [B, S], any finite numbers beyond the lengths.
            lengths: [B] int32 or int64, the valid samples. None: all.

        Returns:
            [B, T, C], and the valid frames [B], or None. Frames beyond mean nothing.

        Raises:
            ValueError: on a wrong shape or dtype, or fewer samples than one frame takes.
        """
        if waveforms.dim() != 2 or not waveforms.is_floating_point():
            raise ValueError(
                "waveforms must be floating point [B, S], "
                f"got {waveforms.dtype} {list(waveforms.shape)}"
            )
        least = self.feature_extractor.min_samples
        if waveforms.shape[1] < least:
            raise ValueError(
                f"waveforms must have at least {least} samples, one frame, got {waveforms.shape[1]}"
            )
        check_lengths(lengths, waveforms)
        x, frame_lengths = self.feature_extractor(waveforms, lengths)
        frames: Tensor = self.encoder(self.feature_projection(x), frame_lengths)
        return frames, frame_lengths


def _front_end(config: SpeechEncoderConfig) -> FbankFrontEnd | ConvFrontEnd:
    if config.front_end != "fbank":
        return ConvFrontEnd(config)
    return FbankConvFrontEnd(config) if config.conv_layers else FbankFrontEnd()


def _rebuild(text: str) -> SpeechEncoder:
    """A float encoder, whose layers the checkpoint replaces."""
    config = SpeechEncoderConfig.from_json(text)
    encoder = SpeechEncoder(dataclasses.replace(config, quantization={}))
    encoder.config = config
    return encoder


rebuild.register("ssl_models", SpeechEncoder, lambda encoder: encoder.config.to_json(), _rebuild)


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """As wav2vec 2.0: linear layers normal with deviation 0.02, convolutions as He et al."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv1d) and not nn.utils.parametrize.is_parametrized(module):
        nn.init.kaiming_normal_(module.weight)
