"""The convolutional front end of a wav2vec2-family model in one call, on a CPU.

Waveform to features: every norm and activation runs on rows that are still in the cache, and
between int8 layers only bytes travel. A GroupNorm of one channel a group is an affine map of its
convolution, whose mean and variance follow from the waveform's windows alone.

Dimension key: B batch, S samples, T frames, C channels, N output channels.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.cpu import library as lib
from lowbit_kernels.cpu import portable
from lowbit_kernels.cpu.conv1d import conv1d_cpu
from lowbit_kernels.cpu.product import ACTIVATIONS, SLACK_BYTES, Finish, Rows, multiply_native
from lowbit_kernels.formats import QuantizedWeight

# float layers run through so many frames at a time: enough to pay for unpacking the weights,
# few enough that what lies between the layers is reused and not fetched from the system
CHUNK_FRAMES = 128


@dataclass(frozen=True)
class Norm:
    """A normalization between a convolution and its activation.

    Args:
        kind: ``"group"``: over time, one channel a group; ``"layer"``: over the channels.
        weight: [N].
        bias: [N].
        eps: added to the variance.
    """

    kind: str
    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class FrontEndLayer:
    """One layer: convolution without padding, norm, activation.

    Args:
        weight: the first layer's float [N, 1, taps]; a quantized one [N, taps * C] elsewhere.
        bias: [N] or None; with what ``input_offset`` adds to each output channel.
        stride: input frames between two output frames.
        norm: the normalization; ``"group"`` in the first layer only.
        activation: None, "gelu", "gelu_tanh", "silu" or "relu".
        input_offset: [C] fp32, subtracted from the input before it is quantized. None: zero.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    stride: int
    norm: Norm | None = None
    activation: str | None = "gelu"
    input_offset: Tensor | None = None

    def taps(self, C: int) -> int:
        """Kernel size, given the input channels."""
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.K // C
        return self.weight.shape[-1]

    @property
    def N(self) -> int:
        return self.weight.N if isinstance(self.weight, QuantizedWeight) else self.weight.shape[0]


@dataclass(frozen=True)
class _Affine:
    """The first convolution of one utterance: weight [taps, N] and bias [N], fp32."""

    weight: Tensor
    bias: Tensor


def front_end_cpu(
    waveform: Tensor, layers: Sequence[FrontEndLayer], lengths: Tensor | None = None
) -> Tensor:
    """Run a convolutional front end.

    Each utterance is computed from its own samples alone, so that a padded batch equals single
    utterances to the bit.

    Args:
        waveform: [B, S], fp16, bf16 or fp32; computed in fp32.
        layers: the first with one input channel and a float weight, the rest quantized.
        lengths: [B], the valid samples. None: all.

    Returns:
        [B, T, N] in the dtype of ``waveform``; frames past an utterance's own are 0.
    """
    S = waveform.shape[1]
    valid = [S] * waveform.shape[0] if lengths is None else lengths.clamp(0, S).tolist()
    features = waveform.new_zeros(waveform.shape[0], _frames(S, layers), layers[-1].N)
    for b, samples in enumerate(valid):
        if frames := _frames(samples, layers):
            features[b, :frames] = _utterance(waveform[b, :samples].float().contiguous(), layers)
    return features


def _frames(samples: int, layers: Sequence[FrontEndLayer]) -> int:
    frames, C = samples, 1
    for layer in layers:
        frames, C = (frames - layer.taps(C)) // layer.stride + 1, layer.N
    return max(frames, 0)


