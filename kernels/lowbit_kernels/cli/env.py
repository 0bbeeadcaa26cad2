"""``lowbit env``: what this machine offers, for bug reports."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.table import Column, Table

from lowbit_kernels.cpu import cpu_backend
from lowbit_kernels.matmul import csrc
from lowbit_kernels.matmul.tuned import table_path

# package to what it is for; an extra's name where one brings it
_OPTIONAL = {
    "transformers": "models, extra hf",
    "soundfile": "reading audio, extra audio",
    "soxr": "resampling, extra audio",
    "jiwer": "word error rates, extra audio",
    "peft": "LoRA",
    "flash-attn": "attention on a GPU, extra flash-attn",
}


def collect_env() -> dict[str, Any]:
    """Versions, devices, backends, the C++ compiler and optional packages, JSON-able."""
    return {
        "versions": {
            "lowbit-kernels": version("lowbit-kernels"),
            "torch": str(torch.__version__),
            "triton": _version("triton"),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "devices": [_cpu(), *map(_gpu, range(torch.cuda.device_count()))],
        "compiler": _compiler(),
        "optional": {name: _version(name) for name in _OPTIONAL},
    }


def describe_device(device: torch.device) -> str:
    """One line: the device, and what computes on it."""
    about = _cpu() if device.type == "cpu" else _gpu(device.index or 0)
    return f"{about['name']} ({about['detail']}), {' and '.join(about['backends'])}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {
        "device": "cpu",
        "name": _cpu_name(),
        "detail": f"{_count(os.cpu_count() or 1, 'core')}, "
        f"{_count(torch.get_num_threads(), 'thread')}, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "backends": [cpu_backend()],
    }


def _count(count: int, unit: str) -> str:
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    served = properties.major >= 8 and _version("triton") is not None
    backends = ["Triton (fused, resident int8)", "cuBLAS (dequantized)"]
    backends += ["CUDA C++ (few rows)"] if csrc.is_available() else []
    measured = "measured here" if table_path(properties.name).exists() else "defaults"
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "detail": f"sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
        "backends": [*backends, f"tiles: {measured}"] if served else [],
    }


def _compiler() -> str | None:
    """The first line that the C++ compiler says of itself."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            said = subprocess.run([path, "--version"], capture_output=True, text=True)
            return said.stdout.splitlines()[0] if said.stdout else path
    return None


def env_table(env: dict[str, Any]) -> Table:
    """The same, to read."""
    table = Table.grid(Column(style="bold cyan", no_wrap=True), "", padding=(0, 2, 0, 0))
    for name, found in env["versions"].items():
        table.add_row(name, found or "[yellow]not installed[/]")
    for device in env["devices"]:
        backends = ", ".join(device["backends"]) or "[yellow]no backend serves it[/]"
        table.add_row(device["device"], f"{device['name']} ({device['detail']})\n{backends}")
    table.add_row("C++ compiler", env["compiler"] or "[yellow]none found[/]")
    for name, found in env["optional"].items():
        missing = f"[yellow]not installed[/] [dim]({_OPTIONAL[name]})[/]"
        table.add_row(name, found or missing)
    return table
