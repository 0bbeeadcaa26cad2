"""``lowbit demo``: what low bits cost and gain, on a model that is shipped, in under a minute.

Dimension key: T frames, V tokens.
"""

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit_kernels.cli.env import describe_device
from lowbit_kernels.cli.errors import CommandError, require
from lowbit_kernels.cli.inference import forward
from lowbit_kernels.cli.load import load_speech, quiet_transformers
from lowbit_kernels.cli.output import progress
from lowbit_kernels.cli.speech import Speech
from lowbit_kernels.cli.windows import Window
from lowbit_kernels.cli.words import word_errors
from lowbit_kernels.conversion import quantize
from lowbit_kernels.formats import QuantConfig

SECONDS = 10
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 7
# no round starts after this, so that a slow machine is done within the minute too
_TIMING_BUDGET_SECONDS = 15.0


@dataclass(frozen=True)
class Reading:
    """What one variant of the shipped model makes of the shipped clips.

    Args:
        variant: how the model is stored.
        checkpoint_bytes: of its safetensors.
        texts: one a clip.
        errors, words: word errors, and words said.
        agreement: the share of frames with the float model's token.
    """

    variant: str
    checkpoint_bytes: int
    texts: tuple[str, ...]
    errors: int
    words: int
    agreement: float


@dataclass(frozen=True)
class Timing:
    """Seconds that one variant takes for ten seconds of audio."""

    variant: str
    median_seconds: float
    speed_up: float
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Demo:
    """All that the demo found."""

    device: str
    said: tuple[str, ...]
    readings: tuple[Reading, ...]
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)


def run_demo(device: torch.device) -> Demo:
    """Read the shipped clips and time wav2vec2-base's shapes, in float and in low bits.

    Raises:
        CommandError: if the shipped checkpoint is not part of this installation.
    """
    with progress("steps") as bar:
        task = bar.add_task("reading the shipped clips", total=3)
        said, readings = _read_clips(device)
        bar.update(task, advance=1, description="building wav2vec2-base's shapes")
        models = _base_shapes(device)
        bar.update(task, advance=1, description=f"timing {SECONDS} s of audio")
        timings = _time(models, device)
        bar.advance(task)
    return Demo(describe_device(device), said, readings, timings)


def _read_clips(device: torch.device) -> tuple[tuple[str, ...], tuple[Reading, ...]]:
    require("soundfile", "audio")
    from ssl_models.digits import checkpoint_path, load_clips

    if not (checkpoint_path() / "config.json").is_file():
        raise CommandError(
            f"the shipped checkpoint is missing: no config.json in {checkpoint_path()}"
        )
    clips = load_clips()
    said = tuple(clip.text for clip in clips)
    windows = [Window(clip.audio, 0, None, len(clip.audio), last=True) for clip in clips]
    plain = load_speech(str(checkpoint_path()), device)
    readings: list[Reading] = []
    wanted: list[list[int]] = []
    for variant, config in (
        (_float_name(device), None),
        ("int8", QuantConfig.fast(8)),
        ("int4", QuantConfig.small()),
    ):
        speech = dataclasses.replace(plain, model=copy.deepcopy(plain.model))
        if config is not None:
            quantize(speech.model, config)
        with torch.inference_mode():
            best = [x.argmax(-1).tolist() for x in forward(speech, speech.logits, windows)]
        wanted = wanted or best
        texts = tuple(speech.decode(tokens) for tokens in best)
        found = word_errors(zip(said, texts, strict=True))
        readings.append(
            Reading(
                variant,
                _checkpoint_bytes(speech),
                texts,
                found.errors,
                found.words,
                _agreement(wanted, best),
            )
        )
    return said, tuple(readings)


def _float_name(device: torch.device) -> str:
    return "float16" if device.type == "cuda" else "float32"


def _agreement(wanted: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> float:
    pairs = [(a, b) for x, y in zip(wanted, got, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1)


def _checkpoint_bytes(speech: Speech) -> int:
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        speech.model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _base_shapes(device: torch.device) -> dict[str, torch.nn.Module]:
    """wav2vec2-base with random weights, in float and in both presets."""
    transformers = require("transformers", "hf")
    torch.manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    plain = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config()).eval().to(device, dtype)
    models: dict[str, torch.nn.Module] = {_float_name(device): plain}
    for preset, config in (("small", QuantConfig.small()), ("fast", QuantConfig.fast())):
        models[preset] = copy.deepcopy(plain)
        quantize(models[preset], config)
    return models


@torch.inference_mode()
def _time(models: dict[str, torch.nn.Module], device: torch.device) -> tuple[Timing, ...]:
    """Time the models in turns, so that a change of the machine's load meets them all."""
    audio = torch.randn(1, SECONDS * 16_000, device=device).to(
        torch.float16 if device.type == "cuda" else torch.float32
    )
    seconds: dict[str, list[float]] = {name: [] for name in models}
    start = time.perf_counter()
    for model in models.values():
        model(audio)  # the first call unpacks weights and fills caches
    for count in range(_MOST_ROUNDS):
        if count >= _LEAST_ROUNDS and time.perf_counter() - start > _TIMING_BUDGET_SECONDS:
            break
        for name, model in models.items():
            seconds[name].append(_elapsed(lambda model=model: model(audio), device))  # type: ignore[misc]
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    base = next(iter(medians.values()))
    return tuple(
        Timing(name, medians[name], base / medians[name], tuple(seconds[name])) for name in models
    )


def _elapsed(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
