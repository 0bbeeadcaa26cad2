"""Digit word error rates: ``python -m ssl_models.digits.evaluate --model DIR --data DIR --json F``.

Dimension key: S strings, R resamples of a bootstrap.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lowbit_kernels import QuantConfig, quantize
from lowbit_kernels.cpu import cpu_backend
from ssl_models.digits.data import (
    HELD_OUT_SPEAKER,
    SAMPLE_RATE,
    TRAINING_SPEAKERS,
    DigitString,
    fixed_strings,
    load_fsdd,
    test_clips,
)

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Rate:
    """A word error rate and its 95 % bootstrap interval, as fractions."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model made of each of S strings: errors and words are [S]."""

    speakers: tuple[str, ...]
    hypotheses: tuple[str, ...]
    errors: NDArray[np.int64]
    words: NDArray[np.int64]

    def rate(self, *speakers: str) -> Rate:
        """The mean over ``speakers`` of their error rates; of all speakers if none is named."""
        parts = _parts(self.speakers, speakers)
        return _rate([(self.errors[part], self.words[part]) for part in parts])


def evaluate(model: Any, processor: Any, strings: Sequence[DigitString]) -> Evaluation:
    """Transcribe strings one at a time and count word errors.

    Args:
        model: a CTC model in float32, plain or quantized, called as ``model(audio).logits``.
        processor: its ``Wav2Vec2Processor``.
        strings: what to read.
    """
    hypotheses = tuple(transcribe(model, processor, string.audio) for string in strings)
    references = [string.text for string in strings]
    return Evaluation(
        speakers=tuple(string.speaker for string in strings),
        hypotheses=hypotheses,
        errors=_errors(references, hypotheses),
        words=_word_counts(references),
    )


@torch.inference_mode()
def transcribe(model: Any, processor: Any, audio: NDArray[np.float32]) -> str:
    """Greedy CTC transcript of audio [T] at 16 kHz."""
    model.eval()
    inputs = processor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    text: str = processor.batch_decode(model(inputs.input_values).logits.argmax(-1))[0]
    return text


def disagreement(reference: Evaluation, other: Evaluation, *speakers: str) -> Rate:
    """The word error rate of another model's transcripts against the reference model's."""
    errors = _errors(reference.hypotheses, other.hypotheses)
    words = _word_counts(reference.hypotheses)
    parts = _parts(reference.speakers, speakers)
    return _rate([(errors[part], words[part]) for part in parts])


def rate_change(reference: Evaluation, other: Evaluation, *speakers: str) -> Rate:
    """How much higher another model's error rate is, with the paired interval.

    Pairing resamples the same strings for both models: the spread among strings cancels.

    Raises:
        ValueError: the two evaluations are not of the same strings.
    """
    same_words = np.array_equal(reference.words, other.words)
    if reference.speakers != other.speakers or not same_words:
        raise ValueError(
            "other must evaluate the strings of reference, "
            f"got {len(other.words)} and {len(reference.words)} strings that differ"
        )
    change = other.errors - reference.errors
    parts = _parts(reference.speakers, speakers)
    return _rate([(change[part], reference.words[part]) for part in parts])


def _parts(all_speakers: Sequence[str], wanted: Sequence[str]) -> list[NDArray[np.int64]]:
    names = np.array(all_speakers)
    for speaker in wanted:
        if speaker not in all_speakers:
            raise ValueError(f"speaker must be in {sorted(set(all_speakers))}, got {speaker!r}")
    return [np.flatnonzero(names == name) for name in (wanted or sorted(set(all_speakers)))]


def _errors(references: Sequence[str], hypotheses: Sequence[str]) -> NDArray[np.int64]:
    """Substitutions, deletions and insertions of each string, [S]."""
    import jiwer

    found = list(map(jiwer.process_words, references, hypotheses))
    counts = [each.substitutions + each.deletions + each.insertions for each in found]
    return np.array(counts, dtype=np.int64)


