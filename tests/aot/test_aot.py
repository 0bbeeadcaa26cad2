"""Kernels compile for every target, without spills, inside shared memory, on matrix units."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.record import RESULTS
from bench.static.gpus import GPUS

ROOT = Path(__file__).parents[2]
# all cases of both would take ten minutes
DEFAULT_TARGETS = {"sm_80": "1/2", "sm_90": "2/2"}

# all kernels of one target: minutes where other work shares the processor
pytestmark = [pytest.mark.aot, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("target", GPUS)
def test_kernels_compile(target, tmp_path, request):
    everything = request.config.getoption("--aot-all")
    if target not in DEFAULT_TARGETS and not everything:
        pytest.skip("only with --aot-all")
    # the kept tables are renewed where all are
    results = RESULTS / "static" if everything else tmp_path
    # a process of its own: Triton's interpreter must be off there
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    part = "1/1" if everything else DEFAULT_TARGETS[target]
    command = [sys.executable, "-m", "bench", "static", "--target", target, "--part", part]
    command += ["--results", results]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    assert f"{target}.json" in done.stdout
