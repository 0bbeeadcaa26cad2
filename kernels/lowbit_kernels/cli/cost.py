"""``lowbit cost``: what a speech encoder costs, by kind of layer."""

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from lowbit_kernels.cli.errors import CommandError
from ssl_models.config import SpeechEncoderConfig
from ssl_models.cost import cost
from ssl_models.presets import PRESETS, preset


def find_cost(source: str, seconds: float, **options: Any) -> dict[str, Any]:
    """``cost`` of a preset's or a file's config, JSON-able."""
    return {"config": source} | cost(_read(source), seconds, **options).to_dict()


def _read(source: str) -> SpeechEncoderConfig:
    if source in PRESETS:
        return preset(source)
    path = Path(source)
    if not path.is_file():
        known = ", ".join(sorted(PRESETS))
        raise CommandError(f"{source} is no file, nor a preset: {known}")
    try:
        return SpeechEncoderConfig.from_json(path.read_text())
    except (TypeError, ValueError) as error:
        raise CommandError(f"{source}: {error}") from None


def view_cost(found: dict[str, Any]) -> Group:
    """A row a kind, the total, and the runtime."""
    names = ("parameters", "storage MB", "GFLOPs", "QuantOPs Gbit")
    table = Table(
        Column("kind", style="bold cyan"), *(Column(n, justify="right") for n in names), box=None
    )
    for kind, row in (*found["kinds"].items(), ("total", found)):
        table.add_row(
            kind,
            f"{row['parameters']:,}",
            f"{row['storage_mb']:.2f}",
            f"{row['gflops']:.2f}",
            f"{row['quant_gbit']:.2f}",
            style="bold" if kind == "total" else None,
        )
    about = (
        f"estimated runtime {found['runtime']:.3f}, of HuBERT-base with SEW's front end in fp16; "
        f"{found['seconds']:g} s of audio"
    )
    return Group(table, Text(about, style="dim"))
