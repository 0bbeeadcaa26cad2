"""Input offsets of a convolutional front end: what its layers see in silence.

Dimension key: C channels, T frames.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.integrations.front_end import matches_front_end

# one second: far more than the receptive field, so that the middle sees no edge
_SAMPLES = 16_000


def silence_offsets(model: nn.Module) -> dict[str, Tensor]:
    """What each convolution of a float front end but the first gets in digital silence.

    Quiet frames lie near that constant vector. An int8 scale is one an utterance, set by its
    loudest frame, and rounds such a vector to the same wrong integers in every quiet frame: an
    error that no sum averages out and that the next LayerNorm lifts. Quantizing the distance from
    the vector leaves quiet frames exact.

    Returns:
        Name of the convolution to [C] fp32.
    """
    offsets = {}
    for name, module in model.named_modules():
        if matches_front_end(module):
            prefix = f"{name}.feature_extractor" if name else "feature_extractor"
            for i, offset in _layer_inputs(module.feature_extractor).items():
                offsets[f"{prefix}.conv_layers.{i}.conv"] = offset
    return offsets


def _layer_inputs(encoder: Any) -> dict[int, Tensor]:
    weight = encoder.conv_layers[0].conv.weight
    hidden_states = weight.new_zeros(1, 1, _SAMPLES)
    inputs = {}
    with torch.no_grad():
        for i, layer in enumerate(encoder.conv_layers):
            if hidden_states.shape[2] < layer.conv.kernel_size[0]:
                break
            if i:
                inputs[i] = hidden_states[0, :, hidden_states.shape[2] // 2].float()
            hidden_states = layer(hidden_states)
    return {i: offset for i, offset in inputs.items() if offset.isfinite().all()}
