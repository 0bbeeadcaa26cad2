"""Input offsets of a convolutional front end: what its layers see in silence.

Dimension key: C channels, T frames.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.integrations.front_end import has_front_end

# one second: far more than the receptive field, so that the middle sees no edge
_SAMPLES = 16_000


def silence_offsets(model: nn.Module) -> dict[nn.Module, Tensor]:
    """What each convolution of a front end but the first gets in digital silence.

    Quiet frames lie near that constant vector. An int8 scale is one an utterance, set by its
    loudest frame, and rounds such a vector to the same wrong integers in every quiet frame: an
    error that no sum averages out and that the next LayerNorm lifts. Quantizing the distance from
    the vector leaves quiet frames exact.

    Args:
        model: in eval mode, called without gradients; a front end that is quantized in part will
            do.

    Returns:
        Convolution to [C] fp32, on the convolution's device. A value that is not finite, as from
        a half-precision front end that overflows, is left out with its layer.
    """
    offsets: dict[nn.Module, Tensor] = {}
    for module in model.modules():
        if has_front_end(module):
            offsets |= layer_inputs(module.feature_extractor)
    return offsets


def layer_inputs(encoder: Any) -> dict[nn.Module, Tensor]:
    """What each convolution of one front end but the first gets, as ``silence_offsets``."""
    weight = encoder.conv_layers[0].conv.weight
    hidden_states = torch.zeros(1, 1, _SAMPLES, dtype=weight.dtype, device=weight.device)
    inputs = {}
    for i, layer in enumerate(encoder.conv_layers):
        if hidden_states.shape[2] < layer.conv.kernel_size[0]:
            break
        if i:
            inputs[layer.conv] = hidden_states[0, :, hidden_states.shape[2] // 2].float()
        hidden_states = layer(hidden_states)
    return {conv: offset for conv, offset in inputs.items() if offset.isfinite().all()}
