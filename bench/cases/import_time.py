"""What importing the package costs a program that has imported torch."""

import subprocess
import sys

from bench.case import Row, ValueCase
from bench.record import ROOT
from bench.timing import Spread

ROUNDS = 9
GOAL_MS = 50
SCRIPT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import lowbit_kernels
print(middle - start, time.perf_counter() - middle)
"""


def measure() -> list[Row]:
    """Median milliseconds over fresh processes; the first fills the caches and is not counted."""
    runs = [_one() for _ in range(ROUNDS + 1)][1:]
    return [
        _row("import torch", [torch_s for torch_s, _ in runs]),
        _row("import lowbit_kernels, after torch", [ours for _, ours in runs]) | {"goal": GOAL_MS},
    ]


def _one() -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    torch_s, ours = map(float, done.stdout.split())
    return torch_s, ours


def _row(name: str, seconds: list[float]) -> Row:
    spread = Spread.of([1000 * s for s in seconds])
    return {
        "name": name,
        "value": spread.median,
        "q1": spread.q1,
        "q3": spread.q3,
        "unit": "ms",
        "rounds": spread.rounds,
    }


IMPORT_TIME = ValueCase("import_time", "Import", measure)
