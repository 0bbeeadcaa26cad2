"""``lowbit compare``: how far a low-bit model is from its float model, on real audio.

Dimension key: B windows of a batch, T frames, D tokens or features.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit_kernels.cli.errors import CommandError, require
from lowbit_kernels.cli.inference import Failure, Run, cut_for_frames, forward, stream
from lowbit_kernels.cli.layer_errors import LayerError, LayerErrors
from lowbit_kernels.cli.output import Outcome, note
from lowbit_kernels.cli.speech import Speech
from lowbit_kernels.cli.transcribe import text_reader
from lowbit_kernels.cli.windows import Window
from lowbit_kernels.cli.words import WordErrors, word_errors


@dataclass
class Frames:
    """Frames compared so far.

    Args:
        count: frames.
        different: frames whose best token differs; ``None`` without a CTC head.
        signal, noise: sums of squares of the float outputs and of the differences.
    """

    count: int = 0
    different: int | None = None
    signal: float = 0.0
    noise: float = 0.0

    def add(self, wanted: Tensor, got: Tensor, tokens: bool) -> None:
        """Add frames [T, D] of both models."""
        self.count += len(wanted)
        if tokens:
            changed = int((wanted.argmax(-1) != got.argmax(-1)).sum())
            self.different = (self.different or 0) + changed
        self.signal += wanted.double().square().sum().item()
        self.noise += (got.double() - wanted.double()).square().sum().item()

    def merge(self, other: "Frames") -> None:
        """Add the frames of a file that is done."""
        self.count += other.count
        if other.different is not None:
            self.different = (self.different or 0) + other.different
        self.signal += other.signal
        self.noise += other.noise

    @property
    def disagreement(self) -> float | None:
        """The share of frames whose best token differs."""
        if self.different is None:
            return None
        return self.different / self.count if self.count else 0.0

    @property
    def error(self) -> float | None:
        """The norm of the differences over the norm of the float outputs; ``None`` without any."""
        if not self.count:
            return None
        return (self.noise / self.signal) ** 0.5 if self.signal else 0.0


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Args:
        frames: outputs of the two models, frame by frame.
        words: the low-bit model's transcripts against the float model's; ``None`` without text.
        float_wer, quantized_wer: against the texts given, over the same files.
        layers: every low-bit layer.
        files: one outcome a file: ``float``, ``quantized`` and ``reference`` texts, or ``error``.
    """

    frames: Frames
    words: WordErrors | None
    float_wer: WordErrors | None
    quantized_wer: WordErrors | None
    layers: tuple[LayerError, ...]
    files: tuple[Outcome, ...] = field(repr=False)

    @property
    def worst(self) -> float:
        """The largest disagreement, as a fraction: what ``--fail-above`` looks at."""
        shares = [self.frames.error if self.frames.different is None else self.frames.disagreement]
        if self.words:
            shares.append(self.words.rate)
        return max((share for share in shares if share is not None), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; rates are fractions."""
        return {
            "frames": self.frames.count,
            "frame_disagreement": self.frames.disagreement,
            "frame_error": self.frames.error,
            "transcripts": self.words and self.words.to_dict(),
            "float_wer": self.float_wer and self.float_wer.to_dict(),
            "quantized_wer": self.quantized_wer and self.quantized_wer.to_dict(),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "files": list(self.files),
        }


def compare(
    wanted: Speech, got: Speech, paths: Sequence[Path], texts: Mapping[str, str]
) -> Comparison:
    """Run both models on the same windows of audio.

    Args:
        wanted: the float model.
        got: the low-bit model; it reads the float model's processor.
        paths: audio files.
        texts: what is said, by path, file name or name without ending; may be empty.

    Raises:
        CommandError: if the models are not of one kind, or no text names a file.
    """
    got = dataclasses.replace(got, source=wanted.source)
    if type(wanted.model) is not type(got.model):
        kinds = f"{type(wanted.model).__name__} and {type(got.model).__name__}"
        raise CommandError(f"{wanted.name} and {got.name} must be one kind of model, got {kinds}")
    if wanted.kind != "encoder":
        require("jiwer", "audio")  # said before the work, not after it
    references = _references(paths, texts)
    layers, frames = LayerErrors(wanted.model, got.model), Frames()
    if not layers.pairs:
        note(f"note: {got.name} has no low-bit layers; the float model is named first")
    outcomes = _run(wanted, got, paths, layers, frames)
    for path, reference in references.items():
        if "error" not in outcomes[path]:
            outcomes[path]["reference"] = reference
    files = tuple(outcomes[path] for path in paths)
    return Comparison(
        frames,
        _between(files, "float", "quantized"),
        _between(files, "reference", "float") if references else None,
        _between(files, "reference", "quantized") if references else None,
        layers.results(),
        files,
    )


@dataclass
class _Open:
    """A file of which some windows are done: its frames, and what its texts are joined from."""

    frames: Frames = field(default_factory=Frames)
    wanted: list[Any] = field(default_factory=list)
    got: list[Any] = field(default_factory=list)

    def add(self, wanted: Any, got: Any, tokens: bool) -> None:
        """Add one window of both models: frames, or text."""
        if isinstance(wanted, Tensor):
            self.frames.add(wanted, got, tokens)
            wanted, got = wanted.argmax(-1).tolist(), got.argmax(-1).tolist()
        self.wanted.append(wanted)
        self.got.append(got)


def _run(
    wanted: Speech, got: Speech, paths: Sequence[Path], layers: LayerErrors, frames: Frames
) -> dict[Path, Outcome]:
    """Fill ``layers`` and ``frames``; return the outcomes with both transcripts."""
    reads = wanted.kind != "encoder"
    if reads:
        _, cut, join = text_reader(wanted)
    else:
        cut = cut_for_frames(wanted)
    opened: dict[Path, _Open] = {}
    outcomes: dict[Path, Outcome] = {}
    for event in stream(paths, wanted, _run_both(wanted, got, layers), cut, "comparing"):
        outcome: Outcome = {"file": str(event.path)}
        if isinstance(event, Failure):
            opened.pop(event.path, None)
            outcomes[event.path] = outcome | {"error": event.reason}
            continue
        file = opened.setdefault(event.path, _Open())
        outputs, others = event.value
        file.add(outputs, others, wanted.kind == "ctc")
        if event.last:
            frames.merge(opened.pop(event.path).frames)
            if reads:
                outcome |= {"float": join(file.wanted), "quantized": join(file.got)}
            outcomes[event.path] = outcome
    return outcomes


def _run_both(wanted: Speech, got: Speech, layers: LayerErrors) -> Run:
    """What runs a batch through both models, and watches the layers on the first batch."""
    if wanted.kind == "seq2seq":
        run_wanted, run_got = text_reader(wanted)[0], text_reader(got)[0]
    elif wanted.kind == "ctc":
        run_wanted = partial(forward, wanted, wanted.logits)
        run_got = partial(forward, got, got.logits)
    else:
        run_wanted = partial(forward, wanted, wanted.frames)
        run_got = partial(forward, got, got.frames)

    def run(windows: Sequence[Window]) -> list[tuple[Any, Any]]:
        with layers.watch_once():
            outputs = run_wanted(windows)
        return list(zip(outputs, run_got(windows), strict=True))

    return run


def _references(paths: Sequence[Path], texts: Mapping[str, str]) -> dict[Path, str]:
    found = {}
    for path in paths:
        for name in (str(path), path.name, path.stem):
            if name in texts:
                found[path] = texts[name]
                break
    if texts and not found:
        raise CommandError(f"--texts names none of the files; it has {next(iter(texts))!r}, ...")
    return found


def _between(files: Sequence[Outcome], reference: str, hypothesis: str) -> WordErrors | None:
    pairs = [(f[reference], f[hypothesis]) for f in files if reference in f and hypothesis in f]
    return word_errors(pairs) if pairs else None
