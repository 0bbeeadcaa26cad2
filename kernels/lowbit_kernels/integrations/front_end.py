"""Convolutional front ends that give a padded utterance the frames it has alone.

In wav2vec2-base and its relatives the first convolution is followed by a GroupNorm over time, so
padding changes every frame of an utterance. Here the statistics run over the valid frames.

Dimension key: B batch, C channels, T frames, S samples.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.conv1d.front_end import (
    describe_layers,
    flatten_layers,
    front_end,
    serves,
)
from lowbit_kernels.integrations.activations import epilogue_of
from lowbit_kernels.integrations.class_swap import Swapped, swap_class
from lowbit_kernels.integrations.front_end_layers import front_end_layers, needs_gradient
from lowbit_kernels.integrations.padding import (
    attention_mask_of,
    fill_padding,
    frames_after,
    zero_padding,
)
from lowbit_kernels.norm import masked_group_norm

_log = logging.getLogger("lowbit_kernels")
_warned = False

# this many zeros at the end of a clip are padding: recorded silence is not exactly zero
_PADDING_SAMPLES = 160


class MaskedGroupNormConvLayer(Swapped):
    """A convolution, GroupNorm and activation; the norm sees only valid frames."""

    def forward(self, hidden_states: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, C_in, T_in] to [B, C, T]; ``lengths`` [B] counts valid output frames."""
        epilogue, norm = epilogue_of(self.activation), self.layer_norm
        if lengths is None and not (hidden_states.is_cuda and epilogue):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        normalized = masked_group_norm(
            self.conv(hidden_states), norm.weight, norm.bias,
            lengths=lengths, num_groups=norm.num_groups, eps=norm.eps, activation=epilogue,
        )  # fmt: skip
        return normalized if epilogue else self.activation(normalized)


class MaskedFeatureEncoder(Swapped):
    """The stack of convolutions, told the lengths by a hook on the model that calls it."""

    # set by the hook, taken by the next forward: layers get lengths as an argument, so that
    # gradient checkpointing recomputes each call with its own
    _lengths: Tensor | None = None
    # of the fused call, where the layers are of a form that it serves
    _layout: str | None = None

    def _fuses(self, input_values: Tensor) -> bool:
        """Whether the one call serves: no gradient, and a dtype that it computes in."""
        if self._layout is None or needs_gradient(self.conv_layers, input_values):
            return False
        return serves(input_values, self.conv_layers[0].conv.weight)

    def forward(self, input_values: Tensor) -> Tensor:
        """Waveforms [B, S] to features [B, C, T]."""
        lengths, self._lengths = self._lengths, None
        if self._fuses(input_values):
            tensors = flatten_layers(front_end_layers(self.conv_layers) or [])
            return front_end(input_values, lengths, tensors, self._layout or "").transpose(1, 2)
        if lengths is None:
            return super().forward(input_values)  # type: ignore[no-any-return]
        hidden_states = input_values[:, None]
        if self._requires_grad and self.training:
            hidden_states.requires_grad = True
        zero = _has_int8_inputs(self.conv_layers)
        for i, layer in enumerate(self.conv_layers):
            lengths = frames_after(lengths, layer.conv)
            masked = isinstance(layer, MaskedGroupNormConvLayer)
            hidden_states = layer(hidden_states, *((lengths,) if masked else ()))
            # an input scale is one an utterance: padding must not raise it
            if (offset := _input_offset(self.conv_layers, i + 1)) is not None:
                hidden_states = fill_padding(hidden_states, lengths, offset)
            elif zero:
                hidden_states = zero_padding(hidden_states, lengths)
        return hidden_states


def matches_front_end(module: nn.Module) -> bool:
    """Whether a module has a front end that does not ignore padding yet, or has new layers."""
    if not has_front_end(module):
        return False
    encoder: Any = module.feature_extractor
    if isinstance(encoder, MaskedFeatureEncoder):
        return encoder._layout != _layout_of(encoder)
    return not isinstance(encoder, Swapped)


def _layout_of(encoder: Any) -> str | None:
    """Of the fused call for a stack of convolutions, where it serves them."""
    layers = front_end_layers(encoder.conv_layers)
    return None if layers is None else describe_layers(layers)


def has_front_end(module: nn.Module) -> bool:
    """Whether a module is a model of transformers that calls a convolutional front end."""
    encoder = module._modules.get("feature_extractor")
    return (
        encoder is not None
        and type(encoder).__name__.endswith(("FeatureEncoder", "FeatureExtractor"))
        and type(encoder).__module__.startswith("transformers.")
        and isinstance(getattr(encoder, "conv_layers", None), nn.ModuleList)
    )


def mask_front_end(model: nn.Module) -> nn.Module:
    """Make a model's front end ignore padding; in place."""
    encoder: Any = model.feature_extractor
    if not isinstance(encoder, Swapped):
        swap_class(encoder, MaskedFeatureEncoder)
        for layer in encoder.conv_layers:
            if isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
                swap_class(layer, MaskedGroupNormConvLayer)
        model.register_forward_pre_hook(_pass_lengths, with_kwargs=True)
    encoder._layout = _layout_of(encoder)
    return model


def _pass_lengths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the model: hand the front end each utterance's samples."""
    waveforms = args[0] if args else kwargs.get("input_values")
    mask = attention_mask_of(args, kwargs)
    encoder: Any = module.feature_extractor
    encoder._lengths = None if mask is None else mask.sum(-1)
    if mask is None and not torch.compiler.is_compiling():
        _warn_if_padded(waveforms)


def _warn_if_padded(waveforms: Tensor | None) -> None:
    """Say once that a padded batch came without a mask; looks at tensors on a CPU only."""
    global _warned
    if _warned or waveforms is None or waveforms.device.type != "cpu" or waveforms.dim() != 2:
        return
    if waveforms.shape[0] < 2:
        return
    padded = (waveforms[:, -_PADDING_SAMPLES:] == 0).all(-1)
    if padded.any() and not padded.all():
        _warned = True
        _log.warning(
            "a padded batch came without attention_mask: padding changes the output. Call the "
            "feature extractor with return_attention_mask=True and pass the mask on"
        )


def _input_offset(layers: nn.ModuleList, i: int) -> Tensor | None:
    """The input offset of the convolution of layer i, if there is one."""
    if i >= len(layers):
        return None
    layer: Any = layers[i]
    return getattr(layer.conv, "input_offset", None)


def _has_int8_inputs(layers: nn.ModuleList) -> bool:
    specs = [getattr(layer.conv, "spec", None) for layer in layers]
    return any(spec is not None and spec.inputs is not None for spec in specs)
