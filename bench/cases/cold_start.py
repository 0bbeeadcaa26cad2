"""How long a fresh process takes to its first output, with and without compiled kernels on disk."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.case import Point, Row, ValueCase
from bench.cases.encoder_cuda import float32_model
from bench.record import ROOT
from lowbit_kernels import QuantConfig, quantize, save_quantized

GOAL_SECONDS, MOONSHOT_SECONDS = 10.0, 3.0
SCRIPT = """
import sys, time
start = time.perf_counter()
import torch
device, checkpoint = sys.argv[1:]
dtype = torch.bfloat16 if device == "cuda" else torch.float32
x = torch.randn(499, 1024).to(device, dtype)
ready = time.perf_counter()
torch.set_grad_enabled(False)
{run}
print(ready - start, time.perf_counter() - ready)
"""
LAYER = """
from lowbit_kernels import QLinear, QuantSpec
layer = QLinear(1024, 4096, spec=QuantSpec(bits=4)).to(device, dtype)
float(layer(x, epilogue="gelu").sum())
"""
ENCODER = """
from lowbit_kernels import load_quantized
model = load_quantized(checkpoint).eval().to(device, dtype)
float(model(torch.randn(1, 160_000).to(device, dtype)).last_hidden_state.sum())
"""


def measure(device: str = "cuda") -> list[Row]:
    """Seconds of a process that runs a layer, or a stored encoder, once; twice with one cache."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, runs = Path(folder) / "encoder", {"a layer": LAYER}
        if importlib.util.find_spec("transformers"):
            tiny = {} if device == "cuda" else {"tiny": 1}
            model = float32_model(Point("", tiny, "wav2vec2-large"), device)
            quantize(model, QuantConfig.fast(), fuse=True)
            save_quantized(model.cpu(), checkpoint)
            runs["wav2vec2-large fast(), 10 s"] = ENCODER
        for what, run in runs.items():
            for kind in ("kernels not compiled yet", "kernels on disk"):
                cache = str(Path(folder) / what)
                torch_s, ours = _first_output(run, device, str(checkpoint), cache)
                name = f"{what}: import torch, first use of the device ({kind})"
                rows.append({"name": name} | _s(torch_s))
                goals = {"goal": GOAL_SECONDS, "moonshot": MOONSHOT_SECONDS}
                rows.append({"name": f"{what}: to the first output, {kind}"} | _s(ours) | goals)
    return rows


def _s(seconds: float) -> Row:
    return {"value": seconds, "unit": "s"}


def _first_output(run: str, device: str, checkpoint: str, cache: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(run=run), device, checkpoint], cwd=ROOT,
        capture_output=True, text=True,
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
