"""What a result says about where it was measured, and where it is kept."""

import datetime
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lowbit_kernels.cpu.library import cpu_backend

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "transformers", "lowbit-kernels")
# what is measured; results and README change without making a measurement stale
MEASURED = ("kernels", "ssl_models", "bench", ":!bench/results")
SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h"}
UNMEASURED = {"static", "report.py", "plot.py", "goals.py", "sitting.py", "__main__.py"}

# of the minute before we started: other work on the machine makes timings worthless
LOAD_BEFORE = os.getloadavg()[0]

Record = dict[str, Any]


def device_slug(device: str, threads: int) -> str:
    """A folder name for a device: ``cpu-avx512-vnni-2t``, ``cuda-nvidia-h200``."""
    if device == "cuda":
        return "cuda-" + _slug(torch.cuda.get_device_name())
    parts = ["cpu", _slug(torch.backends.cpu.get_cpu_capability())]
    parts += ["vnni"] if torch.cpu._is_vnni_supported() else []
    parts += ["amx"] if torch.cpu._is_amx_tile_supported() else []
    return "-".join([*parts, f"{threads}t"])


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def environment(device: str, threads: int, command: str) -> Record:
    """Device, versions, commit, code, date and command, as every result carries them."""
    return {
        "device": _device(device, threads),
        **({"gpu_state": _gpu_state()} if device == "cuda" else {}),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "commit": commit(),
        "code": code_digest(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def _device(device: str, threads: int) -> Record:
    slug = device_slug(device, threads)
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return {"type": device, "slug": slug, "name": name, "capability": f"sm_{major}{minor}"}
    return {
        "type": device,
        "slug": slug,
        "name": _cpu_name(),
        "threads": threads,
        "backend": cpu_backend(),
        "load_average_before": round(LOAD_BEFORE, 2),
    }


def _gpu_state() -> str | None:
    """Driver, clocks, power and temperature as the driver says them: nothing is locked here."""
    fields = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = info.exists() and re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the measured code, ``-dirty`` if files differ.

    Outside git it is the environment variable ``BENCH_COMMIT``, or ``unknown``.
    """
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", *MEASURED)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT", "unknown")
    return f"{head}-dirty" if changed else head


@functools.cache
def code_digest() -> str:
    """Of the measured sources, with git or without: results of another one are not continued.

    ``BENCH_CODE`` overrides it, so that all processes of a sitting agree whatever is edited.
    """
    if code := os.environ.get("BENCH_CODE"):
        return code
    files = [p for name in ("kernels", "bench") for p in (ROOT / name).rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(p for p in files if p.suffix in SOURCES and not UNMEASURED & {*p.parts}):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )  # fmt: skip
    return done.stdout.strip()


def write(record: Record, results: Path = RESULTS) -> Path:
    """Write a result to ``<results>/<device>/<case>.json`` and return the path."""
    path: Path = results / record["device"]["slug"] / f"{record['case']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # renamed whole: it may be read, and the process may be killed, at any time
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    scratch.replace(path)
    return path


def read_done(case: str, about: Record, results: Path) -> Record | None:
    """An earlier result of the same case, code and device."""
    path = results / about["device"]["slug"] / f"{case}.json"
    if not path.exists():
        return None
    record: Record = json.loads(path.read_text())
    return record if record.get("code") == about["code"] else None


def read_all(results: Path = RESULTS) -> list[Record]:
    """Every result there is, by device and case."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("*/*.json"))]
    # the tables of ahead-of-time compilation lie beside the measurements
    return [record for record in records if "case" in record]
