"""``lowbit errors``: which kind of layer makes which error, block by block, on real audio."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from torch import Tensor

from lowbit_kernels.cli.audio import AudioError, Samples, find_audio, read_blocks
from lowbit_kernels.cli.errors import CommandError, require
from lowbit_kernels.cli.inference import cut_for_frames
from lowbit_kernels.cli.load import find_device, load_speech
from lowbit_kernels.cli.output import Outcome, note, progress
from lowbit_kernels.cli.speech import Speech
from lowbit_kernels.formats import QuantConfig

_SHOWN_BLOCKS = 6
_PLOTS = (".png", ".svg", ".pdf")
_NAMES = {"feed_forward": "feed-forward", "front_end": "front end", "conv": "convolution"}


def follow_errors(
    model: str, audio: Sequence[Path], config: QuantConfig, plot: Path | None, device: str | None
) -> tuple[Any, list[Outcome]]:
    """Quantize one kind of layer at a time and run both models on files.

    Args:
        model: a float model: a hub id or a folder.
        audio: files, and folders of them; a file of more than a minute is several utterances.
        config: how layers are quantized.
        plot: where to draw the result. None: nowhere.
        device: ``None`` takes a GPU if there is one.

    Returns:
        The ``ErrorPropagation``, and one outcome a file.

    Raises:
        CommandError: if something named is not there, no file can be read, or ``plot`` is of no
            known format.
    """
    from ssl_models.error_propagation import error_propagation
    from ssl_models.error_propagation.plot import draw

    if plot is not None:
        require("matplotlib", "bench")
        if plot.suffix not in _PLOTS:
            raise CommandError(f"--plot must end in {', '.join(_PLOTS)}, got {str(plot)!r}")
    speech, paths = load_speech(model, find_device(device)), find_audio(audio)
    files: list[Outcome] = []
    is_ctc = speech.kind == "ctc"

    def forward(network: Any, samples: Samples) -> Tensor:
        own = copy.copy(speech)
        own.model = network
        inputs = own.prepare([samples])
        found = own.logits(inputs) if is_ctc else own.frames(inputs)
        return found[:, : own.frame_counts(inputs)[0]]

    with progress("files") as bar:
        task = bar.add_task("following errors", total=len(paths))
        windows = _windows(paths, speech, files, lambda: bar.advance(task))
        try:
            found = error_propagation(
                speech.model, windows, config, forward=forward, has_tokens=is_ctc
            )
        except ValueError:
            if files and all("error" in file for file in files):
                raise CommandError(f"{files[0]['file']}: {files[0]['error']}") from None
            raise
    if plot is not None:
        draw(found, plot, f"{Path(model).name}, {config.default}")
        note(f"drawn in {plot}", style="dim")
    return found, files


def view_errors(found: Any) -> RenderableType:
    """A row a kind of layer, with its error after some of the blocks and at the end."""
    count = len(found.blocks)
    shown = sorted({round(i * (count - 1) / (_SHOWN_BLOCKS - 1)) for i in range(_SHOWN_BLOCKS)})
    right = {"justify": "right", "no_wrap": True}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("quantized", style="bold cyan", no_wrap=True)
    for header in ("layers", *(f"block {i + 1}" for i in shown), "end", "other tokens"):
        table.add_column(header, **right)  # type: ignore[arg-type]
    for kind, error in found.kinds.items():
        share = "" if error.disagreement is None else f"{error.disagreement:.2%}"
        values = [error.noise_to_signal_db[i] for i in shown]
        style = "bold" if kind == "all" else None
        table.add_row(
            _NAMES.get(kind, kind), str(error.layers), *map(_decibels, values),
            _decibels(error.end_db), share, style=style,
        )  # fmt: skip
    facts = Table.grid(Column(style="dim", no_wrap=True), "", padding=(0, 2, 0, 0))
    facts.add_row("error to signal in dB, over", f"{found.utterances} utterances")
    facts.add_row(
        "errors of kinds, together", f"{found.ratio[-1]:.2f} of the sum of their energies"
    )
    facts.add_row("not explained by their sum", f"{found.interaction[-1]:.1%} of the error")
    return Group(table, "", facts)


def _decibels(value: float) -> str:
    return "none" if value == -float("inf") else f"{value:.1f}"


def _windows(
    paths: Sequence[Path], speech: Speech, files: list[Outcome], advance: Any
) -> Iterator[Samples]:
    """The utterances of files; what cannot be read becomes an outcome, and the rest goes on."""
    cut = cut_for_frames(speech)
    for path in paths:
        outcome: Outcome = {"file": str(path)}
        try:
            for window in cut(read_blocks(path, speech.rate)):
                if len(window.samples) < speech.least_samples:
                    raise AudioError(
                        f"too short: {len(window.samples)} samples at {speech.rate} Hz, the model "
                        f"needs {speech.least_samples}"
                    )
                yield window.samples
        except AudioError as error:
            outcome["error"] = str(error)
        files.append(outcome)
        advance()
