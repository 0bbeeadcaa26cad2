"""QuantizationReport: what became of every layer, as a table and as JSON."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


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
    """What ``quantize`` did, or with ``dry_run`` would do. Prints as a table.

    Args:
        layers: every linear layer and convolution of the model.
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
        table = Table(box=None, header_style="dim")
        table.add_column("layer", overflow="fold")
        table.add_column("kind", style="dim")
        table.add_column("becomes")
        table.add_column("SQNR", justify="right")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for layer in self.layers:
            left = Text(f"left: {layer.reason}", style="yellow")
            becomes = left if layer.spec is None else Text(layer.spec)
            if layer.note:
                becomes.append(f"\n{layer.note}", style="red")
            table.add_row(
                layer.name,
                layer.kind,
                becomes,
                "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f} dB",
                _megabytes(layer.bytes_before),
                _megabytes(layer.bytes_after),
            )
        yield table
        for note in self.notes:
            yield Text(f"note: {note}", style="yellow")

    def __str__(self) -> str:
        console = Console(width=110, no_color=True, file=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count} B"
