"""error_propagation(model, audio): which kind of layer makes which error, block by block.

Dimension key: T frames, C channels, V tokens.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels import QuantConfig, QuantSpec, quantize
from lowbit_kernels.modules import QuantizedModule
from ssl_models.error_propagation.interventions import swapped
from ssl_models.error_propagation.measures import (
    additivity,
    decibels,
    linear_cka,
    noise_to_signal,
    token_disagreement,
)
from ssl_models.error_propagation.sources import find_blocks, find_sources, modules_of, rest_of
from ssl_models.error_propagation.trace import Forward, Trace, trace

KINDS = ("attention", "feed_forward", "conv", "rate")
ALL = "all"


@dataclass(frozen=True)
class KindError:
    """The error that one kind of layer makes, means over utterances.

    Attributes:
        layers: how many were quantized.
        noise_to_signal_db: of each block's output, of the mean of ratios over utterances.
        similarity: linear CKA of each block's output with the float model's.
        end_db: noise to signal of what the model gives.
        disagreement: share of frames with another best token; None where these are no tokens.
    """

    layers: int
    noise_to_signal_db: tuple[float, ...]
    similarity: tuple[float, ...]
    end_db: float
    disagreement: float | None


@dataclass(frozen=True)
class ErrorPropagation:
    """What ``error_propagation`` found.

    Attributes:
        blocks: dotted names.
        kinds: by ``"attention"``, ``"feed_forward"``, ``"conv"``, ``"rate"`` (a Squeezeformer's),
            ``"front_end"`` (all before the first block) and ``"all"``; those that there are.
        ratio: the error of all kinds over the sum of the energies of each, a block: 1 where
            independent errors add up, above where they make each other larger.
        interaction: share of that error which the sum of the errors alone does not explain, a
            block.
        utterances: how many were run.
    """

    blocks: tuple[str, ...]
    kinds: Mapping[str, KindError]
    ratio: tuple[float, ...]
    interaction: tuple[float, ...]
    utterances: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; decibels of no error at all are None."""
        found: dict[str, Any] = _finite(asdict(self))
        return found


def error_propagation(
    model: nn.Module,
    audio: Iterable[Any],
    config: QuantConfig | QuantSpec | None = None,
    *,
    forward: Forward | None = None,
    has_tokens: bool | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> ErrorPropagation:
    """Quantize one kind of layer at a time, and all together, and follow the error through blocks.

    Each error is the difference of a block's output from the float model's on the same audio.

    Args:
        model: an encoder in float with blocks as ``find_blocks`` describes them: of this package,
            or of transformers' wav2vec2 family, Conformers or Whisper. It is left as it is.
        audio: utterances [T] of samples at 16 kHz, or whatever ``forward`` takes.
        config: how layers are quantized, as for ``quantize``.
        forward: runs a model on an utterance, giving logits or frames [1, T, V]; blocks that give
            more frames than the model are cut to its T. None: calls ``model(audio[None])`` and
            takes its ``logits``, ``last_hidden_state`` or first item.
        has_tokens: whether these are logits over tokens. None: whether the model has ``logits``.
        progress: called with the number of utterances done.

    Raises:
        ValueError: for a model without such blocks or with quantized layers, a config that
            quantizes nothing in it, or no audio.
    """
    blocks, sources = find_blocks(model), find_sources(model)
    low_bit = [name for name, m in model.named_modules() if isinstance(m, QuantizedModule)]
    if low_bit:
        raise ValueError(f"model must be in float, got low-bit layers: {low_bit[0]}, ...")
    run = forward or run_model
    model = copy.deepcopy(model).eval()
    donor = copy.deepcopy(model)
    report = quantize(donor, config)
    kinds = {kind: modules_of([s for s in sources if s.kind == kind]) for kind in KINDS}
    kinds["front_end"] = rest_of(donor, sources)
    quantized = [layer.name for layer in report.layers if layer.spec is not None]
    layers = {kind: _count(quantized, names) for kind, names in kinds.items()}
    kinds = {kind: names for kind, names in kinds.items() if layers[kind]}
    if not kinds:
        raise ValueError("config must quantize a layer of the model's blocks, got one without any")
    kinds[ALL] = tuple(name for names in kinds.values() for name in names)
    rows: dict[str, list[Any]] = {kind: [] for kind in kinds}
    sums: list[list[tuple[float, float]]] = []
    for done, utterance in enumerate(audio, start=1):
        if has_tokens is None:
            with torch.inference_mode():
                has_tokens = hasattr(model(utterance[None]), "logits")
        expected = trace(model, run, utterance, blocks)
        deltas: dict[str, list[Tensor]] = {}
        for kind, names in kinds.items():
            with swapped(model, donor, names):
                got = trace(model, run, utterance, blocks)
            pairs = [_frames(got, expected, block) for block in blocks]
            deltas[kind] = [a - b for a, b in pairs]
            rows[kind].append(
                (
                    [noise_to_signal(a - b, b) for a, b in pairs],
                    [linear_cka(a, b) for a, b in pairs],
                    noise_to_signal(got.end[0] - expected.end[0], expected.end[0]),
                    token_disagreement(got.end[0], expected.end[0]),
                )
            )
        parts = [deltas[kind] for kind in kinds if kind != ALL]
        found = [
            additivity(*each) for each in zip(deltas[ALL], zip(*parts, strict=True), strict=True)
        ]
        sums.append([(a.ratio, a.interaction) for a in found])
        progress(done)
    if not sums:
        raise ValueError("audio must hold at least one utterance, got none")
    mean = torch.tensor(sums, dtype=torch.float64).mean(0)
    return ErrorPropagation(
        blocks=blocks,
        kinds={
            kind: _summary(layers.get(kind, len(quantized)), rows[kind], bool(has_tokens))
            for kind in kinds
        },
        ratio=tuple(mean[:, 0].tolist()),
        interaction=tuple(mean[:, 1].tolist()),
        utterances=len(sums),
    )


def run_model(model: nn.Module, utterance: Tensor) -> Tensor:
    """Logits or frames [1, T, V] of one utterance."""
    out: Any = model(utterance[None])
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(out, name, None), Tensor):
            return found
    first: Tensor = out[0]
    return first


def _frames(got: Trace, expected: Trace, block: str) -> tuple[Tensor, Tensor]:
    """What a block gave in both, [T, C], without what is padding in the end."""
    T = expected.end.shape[1]
    return got.outputs[block][0, :T], expected.outputs[block][0, :T]


def _count(layers: Iterable[str], names: Iterable[str]) -> int:
    prefixes = tuple(f"{name}." for name in names)
    return sum(f"{layer}.".startswith(prefixes) for layer in layers) if prefixes else 0


def _summary(layers: int, rows: list[Any], has_tokens: bool) -> KindError:
    ratios, similarity, end, disagreement = (
        torch.tensor(column, dtype=torch.float64).mean(0) for column in zip(*rows, strict=True)
    )
    return KindError(
        layers,
        tuple(map(decibels, ratios.tolist())),
        tuple(similarity.tolist()),
        decibels(end.item()),
        disagreement.item() if has_tokens else None,
    )


def _finite(value: Any) -> Any:
    """With None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and abs(value) == float("inf") else value