def _utterance(x: Tensor, layers: Sequence[FrontEndLayer]) -> Tensor:
    """Samples [S] to features [T, N]."""
    library = lib.native_int8()
    int8 = all(
        isinstance(layer.weight, QuantizedWeight) and layer.weight.spec.inputs == "int8"
        for layer in layers[1:]
    )
    if library is not None and int8 and len(layers) > 1:
        return _int8_layers(library, x, layers)
    first = _folded(x, layers[0])
    if int8:  # a layer's scale is that of the whole utterance
        return _one_by_one(x, first, layers)
    T, hop = _frames(x.shape[0], layers), math.prod(layer.stride for layer in layers)
    chunks = []
    for t in range(0, T, CHUNK_FRAMES):
        end = min(t + CHUNK_FRAMES, T)
        samples = x[t * hop : (end - 1) * hop + _receptive_field(layers)]
        chunks.append(_one_by_one(samples, first, layers))
    return torch.cat(chunks)


def _receptive_field(layers: Sequence[FrontEndLayer]) -> int:
    """Samples that one frame is computed from."""
    channels = [1] + [layer.N for layer in layers[:-1]]
    samples = 1
    for layer, C in zip(reversed(layers), reversed(channels), strict=True):
        samples = (samples - 1) * layer.stride + layer.taps(C)
    return samples


def _one_by_one(x: Tensor, first: _Affine, layers: Sequence[FrontEndLayer]) -> Tensor:
    """Samples [S] to features [T, N], fp32 between the layers."""
    h = _first_float(x, first, layers[0])
    for layer in layers[1:]:
        assert isinstance(layer.weight, QuantizedWeight)
        epilogue = layer.activation if layer.norm is None else None
        h = h if layer.input_offset is None else h - layer.input_offset
        h = conv1d_cpu(h[None], layer.weight, layer.bias, None, epilogue, stride=layer.stride)[0]
        if layer.norm is not None:
            h = _finish(h, layer)
    return h


def _int8_layers(library: ctypes.CDLL, x: Tensor, layers: Sequence[FrontEndLayer]) -> Tensor:
    first, scale = _folded(x, layers[0]), _static_scale(layers[1])
    if scale is None:
        # the first layer is cheap enough to be computed twice: for its range, and for its values
        largest = torch.zeros(())
        _first_native(library, x, first, layers[0], layers[1].input_offset, largest=largest)
        scale = portable.scale_of(largest)
    frames, C = (x.shape[0] - layers[0].taps(1)) // layers[0].stride + 1, layers[0].N
    q = lib.empty(frames * C + SLACK_BYTES, dtype=torch.uint8)
    _first_native(library, x, first, layers[0], layers[1].input_offset, q=q, scale=scale)
    scratch = torch.empty(0)
    for number, layer in enumerate(layers[1:], 1):
        assert isinstance(layer.weight, QuantizedWeight)
        rows = Rows(
            q, (frames - layer.taps(C)) // layer.stride + 1, layer.weight.K, layer.stride * C
        )
        frames, C = rows.M, layer.N
        if scratch.numel() < frames * C:
            scratch = lib.empty(frames * C)
        h, largest = scratch[: frames * C].view(frames, C), torch.zeros(())
        inside = layer.norm is None
        finish = Finish(layer.bias, layer.activation if inside else None, None).prepared()
        last = number + 1 == len(layers)
        offset = None if last else layers[number + 1].input_offset
        raised = None if last or not inside else largest
        multiply_native(library, rows, layer.weight, scale, finish, h, raised, offset)
        if not inside:
            _finish_native(library, h, layer, offset, largest)
        if not last:
            static = _static_scale(layers[number + 1])
            scale = portable.scale_of(largest) if static is None else static
            library.quantize_frames(
                lib.pointer(h), frames, frames, 1, C, 0, 0,
                lib.pointer(scale), lib.pointer(offset), lib.pointer(q), lib.threads(),
            )  # fmt: skip
    return h


def _static_scale(layer: FrontEndLayer) -> Tensor | None:
    assert isinstance(layer.weight, QuantizedWeight)
    scale = layer.weight.input_scale
    return None if scale is None else scale.float()


