"""Tables of measured choices, one a GPU model, that come with the package.

``tuned/<gpu>.json`` is written by ``python -m bench tune`` on that GPU. It names the versions it
was measured with: another Triton may make other code of the same tiles, never wrong code.

Dimension key: M rows of the input, N output features, K input features.
"""

import functools
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

FOLDER = Path(str(resources.files("lowbit_kernels"))) / "tuned"

Key = tuple[int, int, int, int, str | None, bool]
Entry = tuple[int, str, dict[str, Any] | None]


def table_path(gpu_name: str) -> Path:
    """Where the table of a GPU model is."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return FOLDER / f"{slug}.json"


@functools.cache
def load_table(gpu_name: str) -> dict[Key, list[Entry]]:
    """A GPU's table: layer to (rows up to, backend, tiles), rows ascending. Empty if none is there.

    Raises:
        ValueError: if the file is not such a table, naming it.
    """
    path = table_path(gpu_name)
    if not path.exists():
        return {}
    try:
        layers = json.loads(path.read_text())["linear"]
        return {
            (
                layer["N"], layer["K"], layer["bits"], layer["group_size"], layer["inputs"],
                layer["is_plain"],
            ): sorted(
                ((row["up_to"], row["backend"], row["config"]) for row in layer["rows"]),
                key=lambda entry: entry[0],
            )
            for layer in layers
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of tuned layers: {error!r}") from error


def tuned_choice(
    gpu_name: str,
    M: int,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    inputs: str | None,
    is_plain: bool,
) -> tuple[str, dict[str, Any] | None] | None:
    """Backend and tiles that were fastest for a layer; None where it was not measured."""
    entries = load_table(gpu_name).get((N, K, bits, group_size, inputs, is_plain), [])
    return next(((backend, config) for rows, backend, config in entries if rows >= M), None)
