"""torch.ops.lowbit.front_end: a whole convolutional front end in one call.

On a CPU only bytes travel between its layers, and every norm and activation runs on rows that are
still in the cache. On CUDA the first layer is written once, normalized. Training calls the layers
one by one.

Dimension key: B utterances, S samples, T frames, N channels of the last layer.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.conv1d.geometry import MAX_WINDOW
from lowbit_kernels.cpu import FrontEndLayer, Norm, front_end_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.formats import QuantizedWeight, QuantSpec

torch.library.define(
    "lowbit::front_end",
    "(Tensor waveform, Tensor? lengths, Tensor?[] tensors, str layout) -> Tensor",
)
# tensors of a layer: qweight or float weight, then these
_PER_LAYER = 9


def describe_layers(layers: Sequence[FrontEndLayer]) -> str:
    """What ``front_end`` must know of the layers besides their tensors; constant, so made once."""
    described, channels = [], 1
    for layer in layers:
        packed = layer.weight if isinstance(layer.weight, QuantizedWeight) else None
        described.append(
            {
                "spec": None if packed is None else packed.spec.to_dict(),
                "K": None if packed is None else packed.K,
                "taps": layer.taps(channels),
                "stride": layer.stride,
                "N": layer.N,
                "norm": None if layer.norm is None else [layer.norm.kind, layer.norm.eps],
                "activation": layer.activation,
            }
        )
        channels = layer.N
    return json.dumps(described)


def flatten_layers(layers: Sequence[FrontEndLayer]) -> list[Tensor | None]:
    """The tensors of the layers, in the op's order."""
    tensors: list[Tensor | None] = []
    for layer in layers:
        w, norm = layer.weight, layer.norm
        if isinstance(w, QuantizedWeight):
            tensors += [w.qweight, w.scale, w.group_scale, w.zero_point, w.input_scale]
        else:
            tensors += [w, None, None, None, None]
        tensors += [layer.bias, *((None, None) if norm is None else (norm.weight, norm.bias))]
        tensors.append(layer.input_offset)
    return tensors


@functools.cache
def _parse(layout: str) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = json.loads(layout)
    for layer in parsed:
        layer["spec"] = layer["spec"] and QuantSpec(**layer["spec"])
    return parsed


def _frames(samples: int, layout: str) -> int:
    frames = samples
    for layer in _parse(layout):
        frames = (frames - layer["taps"]) // layer["stride"] + 1
    if frames < 1:
        raise ValueError(f"waveform must be long enough for a frame, got {samples} samples")
    return frames


@torch.library.register_fake("lowbit::front_end")
def _fake(
    waveform: Tensor, lengths: Tensor | None, tensors: list[Tensor | None], layout: str
) -> Tensor:
    frames = _frames(waveform.shape[1], layout)
    return waveform.new_empty(waveform.shape[0], frames, _parse(layout)[-1]["N"])


def _layers(tensors: list[Tensor | None], layout: str) -> list[FrontEndLayer]:
    """What ``flatten_layers`` and ``describe_layers`` took apart."""
    layers = []
    for i, layer in enumerate(_parse(layout)):
        (
            weight, scale, group_scale, zero_point, input_scale,
            bias, norm_weight, norm_bias, offset,
        ) = tensors[i * _PER_LAYER : (i + 1) * _PER_LAYER]  # fmt: skip
        assert weight is not None, "flatten_layers puts it there"
        packed: Tensor | QuantizedWeight = weight
        if layer["spec"] is not None:
            assert scale is not None, "flatten_layers puts it there"
            packed = QuantizedWeight(
                weight, scale, group_scale, zero_point, layer["K"], layer["spec"], input_scale
            )
        norm = None
        if layer["norm"] is not None:
            assert norm_weight is not None, "flatten_layers puts it there"
            assert norm_bias is not None, "flatten_layers puts it there"
            norm = Norm(layer["norm"][0], norm_weight, norm_bias, layer["norm"][1])
        layers.append(
            FrontEndLayer(packed, bias, layer["stride"], norm, layer["activation"], offset)
        )
    return layers


@torch.library.impl("lowbit::front_end", "cpu")
def _cpu(
    waveform: Tensor, lengths: Tensor | None, tensors: list[Tensor | None], layout: str
) -> Tensor:
    _frames(waveform.shape[1], layout)
    return front_end_cpu(waveform, _layers(tensors, layout), lengths)


def _cuda(
    waveform: Tensor, lengths: Tensor | None, tensors: list[Tensor | None], layout: str
) -> Tensor:
    from lowbit_kernels.conv1d.front_end_cuda import front_end_cuda

    _frames(waveform.shape[1], layout)
    weight = tensors[0]
    assert weight is not None, "flatten_layers puts it there"
    if not serves(waveform, weight):
        raise NotImplementedError(
            f"on CUDA front_end serves fp16 and bf16 waveforms, a first weight of the same dtype "
            f"and up to {MAX_WINDOW} taps, got {waveform.dtype}, {weight.dtype} and "
            f"{weight.shape[2]} taps: call the layers one by one"
        )
    return front_end_cuda(waveform, _layers(tensors, layout), lengths)


implement_on_cuda("lowbit::front_end", _cuda)


def serves(waveform: Tensor, weight: Tensor) -> bool:
    """Whether ``front_end`` takes a waveform [B, S] with the first layer's weight [N, 1, taps]."""
    if waveform.device.type == "cuda":
        is_half = waveform.dtype in (torch.float16, torch.bfloat16)
        return is_half and weight.dtype == waveform.dtype and weight.shape[2] <= MAX_WINDOW
    return waveform.device.type == "cpu" and waveform.dtype != torch.float64


def front_end(
    waveform: Tensor, lengths: Tensor | None, tensors: list[Tensor | None], layout: str
) -> Tensor:
    """Run a convolutional front end in one call; no gradient.

    Args:
        waveform: [B, S], fp16, bf16 or, on a CPU, fp32; on CUDA in the dtype of the first weight.
        lengths: [B], the valid samples; ``None``: all.
        tensors: of ``flatten_layers``.
        layout: of ``describe_layers``.

    Returns:
        [B, T, N]; frames past an utterance's own are 0.

    Raises:
        ValueError: if ``waveform`` is not a matrix of a served dtype, or too short for one frame.
        NotImplementedError: on CUDA for what ``serves`` says no to.
    """
    if waveform.dim() != 2 or waveform.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            "waveform must be [B, S] in fp16, bf16 or fp32, "
            f"got {list(waveform.shape)} {waveform.dtype}"
        )
    out: Tensor = torch.ops.lowbit.front_end.default(waveform, lengths, tensors, layout)
    return out
