"""A whole wav2vec2-base encoder on ten seconds of audio: random weights, real shapes.

What it shares with ``encoder_cuda`` serves any device and dtype.

Dimension key: B batch, T samples.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.case import Case, Cost, Point, Prepared, Provider, Row
from bench.memory import peak_memory
from bench.peers import (
    ONNXRUNTIME,
    OPENVINO,
    dynamic_int8,
    dynamic_int8_bytes,
    onnxruntime_int8,
    openvino_int8,
)
from bench.shapes import SAMPLE_RATE, SECONDS
from lowbit_kernels import QuantConfig, dequantize, quantize
from lowbit_kernels.cpu import library
from lowbit_kernels.cpu.resident import resident_bytes

# float32 sums in another order, through 12 layers
FLOAT_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# int8 inputs of some 80 layers leave 1 % each, in quadrature 9 %
INT8_ERROR = 0.2


def float32_model() -> nn.Module:
    """wav2vec2-base with seeded random weights and PyTorch's fused attention, in eval mode."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    model: nn.Module = Wav2Vec2Model(Wav2Vec2Config(attn_implementation="sdpa"))
    return model.eval().requires_grad_(False)


def make_inputs(point: Point, device: str, dtype: torch.dtype) -> Tensor:
    """Noise of unit variance [B, T], as a feature extractor normalizes audio."""
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(point.sizes["B"], point.sizes["T"], generator=generator)
    return audio.to(device, dtype)


def cost(point: Point, itemsize: int) -> Cost:
    """Counted on the meta device; bytes of the audio and of the frames."""
    from torch.utils.flop_counter import FlopCounterMode

    B, T = point.sizes["B"], point.sizes["T"]
    model = float32_model().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        frames = model(torch.empty(B, T, device="meta")).last_hidden_state
    return Cost(counter.get_total_flops(), bytes=itemsize * (B * T + frames.numel()))


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def float_model(audio: Tensor) -> nn.Module:
    """``float32_model`` on the device and in the dtype of the audio."""
    return float32_model().to(audio)


def encode(model: nn.Module, audio: Tensor) -> Callable[[], Tensor]:
    """The call that is timed."""

    def call() -> Tensor:
        frames: Tensor = model(audio).last_hidden_state
        return frames

    return call


def unquantized(audio: Tensor) -> Prepared:
    """Eager, with scaled_dot_product_attention."""
    model = float_model(audio)
    error = FLOAT_ERROR[audio.dtype]
    return Prepared(encode(model, audio), error, weight_bytes=stored_bytes(model))


def compiled(audio: Tensor) -> Prepared:
    """``torch.compile`` of the float32 model."""
    model = float_model(audio)
    run = torch.compile(model, fullgraph=True)
    error = FLOAT_ERROR[audio.dtype]
    return Prepared(encode(run, audio), error, weight_bytes=stored_bytes(model))


def quantize_dynamic(audio: Tensor) -> Prepared:
    """PyTorch's dynamic int8 linear layers."""
    model = dynamic_int8(float32_model())
    return Prepared(encode(model, audio), INT8_ERROR, weight_bytes=dynamic_int8_bytes(model))


def with_stored_weights(model: nn.Module, audio: Tensor) -> Tensor:
    """What a low-bit model must compute: a float32 model with the weights it stores."""
    return encode(dequantize(copy.deepcopy(model)).float(), audio.float())()


def ours(audio: Tensor, config: QuantConfig, max_error: float, fuse: bool = False) -> Prepared:
    """A low-bit model."""
    model = float_model(audio)
    quantize(model, config, fuse=fuse)
    stored = stored_bytes(model)

    def facts() -> Row:
        return {"resident_bytes": stored + sum(map(resident_bytes, multiplied_weights(model)))}

    expected = functools.partial(with_stored_weights, model, audio)
    return Prepared(encode(model, audio), max_error, expected, stored, facts)


def multiplied_weights(model: nn.Module) -> list[Tensor]:
    """The packed weights that matmuls read: each layer's, or those of layers that were joined."""
    buffers = [t for name, t in model.named_buffers() if name.endswith("qweight")]
    joined = [m.__dict__["_joined"][1] for m in model.modules() if "_joined" in m.__dict__]
    return buffers + [operand.weight.qweight for operand in joined]


def fast(audio: Tensor, bits: int = 4, fuse: bool = False) -> Prepared:
    """The preset for speed."""
    return ours(audio, QuantConfig.fast(bits), INT8_ERROR, fuse)


def small(audio: Tensor, fuse: bool = False) -> Prepared:
    """The preset for the least error."""
    return ours(audio, QuantConfig.small(), FLOAT_ERROR[audio.dtype], fuse)


def without_compiler(audio: Tensor) -> Prepared:
    """``fast()`` on a machine whose C++ compiler is missing: oneDNN and PyTorch's operators."""
    prepared = fast(audio)

    def call() -> Tensor:
        with patch.object(library, "_load", lambda: (None, "left out of this measurement")):
            return cast("Tensor", prepared.call())

    return replace(prepared, call=call)


class _LastHiddenState(nn.Module):
    """A model with one output, as exporters like it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = float32_model()

    def forward(self, audio: Tensor) -> Tensor:
        frames: Tensor = self.model(audio).last_hidden_state
        return frames


def exported(audio: Tensor, export: Callable[[nn.Module, Tensor], Any]) -> Prepared:
    """A peer with its own runtime."""
    call, nbytes = export(_LastHiddenState().eval(), audio)
    return Prepared(call, INT8_ERROR, weight_bytes=nbytes)


def probe(point: Point, provider: Provider) -> Row:
    """Peak memory, from a process of its own."""
    return peak_memory("encoder_cpu", point.name, provider.name)


ENCODER_CPU = Case(
    name="encoder_cpu",
    title="wav2vec2-base, 10 s of audio, random weights",
    points=tuple(
        Point(f"batch {B}", {"B": B, "T": SECONDS * SAMPLE_RATE}, "wav2vec2-base") for B in (1, 4)
    ),
    make_inputs=make_inputs,
    providers=(
        Provider("float32 eager", unquantized),
        Provider("float32 torch.compile", compiled, slow=True),
        Provider("quantize_dynamic int8", quantize_dynamic),
        Provider(
            "onnxruntime int8", lambda audio: exported(audio, onnxruntime_int8), needs=ONNXRUNTIME
        ),
        Provider(
            "OpenVINO + NNCF int8", lambda audio: exported(audio, openvino_int8), needs=OPENVINO
        ),
        Provider("lowbit fast()", fast),
        # the same bits as the int8 peers
        Provider("lowbit fast(bits=8)", lambda audio: fast(audio, bits=8)),
        Provider("lowbit small()", small),
        # with fewer passes over memory, and our attention instead of PyTorch's
        Provider("lowbit fast(), fused", lambda audio: fast(audio, fuse=True)),
        Provider("lowbit small(), fused", lambda audio: small(audio, fuse=True)),
        Provider("lowbit fast(), no compiler", without_compiler),
    ),
    baseline="float32 eager",
    cost=cost,
    layout="providers",
    weight=3.0,
    probe=probe,
)
