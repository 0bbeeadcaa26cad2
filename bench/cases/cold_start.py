"""How long a fresh process takes to its first output, with and without compiled kernels on disk."""

import os
import subprocess
import sys
import tempfile

from bench.case import Row, ValueCase
from bench.record import ROOT

GOAL_SECONDS, MOONSHOT_SECONDS = 10.0, 3.0
SCRIPT = """
import sys, time
start = time.perf_counter()
import torch
device = sys.argv[1]
dtype = torch.bfloat16 if device == "cuda" else torch.float32
x = torch.randn(499, 1024).to(device, dtype)
ready = time.perf_counter()
from lowbit_kernels import QLinear, QuantSpec
layer = QLinear(1024, 4096, spec=QuantSpec(bits=4)).to(device, dtype)
with torch.inference_mode():
    float(layer(x, epilogue="gelu").sum())
print(ready - start, time.perf_counter() - ready)
"""


def measure(device: str = "cuda") -> list[Row]:
    """Seconds of a process that quantizes a layer and runs it once, twice with one cache."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        for kind in ("kernels not compiled yet", "kernels on disk"):
            torch_s, ours = _first_output(device, cache)
            rows.append({"name": f"import torch, first use of the device ({kind})"} | _s(torch_s))
            goals = {"goal": GOAL_SECONDS, "moonshot": MOONSHOT_SECONDS}
            rows.append({"name": f"then to the first output, {kind}"} | _s(ours) | goals)
    return rows


def _s(seconds: float) -> Row:
    return {"value": seconds, "unit": "s"}


def _first_output(device: str, cache: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, device], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": _path()},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"no first output: {done.stderr[-500:]}")
    torch_s, ours = map(float, done.stdout.split())
    return torch_s, ours


def _path() -> str:
    return os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])


COLD_START = ValueCase(
    "cold_start", "A fresh process to its first output", measure, weight=1.0, device="cuda",
    takes_device=True,
)  # fmt: skip
