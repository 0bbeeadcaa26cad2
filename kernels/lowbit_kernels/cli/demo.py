"""``lowbit demo``: what low bits cost and gain, on a model that is shipped, in under a minute.

Dimension key: T frames, V tokens.
"""

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from lowbit_kernels.cli.env import describe_device
from lowbit_kernels.cli.errors import CommandError, require
from lowbit_kernels.cli.inference import forward
from lowbit_kernels.cli.load import float_type, load_speech, quiet_transformers
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
        (_name(device), None),
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
        found, size = word_errors(zip(said, texts, strict=True)), _checkpoint_bytes(speech)
        same = _agreement(wanted, best)
        readings.append(Reading(variant, size, texts, found.errors, found.words, same))
    return said, tuple(readings)


def _agreement(wanted: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> float:
    pairs = zip(chain(*wanted), chain(*got), strict=True)
    return statistics.fmean(a == b for a, b in pairs)


def _checkpoint_bytes(speech: Speech) -> int:
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        speech.model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _base_shapes(device: torch.device) -> dict[str, torch.nn.Module]:
    """wav2vec2-base with random weights, in float and in both presets."""
    transformers = require("transformers", "hf")
    torch.manual_seed(0)
    plain = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config())
    plain = plain.eval().to(device, float_type(device))
    models: dict[str, torch.nn.Module] = {_name(device): plain}
    for preset, config in (("small", QuantConfig.small()), ("fast", QuantConfig.fast())):
        models[preset] = copy.deepcopy(plain)
        quantize(models[preset], config)
    return models


def _name(device: torch.device) -> str:
    return str(float_type(device)).removeprefix("torch.")


@torch.inference_mode()
def _time(models: dict[str, torch.nn.Module], device: torch.device) -> tuple[Timing, ...]:
    """Time the models in turns, so that a change of the machine's load meets them all."""
    audio = torch.randn(1, SECONDS * 16_000, device=device).to(float_type(device))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    start = time.perf_counter()
    for model in models.values():
        model(audio).last_hidden_state.sum().item()  # the first unpacks weights and fills caches
    for count in range(_MOST_ROUNDS):
        if count >= _LEAST_ROUNDS and time.perf_counter() - start > _TIMING_BUDGET_SECONDS:
            break
        for name, model in models.items():
            began = time.perf_counter()
            model(audio)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    base = next(iter(medians.values()))
    return tuple(
        Timing(name, medians[name], base / medians[name], tuple(seconds[name])) for name in models
    )


def view_demo(found: Demo) -> Group:
    """The device, what the shipped model reads, and the times."""
    return Group(
        Text(f"Running on {found.device}\n", style="dim"),
        "[bold]The shipped model reads digits, spoken by synthetic voices[/]",
        _reading_table(found.readings),
        "",
        _text_table(found.said, found.readings),
        f"[bold]{SECONDS} s of audio through wav2vec2-base's shapes, random weights[/]",
        _timing_table(found.timings),
    )


def _reading_table(readings: Sequence[Reading]) -> Table:
    table = _table("word errors", "frames as float", "checkpoint", "of float")
    whole = readings[0].checkpoint_bytes
    for reading in readings:
        table.add_row(
            reading.variant,
            f"{reading.errors} of {reading.words}",
            f"{reading.agreement:.1%}",
            f"{reading.checkpoint_bytes / 1e6:.2f} MB",
            f"{reading.checkpoint_bytes / whole:.2f}",
        )
    return table


def _text_table(said: Sequence[str], readings: Sequence[Reading]) -> Table:
    """What was said, and below it each transcript with the variants that gave it."""
    said_by = Column(style="dim", no_wrap=True)
    table = Table.grid(said_by, Column(overflow="fold"), padding=(0, 2, 0, 1), pad_edge=True)
    for number, text in enumerate(said):
        table.add_row("said", Text(text, style="bold"))
        variants: dict[str, list[str]] = {}
        for reading in readings:
            variants.setdefault(reading.texts[number], []).append(reading.variant)
        for got, names in variants.items():
            style = "green" if got.split() == text.split() else "red"
            table.add_row(", ".join(names), Text(got or "(nothing)", style=style))
        table.add_row()
    return table


def _timing_table(timings: Sequence[Timing]) -> Table:
    table = _table("median time", "speed-up")
    for timing in timings:
        style = "green" if timing.speed_up >= 1 else "default"
        table.add_row(
            timing.variant,
            f"{timing.median_seconds * 1000:.0f} ms",
            f"[{style}]{timing.speed_up:.2f}x[/]",
        )
    return table


def _table(*columns: str) -> Table:
    right = (Column(column, justify="right") for column in columns)
    return Table(Column("variant", style="bold cyan"), *right, box=None)
