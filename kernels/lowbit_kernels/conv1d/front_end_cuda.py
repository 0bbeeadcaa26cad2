"""A convolutional front end on CUDA: the kernels of its layers, one after the other.

Memory is channel-last. The first layer is written normalized and activated; the others are the
linear layer's kernel over windows that overlap in memory. No layer looks at padding: a frame of an
utterance is computed from its own samples, and what lies behind its last frame is cleared at the
end.

Dimension key: B utterances, S samples, T frames, C input channels, N output channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit_kernels.conv1d.dispatch import choose_conv1d
from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.conv1d.kernels.first_layer import first_layer_triton
from lowbit_kernels.conv1d.kernels.utterance_int8 import (
    Reach,
    largest_triton,
    quantize_utterances_triton,
    zero_padding_triton,
)
from lowbit_kernels.cpu import FrontEndLayer
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.dispatch import LinearConfig
from lowbit_kernels.matmul.gpu import gpu_of
from lowbit_kernels.matmul.kernel import linear_triton
from lowbit_kernels.norm.levels import level_pitch
from lowbit_kernels.norm.norm_quantize_kernel import norm_quantize_triton


@dataclass(frozen=True)
class _Frames:
    """What a layer hands on.

    Args:
        values: [B, T, C], 16-bit or int8.
        offset: [C] still to be subtracted before it is quantized, or None.
        part: [B, P] fp32, magnitudes or scales whose largest decides an utterance's scale.
        is_scale: which of the two.
    """

    values: Tensor
    offset: Tensor | None = None
    part: Tensor | None = None
    is_scale: bool = False


def front_end_cuda(
    waveform: Tensor, layers: Sequence[FrontEndLayer], lengths: Tensor | None
) -> Tensor:
    """[B, T, N] of a waveform [B, S]. See ``front_end``."""
    if waveform.stride(1) != 1:
        waveform = waveform.contiguous()
    samples, reach = waveform.shape[1], Reach(1, 1)
    frames = _Frames(waveform)
    for i, layer in enumerate(layers):
        C = 1 if i == 0 else frames.values.shape[2]
        taps = layer.taps(C)
        reach = Reach(reach.field + (taps - 1) * reach.hop, reach.hop * layer.stride)
        following = layers[i + 1] if i + 1 < len(layers) else None
        if i == 0:
            offset, static, by_utterance = _wanted(following)
            y, part = first_layer_triton(
                waveform, layer, lengths,
                out_scale=static, out_offset=offset, want_largest=by_utterance,
            )  # fmt: skip
            frames = _Frames(y, None, part)
        else:
            frames = _next(frames, layer, following, taps, waveform.dtype, lengths, samples, reach)
    if lengths is not None:
        zero_padding_triton(frames.values, lengths, samples, reach)
    return frames.values


def _next(
    frames: _Frames,
    layer: FrontEndLayer,
    following: FrontEndLayer | None,
    taps: int,
    dtype: torch.dtype,
    lengths: Tensor | None,
    samples: int,
    reach: Reach,
) -> _Frames:
    (B, T, C), stride, N = frames.values.shape, layer.stride, layer.N
    T_out = (T - taps) // stride + 1
    x, weight, x_scale = _operands(frames, layer, T_out)
    activation = None if layer.norm is not None else layer.activation
    config = choose_conv1d(
        B * T_out, N, weight.K, Geometry(taps, stride), False, weight.spec, dtype,
        gpu_of(x.device), activation is None, only_matmul=True,
    ).config  # fmt: skip
    assert isinstance(config, LinearConfig), "no other kernel may serve"
    offset, static, by_utterance = _wanted(following)
    # with a norm first, nothing follows the product; a split sum is short, and read again
    ends = layer.norm is None and config.splits == 1
    largest = None
    if ends and by_utterance:
        largest = torch.empty(-(-N // config.block_n), B, T_out, device=x.device)
    y, _ = linear_triton(
        x.as_strided((B, T_out, taps * C), (T * C, stride * C, 1)),
        weight,
        layer.bias,
        None,
        activation,
        config,
        x_scale=x_scale,
        dtype=torch.int8 if ends and static is not None else dtype,
        out_scale=static if ends else None,
        out_offset=offset if ends else None,
        largest=largest,
    )
    y = y.view(B, T_out, N)
    if not ends:
        return _hand_on(y, layer, following, lengths, samples, reach)
    if largest is not None:
        largest = largest_triton(largest, None, lengths, samples, reach)
    return _Frames(y, None, largest)


def _operands(
    frames: _Frames, layer: FrontEndLayer, rows: int
) -> tuple[Tensor, QuantizedWeight, Tensor | None]:
    """What is multiplied, ``rows`` an utterance: x [B, T, C], the weight, and scales of rows."""
    x, weight, part = frames.values, layer.weight, frames.part
    assert isinstance(weight, QuantizedWeight), "only the first layer is float"
    if weight.spec.inputs is None:
        return x, weight, None
    if weight.input_scale is not None:
        part = weight.input_scale
        weight = replace(weight, scale=weight.scale * part)
    if x.dtype == torch.int8:
        return x, weight, None
    assert part is not None, "its layer found it"
    q, scale = quantize_utterances_triton(x, frames.offset, part, rows, is_scale=frames.is_scale)
    return q, weight, scale


def _hand_on(
    y: Tensor,
    layer: FrontEndLayer,
    following: FrontEndLayer | None,
    lengths: Tensor | None,
    samples: int,
    reach: Reach,
) -> _Frames:
    """A convolution's output [B, T, N], normalized where the layer has a norm."""
    offset, static, by_utterance = _wanted(following)
    norm, part = layer.norm, None
    if norm is None:
        if by_utterance:
            part = largest_triton(y[None], offset, lengths, samples, reach)
        return _Frames(y, offset, part)
    quantize = static is not None and level_pitch(layer.N) == layer.N
    _, y, q, row_scale, _, _ = norm_quantize_triton(
        y, norm.weight, norm.bias, None, norm.eps, not quantize, None, layer.activation,
        static, quantize, offset=offset,
    )  # fmt: skip
    if quantize:
        return _Frames(q)
    if by_utterance:
        part = largest_triton(row_scale[None], None, lengths, samples, reach)
    return _Frames(y, None, part, is_scale=True)


def _wanted(following: FrontEndLayer | None) -> tuple[Tensor | None, Tensor | None, bool]:
    """Of the next layer's input: offset, static scale, and whether an utterance has its own."""
    if following is None:
        return None, None, False
    assert isinstance(following.weight, QuantizedWeight), "only the first layer is float"
    static, is_int8 = following.weight.input_scale, following.weight.spec.inputs is not None
    return following.input_offset, static, is_int8 and static is None