def _word_counts(texts: Sequence[str]) -> NDArray[np.int64]:
    return np.array([len(text.split()) for text in texts], dtype=np.int64)


def _rate(parts: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Rate:
    """Mean over speakers of errors / words, and the interval over resampled strings."""
    rng = np.random.default_rng(0)
    value = np.mean([errors.sum() / max(1, words.sum()) for errors, words in parts])
    resampled = np.zeros(_RESAMPLES)
    for errors, words in parts:
        rows = rng.integers(len(errors), size=(_RESAMPLES, len(errors)))
        sums = errors[rows].sum(axis=1) / np.maximum(1, words[rows].sum(axis=1))
        resampled += sums / len(parts)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Rate(float(value), float(low), float(high))


def _configs() -> dict[str, QuantConfig]:
    """The quantized models that are reported, by the name of their row."""
    return {
        "8 bits": QuantConfig.small(8),
        "4 bits: small()": QuantConfig.small(),
        "4 bits, int8 inputs: fast()": QuantConfig.fast(),
        "8 bits, int8 inputs: fast(8)": QuantConfig.fast(8),
        "2 bits": QuantConfig.small(2),
        "1 bit": QuantConfig.small(1),
    }


def _named(rate: Callable[..., Rate]) -> dict[str, Rate]:
    return {
        "mean of training speakers": rate(*TRAINING_SPEAKERS),
        f"{HELD_OUT_SPEAKER} (held out)": rate(HELD_OUT_SPEAKER),
    }


def _table(rates: dict[str, Rate], quantized: dict[str, dict[str, dict[str, Rate]]]) -> Table:
    table = Table("", "digit word error rate", "change", "disagreement", box=None)
    for name, rate in rates.items():
        table.add_row(f"float32, {name}", str(rate))
    for config, found in quantized.items():
        for name, rate in found["rate"].items():
            others = (str(found[kind][name]) for kind in ("change", "disagreement"))
            table.add_row(f"{config}, {name}", str(rate), *others)
    return table


def main(
    model: Annotated[Path, typer.Option(help="folder of the exported model", exists=True)],
    data: Annotated[
        Path, typer.Option(help="folder of the Free Spoken Digit Dataset", exists=True)
    ],
    json_path: Annotated[Path, typer.Option("--json", help="where to write the result")],
    seed: Annotated[int, typer.Option(help="of the strings")] = 0,
    threads: int = 2,
) -> None:
    """Report the digit word error rates of a model, in float and quantized."""
    from transformers import Wav2Vec2ForCTC, Wav2Vec2Processor

    torch.set_num_threads(threads)
    network = Wav2Vec2ForCTC.from_pretrained(model, dtype=torch.float32)
    processor = Wav2Vec2Processor.from_pretrained(model)
    try:
        strings = fixed_strings(test_clips(load_fsdd(data)), seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    result = evaluate(network, processor, strings)
    rates = _named(result.rate) | {name: result.rate(name) for name in TRAINING_SPEAKERS}
    quantized = {}
    for name, config in _configs().items():
        copied = copy.deepcopy(network)
        quantize(copied, config)
        other = evaluate(copied, processor, strings)
        quantized[name] = {
            "rate": _named(other.rate),
            "disagreement": _named(partial(disagreement, result, other)),
            "change": _named(partial(rate_change, result, other)),
        }

    Console().print(_table(rates, quantized))
    content = {
        "command": "python -m ssl_models.digits.evaluate",
        "weights_sha256": hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "device": "cpu",
        "backend": cpu_backend(),
        "seed": seed,
        "strings": len(result.words),
        "digits": int(result.words.sum()),
        "rates": rates,
        "quantized": quantized,
    }
    unfinished = json_path.with_suffix(".partial")
    unfinished.write_text(json.dumps(content, indent=2, default=asdict) + "\n")
    os.replace(unfinished, json_path)


if __name__ == "__main__":
    typer.run(main)
