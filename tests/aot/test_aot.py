"""Every kernel compiles for every target, without spills, inside shared memory, on matrix units."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from tests.aot.harness import DEFAULT_TARGETS, TARGETS, run_in_subprocess

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "aot"

# all kernels of one target: minutes where other work shares the processor
pytestmark = [pytest.mark.aot, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target, tmp_path, request):
    everything = request.config.getoption("--aot-all")
    if target not in DEFAULT_TARGETS and not everything:
        pytest.skip("only with --aot-all")
    reports = run_in_subprocess(target, tmp_path)
    assert reports, "no cases"
    if everything:
        write_table(target, reports)
    problems = [f"{r['name']}: {problem}" for r in reports for problem in r["problems"]]
    assert not problems, "\n".join([f"{len(problems)} problems for {target}", *problems])


def write_table(target, reports):
    """The reports as bench/results/aot/<target>.json; compile times differ from run to run."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    kernels = [{k: v for k, v in r.items() if k != "compile_seconds"} for r in reports]
    table = {"target": target, "triton": importlib.metadata.version("triton"), "kernels": kernels}
    (RESULTS / f"{target}.json").write_text(json.dumps(table, indent=1) + "\n")
