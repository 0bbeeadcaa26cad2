"""QuantizationReport: what became of every layer, as a table and as JSON."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column
from rich.text import Text

from lowbit_kernels.conversion.layer_names import LayerTable, alike

# of what is not printed on a terminal
_WIDTH = 110
_RULES = {"skip": "on the skip list", "override": "by an override"}


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Args:
        name: dotted name in the model.
        kind: its class, for example ``"Conv1d"``.
        spec: what it was quantized to, as text; ``None`` if it was left alone.
        reason: the rule that decided.
        bytes_before, bytes_after: of weight and bias.
        int8_copy_bytes: what int8 arithmetic on a CPU adds in memory from the first call on.
        sqnr_db: signal to quantization noise of the weight, in dB.
        note: anything a reader should look at, else empty.
    """

    name: str
    kind: str
    spec: str | None
    reason: str
    bytes_before: int
    bytes_after: int
    int8_copy_bytes: int = 0
    sqnr_db: float | None = None
    note: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """What ``quantize`` did, or with ``dry_run`` would do.

    Prints as a table in which layers that repeat share a line; ``to_dict`` has each of them.

    Args:
        layers: every linear layer and convolution of the model, and others that hold matrices.
        model_bytes_before, model_bytes_after: parameters and buffers of the whole model.
        notes: remarks about the whole model.
    """

    layers: tuple[LayerReport, ...]
    model_bytes_before: int
    model_bytes_after: int
    notes: tuple[str, ...] = field(default=())

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that were quantized."""
        return tuple(layer for layer in self.layers if layer.spec is not None)

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """The layers that were left alone."""
        return tuple(layer for layer in self.layers if layer.spec is None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @property
    def cpu_bytes(self) -> int:
        """Bytes on a CPU after the first call: those stored, and the int8 copies."""
        return self.model_bytes_after + sum(layer.int8_copy_bytes for layer in self.layers)

    @property
    def summary(self) -> str:
        """One line: layers, bytes, ratio."""
        before, after = self.model_bytes_before, self.model_bytes_after
        in_use = f", {_megabytes(self.cpu_bytes)} in use on a CPU" if self.cpu_bytes > after else ""
        ratio = after / max(before, 1)
        return (
            f"{len(self.quantized)} of {len(self.layers)} layers quantized, "
            f"{_megabytes(before)} -> {_megabytes(after)} ({ratio:.3f} of before){in_use}"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.summary, style="bold")
        yield ""
        groups = alike(self.layers, lambda layer: layer.name, _what_became)
        right = partial(Column, justify="right", no_wrap=True)
        yield LayerTable(
            ("become", right("least\nSQNR"), right("MB")),
            [([layer.name for layer in group], _cells(group)) for group in groups],
            [layer.spec for layer in self.quantized if layer.spec],
            others=31,
        )
        for layer in self.layers:
            if layer.note:
                yield Text(f"{layer.name}: {layer.note}", style="red")
        for note in self.notes:
            yield Text(f"note: {note}", style="yellow")

    def __str__(self) -> str:
        columns = shutil.get_terminal_size((_WIDTH, 0)).columns
        console = Console(width=columns, no_color=True, file=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _what_became(layer: LayerReport) -> tuple[str | None, ...]:
    return layer.kind, layer.spec, layer.reason


def _cells(layers: Sequence[LayerReport]) -> tuple[str | Text, ...]:
    """What layers that are alike became, their least SQNR, and their megabytes."""
    spec, reason = layers[0].spec, layers[0].reason
    before = sum(layer.bytes_before for layer in layers) / 1e6
    if spec is None:
        return Text(f"left: {_in_few_words(reason)}", style="yellow"), "", _number(before)
    after = sum(layer.bytes_after for layer in layers) / 1e6
    least = min(layer.sqnr_db for layer in layers if layer.sqnr_db is not None)
    return spec, f"{least:.1f} dB", f"{_number(before)} > {_number(after)}"


def _in_few_words(reason: str) -> str:
    """A reason without the pattern, or the argument, behind it, which the JSON has."""
    rule, quote, _ = reason.partition(" '")
    if quote and rule in _RULES:
        return _RULES[rule]
    return reason.partition(":")[0]


def _number(megabytes: float) -> str:
    return f"{megabytes:.2f}" if megabytes >= 0.01 else f"{megabytes:.4f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count} B"
