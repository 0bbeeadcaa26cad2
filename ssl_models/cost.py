"""What a speech encoder costs: storage, operations and estimated runtime, layer by layer.

The accounting of arXiv 2301.00652: parameters of 16 bits but for quantized weights; operations in
floating point; bit operations of quantized products; a runtime relative to its float model.

Dimension key: S samples, T frames, C features, W frames of a block.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbit_kernels.formats.config import ATTENTION_BITS
from ssl_models.config import SpeechEncoderConfig
from ssl_models.conformer import RelativeAttention
from ssl_models.encoder import SpeechEncoder
from ssl_models.fbank import (
    FFT,
    HOP,
    MEL_BINS,
    SAMPLE_RATE,
    WINDOW,
    FbankConvFrontEnd,
    FbankFrontEnd,
)
from ssl_models.module_kinds import MODULE_KINDS, module_kind
from ssl_models.transformer import SelfAttention

SCOPES = ("sqwq", "bit-l", "bit-la")
BITS = (1, 2, 4, 8)
# of parameters and inputs in floating point
FLOAT_BITS = 16
# published GFLOPs of HuBERT-base with SEW's front end, of the same with SqWQ, and the bit
# operations, in units of 2^30, that SqWQ makes of the rest at 8 bits. They take as long
FLOAT_GFLOPS, REMAINING_GFLOPS, QUANT_OPS_AT_8_BITS = 110.79, 82.24, 1898.44

# bits of weights and inputs
_Bits = tuple[int, int]


@dataclass(frozen=True)
class LayerCost:
    """What one layer, or the products of one attention, cost.

    Attributes:
        name: of the module.
        kind: of ``MODULE_KINDS``, ``"attention_matmuls"`` or ``"other"``.
        parameters: all that it has.
        weights: those of them that are stored in ``bits``.
        macs: multiplications with an addition.
        bits: of a weight; 16: floating point.
        input_bits: of what it is multiplied by.
    """

    name: str
    kind: str
    parameters: int
    weights: int
    macs: int
    bits: int = FLOAT_BITS
    input_bits: int = FLOAT_BITS

    @property
    def storage(self) -> float:
        """Bytes."""
        return ((self.parameters - self.weights) * FLOAT_BITS + self.weights * self.bits) / 8

    @property
    def flops(self) -> int:
        """Of products with an operand in floating point."""
        return 2 * self.macs if FLOAT_BITS in (self.bits, self.input_bits) else 0

    @property
    def quant_ops(self) -> int:
        """Bit operations of the others: m n a product of m and n bits, max(m, n) its sum."""
        m, n = self.bits, self.input_bits
        return 0 if self.flops else self.macs * (m * n + max(m, n))


@dataclass(frozen=True)
class Cost:
    """What an encoder costs for one utterance.

    Attributes:
        seconds: of it.
        layers: linear layers, convolutions and attentions as they run, then all other parameters.
    """

    seconds: float
    layers: tuple[LayerCost, ...]

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Of each kind, and of all as ``"total"``: what ``to_dict`` has but the runtime."""
        rows: dict[str, dict[str, float]] = {}
        members = defaultdict(list)
        for layer in self.layers:
            members[layer.kind].append(layer)
        for kind, layers in (*members.items(), ("total", list(self.layers))):
            rows[kind] = {
                "parameters": sum(layer.parameters for layer in layers),
                "storage_mb": sum(layer.storage for layer in layers) / 1e6,
                "gflops": sum(layer.flops for layer in layers) / 1e9,
                "quant_gbit": sum(layer.quant_ops for layer in layers) / 2**30,
            }
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Parameters, decimal MB, GFLOPs, QuantOPs in 2^30 bit operations, runtime, and kinds."""
        kinds = self.by_kind()
        total = kinds.pop("total")
        runtime = estimated_runtime(total["gflops"], total["quant_gbit"])
        return {"seconds": self.seconds, **total, "runtime": runtime, "kinds": kinds}


def estimated_runtime(gflops: float, quant_gbit: float) -> float:
    """Relative to HuBERT-base with SEW's front end in fp16.

    Anchored, as in arXiv 2301.00652, at SqWQ with 8 bits taking as long as that.
    """
    gflops_a_gbit = (FLOAT_GFLOPS - REMAINING_GFLOPS) / QUANT_OPS_AT_8_BITS
    return (gflops + gflops_a_gbit * quant_gbit) / FLOAT_GFLOPS


def cost(
    config: SpeechEncoderConfig,
    seconds: float = 10.0,
    *,
    bits: int | None = None,
    inputs: int | None = None,
    scope: str = "bit-l",
    convolutions: bool = False,
    final_dim: int = 0,
) -> Cost:
    """Count the layers of an encoder as they run on one utterance.

    Of arXiv 2301.00652 this reproduces the storage of HuBERT's rows (with ``final_dim=256``), the
    runtime of all rows from their printed operations, and to 1.5 % the FLOPs of both front ends and
    of what BiT-LA leaves in floating point. Its input length is not stated: 10 s fit.

    Not reproduced: how it splits FLOPs and QuantOPs between linear layers and attention. It has
    26.367 x 2^30 products in BiT-L's layers, which have 39.5 x 2^30, and 53.73 x 2^30 in BiT-LA's,
    here 43.75 x 2^30. So the FLOPs of its two float models come out 3 and 5 % lower here, and
    SqWQ's and BiT-L's runtimes much lower, as more of the products count as quantized: 0.57 instead
    of 1.00 at 8 bits.

    Norms, activations, softmax and Fourier transforms are not counted, nor are the scales of
    weights, but for SqWQ's.

    Args:
        config: of the encoder; its ``quantization`` holds where ``bits`` is not given.
        seconds: of the utterance.
        bits: of the weights of linear layers in attention and feed-forward blocks: 1, 2, 4 or 8.
        inputs: of their inputs, or 16 for floating point. None: 8 with SqWQ, else ``bits``.
        scope: ``"sqwq"``, with a gain for each output channel; ``"bit-l"``; or ``"bit-la"``, with
            products of queries, keys, probabilities and values of as many bits as inputs, and
            learned shifts. Those with relative positions stay in floating point.
        convolutions: quantize front end, positions and convolution modules, too, but for a
            convolution of one channel, the waveform.
        final_dim: of HuBERT's projection in pre-training, counted as parameters, as is its mask
            embedding, where it is above 0. The paper counts 256.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    samples = _check(seconds, bits, inputs, scope, convolutions, final_dim)
    if bits is None:
        choices, shifts = _configured(config.quantization)
    else:
        kinds = MODULE_KINDS if convolutions else ("attention", "feed_forward")
        read = inputs or (8 if scope == "sqwq" else bits)
        choices, shifts = dict.fromkeys(kinds, (bits, read)), scope == "bit-la"
        if shifts:
            choices["attention_matmuls"] = (read, read)
    with FakeTensorMode():
        encoder = SpeechEncoder(dataclasses.replace(config, quantization={})).eval()
        least = encoder.feature_extractor.min_samples
        if samples < least:
            raise ValueError(
                f"seconds must be at least {least / SAMPLE_RATE:g}, one frame, got {seconds}"
            )
        counter = _Counter(choices, bits is not None and scope == "sqwq", shifts)
        layers = counter.run(encoder, samples)
    counted = (m for m in encoder.modules() if isinstance(m, nn.Linear | nn.Conv1d))
    rest = _size(encoder) - sum(map(_size, counted))
    if final_dim:
        rest += (config.hidden_size + 1) * final_dim + config.hidden_size
    return Cost(seconds, (*layers, LayerCost("", "other", rest, 0, 0)))


