"""Small speech encoders of every kind for the tests of ssl_models."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels import dequantize
from ssl_models.config import SpeechEncoderConfig
from ssl_models.encoder import SpeechEncoder

SMALL: dict[str, Any] = {
    "conv_dims": (16, 32),
    "conv_kernels": (10, 8),
    "conv_strides": (5, 4),
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "feed_forward_size": 64,
    "position_kernel": 8,
    "position_groups": 4,
    "window_frames": 5,
    "depthwise_kernel": 7,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
UNET: dict[str, Any] = {"kind": "squeezeformer", "reduce_layer": 2, "recover_layer": 3}
KINDS: dict[str, dict[str, Any]] = {
    "post-norm": {},
    "pre-norm": {"norm_first": True, "conv_norm": "layer", "conv_bias": True},
    "gated": {"position_buckets": 16, "position_distance": 30},
    "gated-pre-norm": {"position_buckets": 16, "position_distance": 30, "norm_first": True},
    "stacked": {"position_layers": 3, "position_kernel": 5, "conv_norm": "layer"},
    "conformer": {"kind": "conformer", "activation": "silu"},
    "squeezeformer": {**UNET, "activation": "silu"},
    "wide-reduction": {**UNET, "reduce_kernel": 5, "activation": "relu"},
    "no-reduction": {"kind": "squeezeformer", "activation": "silu"},
    "sliding": {"kind": "sparseformer", "window": "sliding"},
    "block": {"kind": "sparseformer", "window": "block", "norm_first": True},
}
SAMPLES = 1500
LENGTHS = (1500, 777)


def small_config(kind: str, **changes: Any) -> SpeechEncoderConfig:
    return SpeechEncoderConfig(**{**SMALL, **KINDS[kind], **changes})


def build(kind: str, **changes: Any) -> SpeechEncoder:
    """An encoder with weights as of a trained one: no norm or scale is the identity."""
    torch.manual_seed(0)
    encoder = SpeechEncoder(small_config(kind, **changes)).eval()
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                fan_in = module.weight[0].numel()
                parts = dict(module.named_parameters())
                if "weight" in parts:
                    nn.init.normal_(parts["weight"], std=fan_in**-0.5)
            elif isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2)
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias") or "pos_bias" in name:
                nn.init.normal_(parameter, std=0.3)
            elif parameter.dim() == 1:
                nn.init.normal_(parameter, 1, 0.3)
    return encoder


def inputs(device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Two utterances, one of them padded."""
    generator = torch.Generator().manual_seed(1)
    waveforms, lengths = torch.randn(2, SAMPLES, generator=generator), torch.tensor(LENGTHS)
    # any finite numbers may stand beyond an utterance
    waveforms[1, LENGTHS[1] :] = 7.0
    return {"waveforms": waveforms.to(device), "lengths": lengths.to(device)}


def encode(encoder: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The valid frames of each utterance."""
    with torch.inference_mode():
        frames, lengths = encoder(**batch)
    if lengths is None:
        return list(frames)
    return [row[:length] for row, length in zip(frames, lengths.tolist(), strict=True)]


def exact(encoder: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of a float encoder with the same weights, in fp64."""
    wide = dequantize(copy.deepcopy(encoder)).double()
    return encode(wide, {n: t.double() if t.is_floating_point() else t for n, t in batch.items()})
