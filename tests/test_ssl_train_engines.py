"""Two processes under ``torchrun`` train as one does, with every engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("ssl_train_worker.py")
ENGINES = ("ddp", "fsdp", "accelerate")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The losses of each engine and case."""
    folder = tmp_path_factory.mktemp("engines")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # one GPU cannot serve two processes
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(folder), *ENGINES],
        env=os.environ | hidden | paths, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process."""
    sys.path.insert(0, str(WORKER.parent))
    try:
        import ssl_train_worker as worker
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("alone")
    return {case: worker.run(case, "plain", folder / case) for case in worker.CASES}


def assert_same_curve(losses, wanted):
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (losses, wanted))
    torch.testing.assert_close(a, b, equal_nan=True)
    # that of the batch that is not finite
    assert a.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("case", ["ctc", "qat"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_have_the_losses_of_one(engine, case, found, alone):
    assert found["processes"] == 2
    assert_same_curve(found[f"{engine}-{case}"], alone[case])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_under_another_engine(engine, found, alone):
    assert_same_curve(found[f"{engine}-killed"], alone["qat"])