def _check(
    seconds: float, bits: int | None, inputs: int | None, scope: str, convolutions: bool, dim: int
) -> int:
    """The samples."""
    if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a finite number above 0, got {seconds!r}")
    if bits is not None and bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, or None, got {bits!r}")
    if inputs is not None and inputs not in (*BITS, FLOAT_BITS):
        raise ValueError(f"inputs must be one of {(*BITS, FLOAT_BITS)}, or None, got {inputs!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    if bits is None and (inputs is not None or scope != "bit-l" or convolutions):
        raise ValueError(
            "bits must be given with inputs, scope or convolutions, got None with "
            f"{inputs}, {scope!r} and {convolutions}"
        )
    if type(dim) is not int or dim < 0:
        raise ValueError(f"final_dim must be an int >= 0, got {dim!r}")
    return round(seconds * SAMPLE_RATE)


def _configured(quantization: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, _Bits], bool]:
    """Bits of each kind, and whether queries, keys and values are shifted, as a config has it."""
    choices: dict[str, _Bits] = {}
    for kind, choice in quantization.items():
        if choice["mode"] != "float":
            inputs = choice.get("inputs") or ""
            # of fp8 the products are in floating point
            read = int(inputs.lstrip("uint")) if "int" in inputs else FLOAT_BITS
            choices[kind] = choice.get("bits", 4), read
    attention = quantization.get("attention", {})
    if matmuls := attention.get("attention_matmuls"):
        choices["attention_matmuls"] = (ATTENTION_BITS[matmuls],) * 2
    return choices, bool(matmuls and attention.get("attention_shift"))


