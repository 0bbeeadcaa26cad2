"""``python -m bench tune``: the fastest backend and tiles of each layer, into the package's table.

Dimension key: M rows, N output features, K input features; of a convolution B batch, T input
frames, C channels of input and output, k taps, M rows of the output.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from bench.case import Row
from bench.harness import device_lost, relative_error
from bench.ladder import choices, conv1d_choices, forced, forced_conv1d
from bench.record import Record, code_digest, environment
from bench.timing import CpuTimer, Sampler, WarmCudaTimer, capture, time_side_by_side
from lowbit_kernels import QConv1d, QLinear, QuantSpec
from lowbit_kernels.matmul.dispatch import Choice, Gpu
from lowbit_kernels.matmul.tuned import table_path

# inputs in turn, so that the L2 cache holds none; fewer of those that are larger than it alone
SETS = 4
SETS_BYTES = 256 << 20
FINALISTS = 4
# other tiles add in another order; a wrong kernel is far off
MAX_DIFFERENCE = 0.02
# rows up to which an entry holds, most important first
ROWS = (512, 4096, 16, 16384, 64, 2048, 1024, 8192, 1, 32, 256)
# N, K, epilogue: large's layers, then base's
LAYERS = (
    (4096, 1024, "gelu"), (1024, 4096, None), (1024, 1024, None), (3072, 1024, None),
    (3072, 768, "gelu"), (768, 3072, None), (768, 768, None),
)  # fmt: skip
# B, C, k, stride, groups, M: front ends and positional convolutions of ten seconds
CONVS = (
    (1, 512, 3, 2, 1, (16384, 8192, 4096, 2048)), (1, 512, 2, 2, 1, (1024, 512)),
    (1, 768, 128, 1, 16, (512,)), (1, 1024, 128, 1, 16, (512,)),
    (32, 512, 3, 2, 1, (131072, 65536)), (32, 512, 2, 2, 1, (32768, 16384)),
    (32, 768, 128, 1, 16, (16384,)), (32, 1024, 128, 1, 16, (16384,)),
)  # fmt: skip
SPECS = (QuantSpec(bits=4), QuantSpec(bits=4, inputs="int8"))
TUNED = "tuned.json"


class Job(Protocol):
    """One entry of the table."""

    kind: ClassVar[str]

    @property
    def M(self) -> int:
        """Rows up to which the entry holds."""

    @property
    def layer(self) -> Row:
        """The part of the table, among those of its kind, that the entry belongs to."""

    def choices(self, gpu: Gpu, dtype: torch.dtype) -> list[Choice]:
        """Of all backends."""

    def data(self, device: str, dtype: torch.dtype, seed: int) -> tuple[Any, Tensor]:
        """A layer and its input."""

    def call(self, layer: Any, x: Tensor, choice: Choice) -> Callable[[], Tensor]:
        """The layer's CUDA implementation with a choice."""


@dataclass(frozen=True)
class LinearJob:
    """An entry of a linear layer."""

    kind: ClassVar[str] = "linear"
    M: int
    N: int
    K: int
    epilogue: str | None
    spec: QuantSpec

    @property
    def layer(self) -> Row:
        return {
            "N": self.N, "K": self.K, "bits": self.spec.bits, "group_size": self.spec.group,
            "inputs": self.spec.inputs, "is_plain": self.epilogue is None,
        }  # fmt: skip

    def choices(self, gpu: Gpu, dtype: torch.dtype) -> list[Choice]:
        found = choices(self.M, self.N, self.K, self.spec, dtype, self.epilogue, gpu)
        return [choice for group in found.values() for choice in group]

    def data(self, device: str, dtype: torch.dtype, seed: int) -> tuple[QLinear, Tensor]:
        torch.manual_seed(seed)
        linear = nn.Linear(self.K, self.N, device=device, dtype=dtype)
        x = torch.randn(self.M, self.K, device=device, dtype=dtype)
        return QLinear.from_float(linear, self.spec), x

    def call(self, layer: QLinear, x: Tensor, choice: Choice) -> Callable[[], Tensor]:
        return forced(layer, x, self.epilogue, choice)