def _folded(x: Tensor, layer: FrontEndLayer) -> _Affine:
    """The first convolution of an utterance [S], its GroupNorm folded in."""
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach().double()[:, 0]
    bias = weight.new_zeros(layer.N) if layer.bias is None else layer.bias.detach().double()
    if layer.norm is not None and layer.norm.kind == "group":
        windows = x.unfold(0, weight.shape[1], layer.stride).double()
        center = windows.mean(0)
        covariance = (windows - center).t() @ (windows - center) / windows.shape[0]
        # rounding can leave a silent channel's variance a little below zero
        variance = ((weight @ covariance) * weight).sum(1).clamp_min(0)
        gain = layer.norm.weight.double() * (variance + layer.norm.eps).rsqrt()
        # the convolution's own bias is taken away again by the mean
        bias = layer.norm.bias.double() - (weight @ center) * gain
        weight = weight * gain[:, None]
    return _Affine(weight.t().float().contiguous(), bias.float())


def _first_float(x: Tensor, first: _Affine, layer: FrontEndLayer) -> Tensor:
    """Samples [S] to the first layer's [T, N]."""
    library = lib.native()
    if library is not None:
        out = lib.empty((x.shape[0] - layer.taps(1)) // layer.stride + 1, layer.N)
        _first_native(library, x, first, layer, out=out)
        return out
    h = x.unfold(0, layer.taps(1), layer.stride) @ first.weight + first.bias
    return _finish(h, layer)


def _finish(h: Tensor, layer: FrontEndLayer) -> Tensor:
    """LayerNorm, where there is one, and activation of h [T, N], which may be changed."""
    library = lib.native()
    if library is not None:
        _finish_native(library, h, layer)
        return h
    norm = layer.norm
    if norm is not None and norm.kind == "layer":
        h = F.layer_norm(h, (layer.N,), norm.weight.float(), norm.bias.float(), norm.eps)
    return portable.activate(h, layer.activation)


def _first_native(
    library: ctypes.CDLL,
    x: Tensor,
    first: _Affine,
    layer: FrontEndLayer,
    offset: Tensor | None = None,
    out: Tensor | None = None,
    q: Tensor | None = None,
    scale: Tensor | None = None,
    largest: Tensor | None = None,
) -> None:
    taps = first.weight.shape[0]
    conv = lib.FirstConv(
        frames=(x.shape[0] - taps) // layer.stride + 1, taps=taps, stride=layer.stride,
        x=lib.pointer(x), weight=lib.pointer(first.weight), bias=lib.pointer(first.bias),
    )  # fmt: skip
    finish, held = _row_finish(layer, offset, out, q, scale, largest)
    if library.first_conv(conv, finish):
        raise MemoryError("no memory for the rows of the first convolution")
    del held


def _finish_native(
    library: ctypes.CDLL,
    h: Tensor,
    layer: FrontEndLayer,
    offset: Tensor | None = None,
    largest: Tensor | None = None,
) -> None:
    finish, held = _row_finish(layer, offset, h, None, None, largest)
    library.finish_rows(lib.pointer(h), h.shape[0], finish)
    del held


def _row_finish(
    layer: FrontEndLayer,
    offset: Tensor | None,
    out: Tensor | None,
    q: Tensor | None,
    scale: Tensor | None,
    largest: Tensor | None,
) -> tuple[lib.RowFinish, tuple[Tensor, ...]]:
    """Arguments, and the tensors that must live as long as they do."""
    held: tuple[Tensor, ...] = ()
    if layer.norm is not None and layer.norm.kind == "layer":
        held = tuple(t.detach().float().contiguous() for t in (layer.norm.weight, layer.norm.bias))
    weight, bias = held or (None, None)
    return lib.RowFinish(
        channels=layer.N, norm_weight=lib.pointer(weight), norm_bias=lib.pointer(bias),
        eps=0.0 if layer.norm is None else layer.norm.eps,
        activation=ACTIVATIONS[layer.activation], offset=lib.pointer(offset),
        out=lib.pointer(out), q=lib.pointer(q), scale=lib.pointer(scale),
        largest=lib.pointer(largest), threads=lib.threads(),
    ), held  # fmt: skip