class _Counter:
    """Forward hooks that write down what runs.

    Args:
        choices: bits of what is quantized, by kind.
        has_gains: whether each output channel of a quantized layer has one.
        has_shifts: whether queries, keys and values have one for each feature.
    """

    def __init__(self, choices: Mapping[str, _Bits], has_gains: bool, has_shifts: bool) -> None:
        self.choices, self.has_gains, self.has_shifts = choices, has_gains, has_shifts
        self.layers: list[LayerCost] = []

    def run(self, encoder: SpeechEncoder, samples: int) -> list[LayerCost]:
        """What runs on one utterance."""
        for name, module in encoder.named_modules():
            for kinds, count in (
                (nn.Linear | nn.Conv1d, self._layer),
                (SelfAttention | RelativeAttention, self._attention),
                (FbankFrontEnd | FbankConvFrontEnd, self._mel_filters),
            ):
                if isinstance(module, kinds):
                    module.register_forward_hook(partial(count, name))
        with torch.no_grad():
            encoder(torch.empty(1, samples))
        return self.layers

    def _add(self, name: str, kind: str, *args: Any) -> None:
        self.layers.append(LayerCost(name, kind, *args))

    def _layer(self, name: str, module: Any, args: Any, out: Tensor) -> None:
        kind, weights = module_kind(name) or "other", module.weight.numel()
        macs = out.numel() * module.weight[0].numel()
        is_waveform = isinstance(module, nn.Conv1d) and module.in_channels == 1
        if is_waveform or kind not in self.choices:
            self._add(name, kind, _size(module), 0, macs)
            return
        # a weight norm is part of what is quantized
        others = 0 if module.bias is None else module.bias.numel()
        others += len(module.weight) if self.has_gains else 0
        self._add(name, kind, weights + others, weights, macs, *self.choices[kind])

    def _attention(self, name: str, module: Any, args: Any, out: Tensor) -> None:
        kind, (_, T, C) = "attention_matmuls", out.shape
        macs, shifts = C * _seen(module, T), 3 * C if self.has_shifts else 0
        bits = self.choices.get(kind, (FLOAT_BITS, FLOAT_BITS))
        self._add(f"{name}.attend", kind, shifts, 0, 2 * macs, *bits)
        if isinstance(module, RelativeAttention):
            self._add(f"{name}.positions", kind, 0, 0, macs)

    def _mel_filters(self, name: str, module: Any, args: Any, out: Any) -> None:
        windows = (args[0].shape[1] - WINDOW) // HOP + 1
        macs = windows * (FFT // 2 + 1) * MEL_BINS
        self._add(f"{name}.mel_filters", "front_end", 0, 0, macs)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _seen(module: Any, T: int) -> int:
    """Pairs of a query's frame and a key's, as ``lowbit_kernels.attention.flops`` counts them."""
    block: int | None = getattr(module, "block", None)
    window: int | None = getattr(module, "window", None)
    if block is not None and block < T:
        return -(-T // block) * block**2
    return T * (T if window is None else min(T, 2 * window + 1))
