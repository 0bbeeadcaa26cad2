"""Peak memory of one provider, in a process that holds nothing else (Linux).

``python -m bench.memory CASE POINT PROVIDER THREADS`` prints one line of JSON.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.case import Case, Row
from bench.record import ROOT

_RESET_PEAK = "5"


def peak_memory(case: str, point: str, provider: str) -> Row:
    """Bytes above those of the imported libraries, measured in a new process.

    Returns:
        ``loaded_bytes`` when the provider is ready, and ``peak_bytes``, the most during two calls.
    """
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", case, point, provider, threads],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": threads},
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {provider} failed: {done.stderr[-500:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    assert found is not None, f"Linux reports {field}"
    return 1024 * int(found.group(1))


def _release() -> None:
    """Give freed memory back to the system, so that it is not counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _measure(case: Case, point: str, provider: str) -> Row:
    import transformers  # noqa: F401

    inputs = case.make_inputs(case.point(point), case.device, case.dtype)
    _release()
    bare = _status("VmRSS")
    prepared = case.provider(provider).prepare(inputs)
    _release()
    loaded = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    with torch.inference_mode():
        for _ in range(2):
            prepared.call()
    return {"loaded_bytes": loaded - bare, "peak_bytes": _status("VmHWM") - bare}


def main() -> None:
    """Measure what the command line names."""
    from bench.cases import CASES

    name, point, provider, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case = CASES[name]
    assert isinstance(case, Case), "only providers have a peak"
    print(json.dumps(_measure(case, point, provider)))


if __name__ == "__main__":
    main()
