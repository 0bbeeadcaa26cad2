"""The fused CPU front end against its layers one by one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.cpu import FrontEndLayer, Norm, conv1d_cpu, front_end, front_end_cpu, library
from lowbit_kernels.formats import QuantizedWeight, QuantSpec, quantize_weight
from lowbit_kernels.testing import assert_as_accurate

# N, taps, stride of the layers: ragged, more than one vector of channels
SHAPE = [(37, 10, 5), (50, 3, 2), (20, 2, 2)]


@pytest.fixture(params=["native", "pytorch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native":
        if library.native_int8() is None:
            pytest.skip("no compiled int8 kernels here")
    else:
        monkeypatch.setattr(library, "native", lambda: None)
        monkeypatch.setattr(library, "native_int8", lambda: None)
    return str(request.param)


def make_layers(kind: str, inputs: str | None) -> list[FrontEndLayer]:
    """kind: ``"group"``, as wav2vec2-base: no biases; ``"layer"``, as its large model; "none"."""
    layers, C = [], 1
    for number, (N, taps, stride) in enumerate(SHAPE):
        weight: Tensor | QuantizedWeight = torch.randn(N, 1, taps) / taps**0.5
        if number:
            view = torch.randn(N, taps * C) / (taps * C) ** 0.5
            weight = quantize_weight(view, QuantSpec(inputs=inputs))
        norm = None
        if kind == "layer" or (kind == "group" and number == 0):
            norm = Norm(kind, 1 + torch.randn(N) / 4, torch.randn(N), 1e-5)
        bias = None if kind == "group" else torch.randn(N)
        layers.append(FrontEndLayer(weight, bias, stride, norm))
        C = N
    return layers


def reference(waveform: Tensor, layers: list[FrontEndLayer], dtype: torch.dtype) -> Tensor:
    """Float layers one after the other, [B, S] to [B, T, N]."""
    h = waveform.to(dtype)[:, None]
    for layer in layers:
        weight = layer.weight
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize(dtype).view(layer.N, -1, h.shape[1]).transpose(1, 2)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        h = F.conv1d(h, weight.to(dtype), bias, layer.stride)
        if layer.norm is not None:
            gain, shift = layer.norm.weight.to(dtype), layer.norm.bias.to(dtype)
            if layer.norm.kind == "group":
                h = F.group_norm(h, layer.N, gain, shift, layer.norm.eps)
            else:
                h = F.layer_norm(h.mT, (layer.N,), gain, shift, layer.norm.eps).mT
        h = F.gelu(h)
    return h.mT


@pytest.mark.parametrize("kind", ["group", "layer", "none"])
def test_float_layers_are_as_accurate_as_pytorch(
    path: str, kind: str, monkeypatch: pytest.MonkeyPatch
):
    # several chunks, the last one short
    monkeypatch.setattr(front_end, "CHUNK_FRAMES", 9)
    # an offset, so that the mean over time matters
    waveform, layers = torch.randn(2, 701) / 2 + 0.3, make_layers(kind, None)
    y = front_end_cpu(waveform, layers)
    low = reference(waveform, layers, torch.float32)
    assert_as_accurate(y, low, reference(waveform, layers, torch.float64))


@pytest.mark.parametrize("kind", ["group", "layer", "none"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_int8_layers_equal_the_single_layers(path: str, kind: str, static: bool, offset: bool):
    waveform, layers = torch.randn(1, 701), make_layers(kind, "int8")
    if offset:
        for number, layer in enumerate(layers[1:], 1):
            layers[number] = replace(layer, input_offset=torch.randn(SHAPE[number - 1][0]))
    if static:
        for number, layer in enumerate(layers[1:], 1):
            assert isinstance(layer.weight, QuantizedWeight)
            weight = replace(layer.weight, input_scale=torch.tensor(0.02))
            layers[number] = replace(layer, weight=weight)
    h = front_end_cpu(waveform, layers[:1])
    for layer in layers[1:]:
        assert isinstance(layer.weight, QuantizedWeight)
        h = h if layer.input_offset is None else h - layer.input_offset
        if layer.norm is None:
            h = conv1d_cpu(h, layer.weight, layer.bias, None, "gelu", stride=layer.stride)
        else:
            h = conv1d_cpu(h, layer.weight, layer.bias, stride=layer.stride)
            # PyTorch's LayerNorm rounds differently, which int8 would turn into another integer
            h = _normalized(h, layer)
    assert torch.equal(front_end_cpu(waveform, layers), h)


def _normalized(h: Tensor, layer: FrontEndLayer) -> Tensor:
    return front_end._finish(h[0].clone(), layer)[None]


@pytest.mark.parametrize("kind", ["group", "layer"])
@pytest.mark.parametrize("inputs", [None, "int8"])
def test_a_padded_batch_equals_single_utterances(path: str, kind: str, inputs: str | None):
    layers, waveform = make_layers(kind, inputs), torch.randn(3, 701)
    lengths = torch.tensor([701, 400, 9])
    # what lies in the padding must not matter; 9 samples give no frame
    waveform[1, 400:] = torch.nan
    y = front_end_cpu(waveform, layers, lengths)
    alone = front_end_cpu(waveform[1:2, :400], layers)
    if path == "native":  # PyTorch's own products may round differently in another batch
        assert torch.equal(y[0], front_end_cpu(waveform[:1], layers)[0])
        assert torch.equal(y[1, : alone.shape[1]], alone[0])
    assert y.isfinite().all()
    assert not y[1, alone.shape[1] :].any()
    assert not y[2].any()


@pytest.mark.parametrize("inputs", [None, "int8"])
def test_silence_and_constants_are_finite(path: str, inputs: str | None):
    layers = make_layers("group", inputs)
    for level in (0.0, 0.7, 1e4):
        assert front_end_cpu(torch.full((1, 701), level), layers).isfinite().all()


@pytest.mark.parametrize("inputs", [None, "int8"])
def test_nan_reaches_the_features(path: str, inputs: str | None):
    waveform = torch.randn(2, 701)
    waveform[0, 300] = torch.nan
    y = front_end_cpu(waveform, make_layers("group", inputs))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_16_bit_waveforms(path: str):
    layers, waveform = make_layers("group", None), torch.randn(1, 701).bfloat16()
    y = front_end_cpu(waveform, layers)
    low = reference(waveform, layers, torch.bfloat16)
    assert_as_accurate(y, low, reference(waveform, layers, torch.float64))
