"""What is kept of a cell: columns of numbers, an utterance each, and means of lists."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DIGITS = 6


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of ``measure`` by their keys.

    Returns:
        ``"utterances"``: a list a key, one number an utterance (null where it was not measured);
        ``"blocks"`` and ``"sources"``: a list a key, of means over utterances; ``"read"``: the
        digits read, an utterance each, by arm; ``"digits"``: the true ones.
    """
    found: dict[str, Any] = {
        "utterances": {}, "blocks": {}, "sources": {}, "read": {},
        "digits": [row["digits"] for row in rows],
    }  # fmt: skip
    for key in dict.fromkeys(key for row in rows for key in row):
        if key == "digits":
            continue
        group, _, rest = key.partition("/")
        if group == "read":
            found["read"][rest] = [list(row[key]) for row in rows]
        elif group in ("blocks", "sources"):
            found[group][rest] = _means([row[key] for row in rows if key in row])
        else:
            found["utterances"][key] = [_rounded(row.get(key)) for row in rows]
    return found


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(content, allow_nan=False) + "\n")
    os.replace(unfinished, path)


def _means(lists: Sequence[Sequence[float | None]]) -> list[float | None]:
    means = []
    for each in zip(*lists, strict=True):
        finite = [value for value in each if value is not None and math.isfinite(value)]
        means.append(_rounded(math.fsum(finite) / len(finite) if finite else None))
    return means


def _rounded(value: float | None) -> float | None:
    """JSON has no infinity, and six digits are more than a measure has."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")
