"""SpeechEncoderConfig: what a speech encoder is made of, as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ssl_models.module_kinds import check_quantization

KINDS = ("transformer", "conformer", "squeezeformer", "sparseformer")
CONV_NORMS = ("group", "layer")
ACTIVATIONS = ("gelu", "silu", "relu")
WINDOWS = ("sliding", "block")

# channels, kernel sizes and strides of convolutional front ends, each 320 samples a frame
FRONT_ENDS: dict[str, tuple[tuple[int, ...], ...]] = {
    # arXiv 2006.11477
    "wav2vec2": ((512,) * 7, (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)),
    # arXiv 2109.06870
    "sew": (
        (64, *(128,) * 4, *(256,) * 4, *(512,) * 4),
        (10, 3, 1, 3, 1, 3, 1, 3, 1, 2, 1, 2, 1),
        (5, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1),
    ),
}


@dataclass(frozen=True)
class SpeechEncoderConfig:
    """Dimensions and choices of a ``SpeechEncoder``; the defaults are wav2vec2-base's and HuBERT's.

    Attributes:
        kind: ``"transformer"``, ``"conformer"``, ``"squeezeformer"`` or ``"sparseformer"``, a
            Transformer whose attention is local.
        front_end: ``"wav2vec2"`` or ``"sew"``, the convolutions over the waveform, or ``"fbank"``,
            log mel energies.
        conv_norm: ``"group"``, a GroupNorm after the first convolution, or ``"layer"``, a
            LayerNorm after each.
        conv_bias: whether these convolutions have one.
        conv_dims: their channels, kernel sizes and strides; None: those of ``front_end``. With
            ``"fbank"``, of convolutions over windows of mel energies, 100 a second; None: two
            windows make a frame.
        conv_kernels: see ``conv_dims``.
        conv_strides: see ``conv_dims``.
        hidden_size: C.
        num_layers: of the encoder.
        num_heads: divides C.
        feed_forward_size: between the two linear layers of a feed-forward block.
        activation: ``"gelu"``, ``"silu"`` (Swish) or ``"relu"``, of feed-forward blocks and
            convolution modules; that of the front end is GELU.
        norm_first: pre-norm instead of post-norm, of a Transformer or Sparseformer.
        position_kernel: taps of the convolution that stands for positions, of the same two.
        position_groups: of that convolution, divides C.
        position_layers: None: one with weight norm; else so many without, each with a LayerNorm
            without parameters, as in data2vec.
        position_buckets: of a Transformer: rows of a table of attention biases, one for each bucket
            of offsets, weighed by gates, as in WavLM; even, 4 or more. None: no such bias.
        position_distance: the offset from which on all share the last bucket.
        window: ``"sliding"`` or ``"block"``, of a Sparseformer's attention.
        window_frames: what a frame sees on each side of itself, or the frames of a block.
        depthwise_kernel: taps of a convolution module's depthwise convolution, odd.
        reduce_layer: of a Squeezeformer: the layer from which on every second frame is left; None:
            the rate stays.
        recover_layer: the layer before which the rate is as it was.
        reduce_kernel: taps of the convolution that halves the rate, odd: 3 in the paper, 5 in its
            code.
        dropout: probability, of what is added to the residual and of activations.
        attention_dropout: probability, of attention weights.
        quantization: kinds of layers, ``"attention"``, ``"feed_forward"``, ``"conv"`` or
            ``"front_end"``, to ``{"mode": "float"}`` (as without an entry), ``"qat"`` (layers that
            train in low bits, see ``prepare_qat``) or ``"packed"`` (see ``quantize``), and with the
            last two ``QuantSpec``'s arguments and ``"overrides"`` of them by patterns, such as
            ``{"output_dense": {"inputs": "uint1"}}`` behind a ReLU, or to None; with ``"qat"`` a
            ``"quantizer"``, too, and of attention ``"attention_matmuls"`` and
            ``"attention_shift"``, as in ``QuantConfig``.

    Raises:
        ValueError: naming the key, the rule and the value.
    """

    kind: str = "transformer"
    front_end: str = "wav2vec2"
    conv_norm: str = "group"
    conv_bias: bool = False
    conv_dims: tuple[int, ...] | None = None
    conv_kernels: tuple[int, ...] | None = None
    conv_strides: tuple[int, ...] | None = None
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    feed_forward_size: int = 3072
    activation: str = "gelu"
    norm_first: bool = False
    position_kernel: int = 128
    position_groups: int = 16
    position_layers: int | None = None
    position_buckets: int | None = None
    position_distance: int = 800
    window: str = "sliding"
    window_frames: int = 32
    depthwise_kernel: int = 31
    reduce_layer: int | None = None
    recover_layer: int | None = None
    reduce_kernel: int = 3
    dropout: float = 0.1
    attention_dropout: float = 0.1
    quantization: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_one_of(self, "kind", KINDS)
        _check_one_of(self, "front_end", (*FRONT_ENDS, "fbank"))
        _check_one_of(self, "conv_norm", CONV_NORMS)
        _check_one_of(self, "activation", ACTIVATIONS)
        _check_one_of(self, "window", WINDOWS)
        for name in ("conv_bias", "norm_first"):
            _check(self, name, isinstance(getattr(self, name), bool), "True or False")
        for name in (
            "hidden_size", "num_layers", "num_heads", "feed_forward_size", "position_kernel",
            "position_groups", "position_distance", "window_frames", "depthwise_kernel",
            "reduce_kernel",
        ):  # fmt: skip
            _check(self, name, _is_count(getattr(self, name)), "an int >= 1")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            _check(self, name, isinstance(value, int | float) and 0 <= value < 1, "in [0, 1)")
        is_relative = self.kind in ("conformer", "squeezeformer")
        for name in ("num_heads",) if is_relative else ("num_heads", "position_groups"):
            divides = self.hidden_size % getattr(self, name) == 0
            _check(self, name, divides, f"a divisor of hidden_size {self.hidden_size}")
        if is_relative:
            _check(self, "hidden_size", self.hidden_size % 2 == 0, f"even in a {self.kind}")
        for name in ("depthwise_kernel", "reduce_kernel"):
            _check(self, name, getattr(self, name) % 2 == 1, "odd")
        self._check_positions()
        self._check_convolutions()
        self._check_rates()
        object.__setattr__(self, "quantization", check_quantization(self.quantization))

    def _check_positions(self) -> None:
        layers, buckets = self.position_layers, self.position_buckets
        _check(self, "position_layers", layers is None or _is_count(layers), "None or an int >= 1")
        if buckets is None:
            return
        is_even = type(buckets) is int and buckets >= 4 and buckets % 2 == 0
        _check(self, "position_buckets", is_even, "None or an even int >= 4")
        _check(self, "position_buckets", self.kind == "transformer", "None but for a transformer")
        is_far = self.position_distance > buckets // 4
        _check(self, "position_distance", is_far, f"above a quarter of {buckets} buckets")

    def _check_convolutions(self) -> None:
        given = {
            name: getattr(self, name) for name in ("conv_dims", "conv_kernels", "conv_strides")
        }
        if all(value is None for value in given.values()):
            return
        for name, value in given.items():
            are_counts = isinstance(value, list | tuple) and all(map(_is_count, value))
            _check(self, name, are_counts, "ints >= 1, like the rest of conv_*")
            # JSON has lists
            object.__setattr__(self, name, tuple(value))
        lengths = {name: len(value) for name, value in given.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"conv_dims, conv_kernels, conv_strides must match, got {lengths}")

    def _check_rates(self) -> None:
        reduce, recover = self.reduce_layer, self.recover_layer
        if reduce is None and recover is None:
            return
        _check(self, "reduce_layer", self.kind == "squeezeformer", "None but for a squeezeformer")
        _check(self, "reduce_layer", _is_count(reduce), "an int >= 1, or None with recover_layer")
        rule = f"an int between reduce_layer {reduce} and num_layers {self.num_layers}"
        assert reduce is not None, "checked above"
        is_after = type(recover) is int and reduce < recover < self.num_layers
        _check(self, "recover_layer", is_after, rule)

    @property
    def conv_layers(self) -> tuple[tuple[int, int, int], ...]:
        """Channels, kernel size and stride of each convolution of the front end, if it has some."""
        if self.conv_dims is None or self.conv_kernels is None or self.conv_strides is None:
            if self.front_end == "fbank":
                return ()
            return tuple(zip(*FRONT_ENDS[self.front_end], strict=True))  # type: ignore[arg-type]
        return tuple(zip(self.conv_dims, self.conv_kernels, self.conv_strides, strict=True))

    def to_json(self) -> str:
        """As JSON, which ``from_json`` reads."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """A config from JSON; keys that are missing have their defaults.

        Raises:
            ValueError: naming the key, the rule and the value; or for what is no JSON object.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text must be JSON, got {text[:80]!r}: {error}") from None
        if not isinstance(values, Mapping):
            raise ValueError(f"text must be a JSON object, got {text[:80]!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"{key} must be one of {known}, got it with {value!r}")
        return cls(**values)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _check(config: SpeechEncoderConfig, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {getattr(config, name)!r}")


def _check_one_of(config: SpeechEncoderConfig, name: str, values: tuple[str, ...]) -> None:
    _check(config, name, getattr(config, name) in values, f"one of {values}")