@dataclass(frozen=True)
class Conv1dJob:
    """An entry of a convolution, padded where its stride is 1."""

    kind: ClassVar[str] = "conv1d"
    M: int
    B: int
    C: int
    k: int
    stride: int
    groups: int
    epilogue: str | None
    spec: QuantSpec

    @property
    def layer(self) -> Row:
        C = self.C // self.groups
        return {
            "N": C, "K": self.k * C, "bits": self.spec.bits, "group_size": self.spec.group,
            "inputs": self.spec.inputs, "is_plain": self.epilogue is None, "groups": self.groups,
        }  # fmt: skip

    def choices(self, gpu: Gpu, dtype: torch.dtype) -> list[Choice]:
        layer = self.layer
        return conv1d_choices(self.M, layer["N"], layer["K"], self.groups, self.spec, gpu)

    def data(self, device: str, dtype: torch.dtype, seed: int) -> tuple[QConv1d, Tensor]:
        torch.manual_seed(seed)
        B, C, k, stride = self.B, self.C, self.k, self.stride
        padding = k // 2 if stride == 1 else 0
        conv = nn.Conv1d(C, C, k, stride, padding, groups=self.groups, device=device, dtype=dtype)
        T = (self.M // B - 1) * stride + k - 2 * padding
        x = torch.randn(B, T, C, device=device, dtype=dtype).mT
        return QConv1d.from_float(conv, self.spec), x

    def call(self, layer: QConv1d, x: Tensor, choice: Choice) -> Callable[[], Tensor]:
        return forced_conv1d(layer, x, self.epilogue, choice)


def jobs() -> list[Job]:
    """All entries, most important first."""
    linear: list[Job] = [
        LinearJob(M, N, K, epilogue, spec)
        for M in ROWS for spec in SPECS for N, K, epilogue in LAYERS
    ]  # fmt: skip
    convs: list[Job] = [
        Conv1dJob(M, *layer, "gelu", spec)
        for *layer, rows in CONVS for M in rows for spec in SPECS
    ]  # fmt: skip
    first = len(linear) // 3
    return [*linear[:first], *convs, *linear[first:]]


def measure(job: Job, device: str, dtype: torch.dtype, gpu: Gpu) -> Row | None:
    """The entry: the fastest choice, and what each took; None if nothing runs."""
    samplers: dict[int, Sampler] = {}
    quick: dict[int, float] = {}
    options = job.choices(gpu, dtype)
    sets = [job.data(device, dtype, 0)]
    while len(sets) < SETS and sum(x.nbytes for _, x in sets) < SETS_BYTES:
        sets.append(job.data(device, dtype, len(sets)))
    expected: Tensor | None = None
    failures = []
    for i, choice in enumerate(options):
        calls = [job.call(layer, x, choice) for layer, x in sets]
        try:
            results = [call() for call in calls]
            expected = results[0] if expected is None else expected
            if not relative_error(results[0], expected) <= MAX_DIFFERENCE:
                failures.append(f"{choice}: a wrong result")
                continue
            samplers[i] = _sampler(calls, device)
            quick[i] = samplers[i].seconds(3)
        except Exception as error:  # tiles that do not fit the device
            if device_lost(error):
                raise
            failures.append(f"{choice}: {type(error).__name__}: {error}"[:200])
    if not quick:
        return None
    finalists = {str(i): samplers[i] for i in sorted(quick, key=quick.__getitem__)[:FINALISTS]}
    samples = time_side_by_side(finalists, end=0.0)
    medians = {int(i): sorted(times)[len(times) // 2] for i, times in samples.items()}
    best = options[min(medians, key=medians.__getitem__)]
    return {
        "up_to": job.M,
        "backend": best.backend,
        "config": None if best.config is None else asdict(best.config),
        "microseconds": {
            f"{options[i].backend} {_tiles(options[i])}": round(1e6 * seconds, 3)
            for i, seconds in (quick | medians).items()
        },
        "failures": failures,
    }


def _sampler(calls: list[Callable[[], Tensor]], device: str) -> Sampler:
    if device == "cuda":
        return Sampler(WarmCudaTimer(), capture(calls), len(calls))
    return Sampler(CpuTimer(), lambda: [call() for call in calls], len(calls))


def _tiles(choice: Choice) -> str:
    return "" if choice.config is None else str(list(asdict(choice.config).values()))


def run(results: Path, end: float, gpu: Gpu, device: str, dtype: torch.dtype) -> Path:
    """Measure what the table lacks until the time is up; the table is written after each entry.

    Args:
        results: the table goes to ``<results>/<device>/tuned.json`` and, without its timings, into
            the package and ``<results>/<device>/tuned/<gpu>.json``.
        end: by ``time.perf_counter``.
        gpu, device, dtype: what to measure on.
    """
    about = environment(device, 1, "python -m bench tune")
    path = results / about["device"]["slug"] / TUNED
    table = _load(path, about)
    for job in jobs():
        rows = _rows(table, job)
        if job.M in [row["up_to"] for row in rows]:
            continue
        if time.perf_counter() > end:
            print("tune: no time left", file=sys.stderr)
            break
        with torch.inference_mode():
            entry = measure(job, device, dtype, gpu)
        if entry is not None:
            rows.append(entry)
            _write(table, path, gpu)
            print(f"{job}: {entry['backend']} {entry['config']}", file=sys.stderr, flush=True)
    return path


def _load(path: Path, about: Record) -> Record:
    """The table so far, if it is of this code."""
    if path.exists():
        table: Record = json.loads(path.read_text())
        if table["code"] == code_digest():
            return table
    return about | {"linear": [], "conv1d": []}


def _rows(table: Record, job: Job) -> list[Row]:
    """The entries of the job's layer."""
    layers = table[job.kind]
    for layer in layers:
        if {name: layer[name] for name in job.layer} == job.layer:
            return layer["rows"]
    layers.append(job.layer | {"rows": []})
    return layers[-1]["rows"]


def _write(table: Record, path: Path, gpu: Gpu) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(table, indent=1) + "\n")
    scratch.replace(path)
    shipped = install(path, gpu.name)
    # from a machine that keeps nothing the package's file comes back beside the results
    copy = path.parent / "tuned" / shipped.name
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(shipped, copy)


def install(path: Path, gpu_name: str) -> Path:
    """Copy a table to where the package looks for it, without what only the bench reads."""
    table: Record = json.loads(path.read_text())
    for layer in table["linear"] + table.get("conv1d", []):
        layer["rows"] = [
            {name: row[name] for name in ("up_to", "backend", "config")} for row in layer["rows"]
        ]
    target = table_path(gpu_name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(table, indent=1) + "\n")
    return target


def _kernel(choice: Choice) -> Any:
    """What tells one compiled kernel from another: not into how many parts a sum is split."""
    if choice.config is None:
        return choice
    return choice.backend, replace(choice.config, splits=min(choice.config.splits, 2))


def compile_part(index: int, count: int, gpu: Gpu, device: str, dtype: torch.dtype) -> None:
    """Run every ``count``-th kernel once, each at the first shapes that ask for it."""
    kernels: dict[Any, tuple[Job, Choice]] = {}
    for job in jobs():
        for choice in job.choices(gpu, dtype):
            layer = job.layer | {"N": None, "K": job.layer["K"] % 512}
            key = _kernel(choice), job.kind, tuple(layer.values())
            kernels.setdefault(key, (job, choice))
    for job, choice in list(kernels.values())[index::count]:
        try:
            with torch.inference_mode():
                job.call(*job.data(device, dtype, 0), choice)()
        except Exception as error:  # tiles that do not fit the device
            if device_lost(error):
                raise
            print(f"{job} {choice}: {type(error).__name__}: {error}"[:300])
