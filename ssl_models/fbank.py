"""Log mel energies as a front end, in plain PyTorch.

Dimension key: B batch, S samples, T frames, M mel bins, F frequencies.
"""

import math

import torch
from torch import Tensor, nn

from ssl_models.front_end import ConvFrontEnd

SAMPLE_RATE = 16_000
# of a window, of the step to the next, and of the Fourier transform
WINDOW, HOP, FFT = 400, 160, 512
MEL_BINS, LOWEST, HIGHEST = 80, 20.0, 8000.0
PREEMPHASIS = 0.97
# two windows make a frame, 50 a second, as in w2v-BERT 2.0
STACKED = 2


class FbankFrontEnd(nn.Module):
    """Kaldi's log mel energies of 25 ms windows every 10 ms, two windows a frame; no parameters.

    Energies are in fp32 at least, whatever the encoder's dtype, and not normalized over time: a
    LayerNorm follows.
    """

    channels = STACKED * MEL_BINS
    min_samples = WINDOW + (STACKED - 1) * HOP

    def forward(self, waveform: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Waveforms [B, S] in [-1, 1] and valid samples [B] to [B, T, 2 M] and valid frames [B]."""
        mel = log_mel_energies(waveform)
        T = mel.shape[1] // STACKED
        frames = mel[:, : T * STACKED].reshape(mel.shape[0], T, self.channels)
        return frames.to(waveform.dtype), self.frames(lengths)

    def frames(self, lengths: Tensor | None) -> Tensor | None:
        """Valid frames [B] of valid samples [B]."""
        windows = _windows(lengths)
        return None if windows is None else windows.div(STACKED, rounding_mode="floor")


class FbankConvFrontEnd(ConvFrontEnd):
    """The same energies, and convolutions over their windows, 100 a second."""

    in_channels = MEL_BINS

    def forward(self, waveform: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Waveforms [B, S] in [-1, 1] and valid samples [B] to [B, T, C] and valid frames [B]."""
        mel = log_mel_energies(waveform).to(waveform.dtype)
        return self.convolve(mel.transpose(1, 2), _windows(lengths))

    def frames(self, lengths: Tensor | None) -> Tensor | None:
        """Valid frames [B] of valid samples [B]."""
        return super().frames(_windows(lengths))

    @property
    def min_samples(self) -> int:
        """What one frame sees."""
        return WINDOW + (super().min_samples - 1) * HOP

    def find_layout(self) -> None:
        """No one call serves these layers."""


def _windows(lengths: Tensor | None) -> Tensor | None:
    """Whole windows [B] in valid samples [B]."""
    if lengths is None:
        return None
    return ((lengths - WINDOW).div(HOP, rounding_mode="floor") + 1).clamp(min=0)


def log_mel_energies(waveform: Tensor) -> Tensor:
    """Log energies [B, windows, M] of waveforms [B, S], those of Kaldi's fbank without dither."""
    x: Tensor = waveform.to(torch.promote_types(waveform.dtype, torch.float32))
    # of 16-bit integers, as in Kaldi: the floor of the logarithm depends on it
    x = x.unfold(1, WINDOW, HOP) * 2.0**15
    x = x - x.mean(-1, keepdim=True)
    first = x[..., :1] * (1 - PREEMPHASIS)
    x = torch.cat((first, x[..., 1:] - PREEMPHASIS * x[..., :-1]), -1)
    window = torch.hann_window(WINDOW, periodic=False, dtype=x.dtype, device=x.device) ** 0.85
    power = torch.fft.rfft(x * window, FFT).abs().square()
    energies: Tensor = power @ mel_filters(x.dtype, x.device)
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()


def mel_filters(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Triangles [F, M] that overlap by half on the mel scale."""
    options = {"dtype": dtype, "device": device}
    low, high = (1127 * math.log1p(frequency / 700) for frequency in (LOWEST, HIGHEST))
    edges = torch.linspace(low, high, MEL_BINS + 2, **options)  # type: ignore[call-overload]
    frequencies = torch.arange(FFT // 2 + 1, **options) * (SAMPLE_RATE / FFT)  # type: ignore[call-overload]
    mel = 1127 * torch.log1p(frequencies / 700)[:, None]
    step = (high - low) / (MEL_BINS + 1)
    rising, falling = (mel - edges[:-2]) / step, (edges[2:] - mel) / step
    return torch.minimum(rising, falling).clamp(min=0)
