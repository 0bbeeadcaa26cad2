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
from typing import Any, NamedTuple

FOLDER = Path(str(resources.files("lowbit_kernels"))) / "tuned"

Entry = tuple[int, str, dict[str, Any] | None]


class Layer(NamedTuple):
    """What a table tells layers apart by; N and K are of one group of a convolution.

    Args:
        kind: ``"linear"`` or ``"conv1d"``: a list of the table.
        N, K: output and input features.
        bits, group_size, inputs: of the weight's ``QuantSpec``.
        is_plain: whether neither an activation nor a residual follows.
        groups: of a convolution.
    """

    kind: str
    N: int
    K: int
    bits: int
    group_size: int
    inputs: str | None
    is_plain: bool
    groups: int = 1


def table_path(gpu_name: str) -> Path:
    """Where the table of a GPU model is."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return FOLDER / f"{slug}.json"


@functools.cache
def load_table(gpu_name: str) -> dict[Layer, list[Entry]]:
    """A GPU's table: layer to (rows up to, backend, tiles), rows ascending. Empty if none is there.

    Raises:
        ValueError: if the file is not such a table, naming it.
    """
    path = table_path(gpu_name)
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text())
        return {
            Layer(
                kind, layer["N"], layer["K"], layer["bits"], layer["group_size"], layer["inputs"],
                layer["is_plain"], layer.get("groups", 1),
            ): sorted(
                ((row["up_to"], row["backend"], row["config"]) for row in layer["rows"]),
                key=lambda entry: entry[0],
            )
            for kind, layers in (("linear", table["linear"]), ("conv1d", table.get("conv1d", [])))
            for layer in layers
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of tuned layers: {error!r}") from error


def tuned_choice(gpu_name: str, M: int, layer: Layer) -> tuple[str, dict[str, Any] | None] | None:
    """Backend and tiles that were fastest for a layer; None where it was not measured."""
    entries = load_table(gpu_name).get(layer, [])
    return next(((backend, config) for rows, backend, config in entries if rows >= M), None)
