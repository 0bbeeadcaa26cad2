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

from lowbit_kernels.cli.audio import find_audio
from lowbit_kernels.cli.errors import CommandError, require
from lowbit_kernels.cli.inference import Run, cut_for_frames, forward, read_files
from lowbit_kernels.cli.layer_errors import LayerError, LayerErrors
from lowbit_kernels.cli.load import find_device, load_speech
from lowbit_kernels.cli.output import Outcome, note
from lowbit_kernels.cli.speech import Speech
from lowbit_kernels.cli.transcribe import text_reader
from lowbit_kernels.cli.windows import Window
from lowbit_kernels.cli.words import WordErrors, read_texts, word_errors


@dataclass(frozen=True)
class Frames:
    """Frames of both models, compared.

    Args:
        count: frames.
        different: frames whose best token differs; ``None`` without a CTC head.
        signal, noise: sums of squares of the float outputs and of the differences.
    """

    count: int = 0
    different: int | None = None
    signal: float = 0.0
    noise: float = 0.0

    def __add__(self, other: "Frames") -> "Frames":
        known = [each.different for each in (self, other) if each.different is not None]
        return Frames(
            self.count + other.count,
            sum(known) if known else None,
            self.signal + other.signal,
            self.noise + other.noise,
        )

    @property
    def disagreement(self) -> float | None:
        """The share of frames whose best token differs."""
        return None if self.different is None else self.different / max(self.count, 1)

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
        names: of the two models and the device.
        frames: outputs of the two models, frame by frame.
        words: the low-bit model's transcripts against the float model's; ``None`` without text.
        float_wer, quantized_wer: against the texts given, over the same files.
        layers: every low-bit layer.
        files: one outcome a file: ``float``, ``quantized`` and ``reference`` texts, or ``error``.
    """

    names: dict[str, str]
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
        return self.names | {
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
    float_model: str, quantized: str, audio: Sequence[Path], texts: Path | None, device: str | None
) -> Comparison:
    """Run both models on the same windows of audio.

    Args:
        float_model: a hub id, a folder, or a low-bit checkpoint.
        quantized: the low-bit model; it reads the float model's processor.
        audio: files, and folders of them.
        texts: a file of what is said, by path, file name or name without ending.
        device: ``None`` takes a GPU if there is one.

    Raises:
        CommandError: if something named is not there, the models are not of one kind, or no text
            names a file.
    """
    paths, known = find_audio(audio), read_texts(texts) if texts else {}
    place = find_device(device)
    wanted, got = load_speech(float_model, place), load_speech(quantized, place)
    got = dataclasses.replace(got, source=wanted.source)
    if type(wanted.model) is not type(got.model):
        kinds = f"{type(wanted.model).__name__} and {type(got.model).__name__}"
        raise CommandError(f"{wanted.name} and {got.name} must be one kind of model, got {kinds}")
    cut, join = cut_for_frames(wanted), None
    if wanted.kind != "encoder":
        require("jiwer", "audio")  # said before the work, not after it
        _, cut, join = text_reader(wanted)
    references = _references(paths, known)
    layers, frames = LayerErrors(wanted.model, got.model), Frames()
    if not layers.pairs:
        note(f"note: {got.name} has no low-bit layers; the float model is named first")

    def finish(windows: list[tuple[Frames, Any, Any]]) -> Outcome:
        nonlocal frames
        parts, ours, theirs = map(list, zip(*windows, strict=True))
        frames = sum(parts, frames)
        return {"float": join(ours), "quantized": join(theirs)} if join else {}

    files = read_files(paths, wanted, _run_both(wanted, got, layers), cut, "comparing", finish)
    for path, file in zip(paths, files, strict=True):
        if path in references and "error" not in file:
            file["reference"] = references[path]
    return Comparison(
        {"float": float_model, "quantized": quantized, "device": str(place)},
        frames,
        _between(files, "float", "quantized"),
        _between(files, "reference", "float"),
        _between(files, "reference", "quantized"),
        layers.results(),
        tuple(files),
    )


def _run_both(wanted: Speech, got: Speech, layers: LayerErrors) -> Run:
    """What runs a batch through both models, and watches the layers on the first batch."""
    ctc = wanted.kind == "ctc"
    run_wanted, run_got = (
        text_reader(each)[0]
        if each.kind == "seq2seq"
        else partial(forward, each, each.logits if ctc else each.frames)
        for each in (wanted, got)
    )

    def run(windows: Sequence[Window]) -> list[tuple[Frames, Any, Any]]:
        with layers.watch_once():
            outputs = run_wanted(windows)
        return [_compare(*pair, ctc) for pair in zip(outputs, run_got(windows), strict=True)]

    return run


def _compare(wanted: Any, got: Any, ctc: bool) -> tuple[Frames, Any, Any]:
    """Frames [T, D] of one window compared, and what texts are made of; a text stays as it is."""
    if not isinstance(wanted, Tensor):
        return Frames(), wanted, got
    best, other = wanted.argmax(-1), got.argmax(-1)
    frames = Frames(
        len(wanted),
        int((best != other).sum()) if ctc else None,
        wanted.double().square().sum().item(),
        (got.double() - wanted.double()).square().sum().item(),
    )
    return frames, best.tolist(), other.tolist()


def _references(paths: Sequence[Path], texts: Mapping[str, str]) -> dict[Path, str]:
    # of several names the last one counts
    found = {
        path: texts[name]
        for path in paths
        for name in (path.stem, path.name, str(path))
        if name in texts
    }
    if texts and not found:
        raise CommandError(f"--texts names none of the files; it has {next(iter(texts))!r}, ...")
    return found


def _between(files: Sequence[Outcome], reference: str, hypothesis: str) -> WordErrors | None:
    pairs = [(f[reference], f[hypothesis]) for f in files if reference in f and hypothesis in f]
    return word_errors(pairs) if pairs else None
