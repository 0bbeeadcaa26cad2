"""The rows of the static table as text: Markdown files, or a table on the terminal."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.static.compile import Row
from bench.static.control_flow import CLASSES
from bench.static.gpus import GPUS

# a step of the larger tiles, to which the cycles of every loop with matrix work are scaled
STEP_FLOPS = 2 * 128**3
MIX = (*(kind for kind in CLASSES if kind != "matrix"), "other")
RESOURCES = ("tensor", "issue", "integer", "float", "special", "shared", "memory")
INTRODUCTION = """\
Made by `python -m bench static` without a GPU: nothing here was measured on one.
[What the columns mean](README.md).
"""

Column = Callable[[Row, str], str]


def _tile(row: Row, target: str) -> str:
    config = row["config"]
    blocks = [f"{k.removeprefix('BLOCK_')}{v}" for k, v in config.items() if k.startswith("BLOCK")]
    blocks += [f"{config.get('num_warps', 4)}w", f"{config.get('num_stages', 3)}s"]
    blocks += [f"{config['maxnreg']}r"] if "maxnreg" in config else []
    return " ".join(blocks).lower()


def _programs(row: Row, target: str) -> str:
    return f"{row['programs']} ({row['limit']})" if "programs" in row else ""


def _loop(row: Row, target: str) -> str:
    if "loop" not in row:
        return ""
    loop = row["loop"]
    return f"{loop['instructions']}" + ("" if loop["is_loop"] else " whole")


def _matrix(row: Row, target: str) -> str:
    if "loop" in row and row["loop"]["matrix"]:
        return f"{row['loop']['mix']['matrix']} {row['loop']['matrix']}"
    if row.get("matrix_instructions"):
        return f"{row['matrix_instructions']} {row['matrix_instruction']}"
    return ""


def _mix(kind: str) -> Column:
    def column(row: Row, target: str) -> str:
        mix = row["loop"]["mix"] if "loop" in row else {}
        if kind not in mix:
            return ""
        return f"{mix[kind] / mix['matrix']:.3g}" if "matrix" in mix else f"({mix[kind]})"

    return column


def _cycles(resource: str) -> Column:
    def column(row: Row, target: str) -> str:
        loop = row.get("loop", {"cycles": {}, "flops": 0})
        cycles = loop["cycles"].get(resource)
        if cycles is None:
            return ""
        return f"{cycles * (STEP_FLOPS / loop['flops'] if loop['flops'] else 1):.0f}"

    return column


def _best(row: Row, target: str) -> str:
    return f"{100 * row['loop']['best_share']:.0f} %" if "loop" in row else ""


def _floor(row: Row, target: str) -> str:
    if "problem" not in row:
        return ""
    gpu, problem = GPUS[target], row["problem"]
    matrix = problem["flops"] * problem["operand_bytes"] / 2 / gpu.flop_per_s
    return f"{1e6 * matrix:.3g}, {1e6 * problem['bytes'] / gpu.byte_per_s:.3g}"


def _fill(row: Row, target: str) -> str:
    if "problem" not in row:
        return ""
    programs, num_sms = row["problem"]["programs"], GPUS[target].num_sms
    return f"{100 * programs / (num_sms * -(-programs // num_sms)):.0f} %"


COLUMNS: dict[str, Column] = {
    "case": lambda row, target: str(row["name"]),
    "tile": _tile,
    "registers": lambda row, target: str(row.get("registers", "")),
    "spill": lambda row, target: str(row.get("spill_bytes", "")),
    "shared KiB": lambda row, target: f"{row.get('shared_bytes', 0) / 1024:.3g}",
    "programs": _programs,
    "loop": _loop,
    "matrix": _matrix,
    **{f"- {kind}": _mix(kind) for kind in MIX},
    **{resource: _cycles(resource) for resource in RESOURCES},
    "bound": lambda row, target: str(row.get("loop", {}).get("bound", "")),
    "best": _best,
    "shape": lambda row, target: str(row.get("problem", {}).get("sizes", "")),
    "floor": _floor,
    "fill": _fill,
}


def cells(row: Row, target: str) -> dict[str, str]:
    """The text of each column of a row."""
    return {name: column(row, target) for name, column in COLUMNS.items()}


def write_table(table: Mapping[str, Any], results: Path) -> Path:
    """Write a table's JSON, a kernel a line, and renew the Markdown files from all there are."""
    path: Path = results / table["triton"] / f"{table['target']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in table.items() if key != "kernels"}
    lines = ",\n".join(json.dumps(row) for row in table["kernels"])
    path.write_text(f'{json.dumps(head)[:-1]}, "kernels": [\n{lines}\n]}}\n')
    (results / f"{table['target']}.md").write_text(markdown(table["target"], results))
    return path


def read_table(target: str, version: str, results: Path) -> dict[str, Row]:
    """The rows of a table by name; none where there is no file."""
    path = results / version / f"{target}.json"
    if not path.exists():
        return {}
    return {row["name"]: row for row in json.loads(path.read_text())["kernels"]}


def markdown(target: str, results: Path) -> str:
    """One target's tables, the oldest Triton first."""
    parts = [f"# {target} ({GPUS[target].name})\n\n{INTRODUCTION}"]
    for path in sorted(results.glob(f"*/{target}.json")):
        table = json.loads(path.read_text())
        rows = sorted(table["kernels"], key=lambda row: (row["kernel"], row["name"]))
        texts = [cells(row, target) for row in rows]
        parts.append(f"## Triton {table['triton']}\n\n" + _markdown_table(texts))
    return "\n".join(parts)


def _markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    table = [_with_mix(row) for row in rows]
    # a column that is empty throughout says nothing
    names = [name for name in table[0] if any(row[name] for row in table)]
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _with_mix(row: Mapping[str, str]) -> dict[str, str]:
    """The row with its mix in one cell, beside the matrix instruction."""
    mix = ", ".join(f"{name[2:]} {text}" for name, text in row.items() if name[:2] == "- " and text)
    short: dict[str, str] = {}
    for name, text in row.items():
        if name[:2] != "- ":
            short[name] = text
        if name == "matrix":
            short["mix"] = mix
    return short
