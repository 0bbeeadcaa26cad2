"""The same measures of models with real weights, on read speech."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.experiment.data import Utterance
from bench.experiment.measure import measure, subject_of
from bench.experiment.real_models import HAMA_SLOTS, load_hama, load_whisper
from bench.experiment.record import columns
from lowbit_kernels import QuantSpec
from ssl_models.digits.data import SAMPLE_RATE
from ssl_models.error_propagation import error_propagation

WHISPER_BITS = (8, 4)
# samples of a frame
_WHISPER_FRAME = 320

Progress = Callable[[int], None]


def measure_hama(path: Path, speech: Sequence[Utterance], progress: Progress) -> dict[str, Any]:
    """Everything that a model of the experiment is measured by, but products of attention."""
    model = load_hama(path)
    blank = model.classifier.out_features - 1

    def decode(logits: Tensor) -> list[int]:
        best = torch.unique_consecutive(logits.argmax(-1))
        return [int(each) for each in best[best != blank]]

    subject = subject_of(model, HAMA_SLOTS, decode, ("stem",), {})
    rows = []
    for done, each in enumerate(speech, start=1):
        rows.append(measure(subject, each, seed=0, gains=True))
        progress(done)
    return columns(rows) | {
        "kinds": [source.kind for source in subject.sources],
        "sources_of": [source.name for source in subject.sources],
        "blocks_of": list(subject.blocks),
    }


def measure_whisper(
    parts: list[Path], speech: Sequence[Utterance], progress: Progress
) -> dict[str, Any]:
    """Errors of attention, feed-forward and both, at 8 and 4 bits, over the frames of speech."""
    from transformers import WhisperFeatureExtractor

    model, extract = load_whisper(parts), WhisperFeatureExtractor()

    def forward(network: Any, utterance: Utterance) -> Tensor:
        audio = utterance.audio
        features = extract(audio.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        frames: Tensor = network(features.input_features).last_hidden_state
        return frames[:, : len(audio) // _WHISPER_FRAME]

    return {
        f"w{bits}": error_propagation(
            model, speech, QuantSpec(bits=bits, inputs="int8"), forward=forward, has_tokens=False,
            progress=progress,
        ).to_dict()
        for bits in WHISPER_BITS
    }  # fmt: skip
