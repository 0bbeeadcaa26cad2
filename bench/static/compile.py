"""Compile Triton kernels for GPUs that are not there, and read what the compiler made of them."""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.static.gpus import GPUS, occupancy
from bench.static.sass import analyze

# 5 are promised; a slow or shared processor may take twice as many
# of PTX: nothing but the weight on its way to L2 moves before the wait of an early start
WAITS_FIRST = re.compile(
    r"(?:(?!ld\.global|st\.global|cp\.async).)*griddepcontrol\.wait", re.DOTALL
)
MAX_COMPILE_SECONDS = 10

Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """The product or pass that a case's tiles are chosen for.

    Args:
        sizes: as text, ``"499 x 1024 x 4096"``.
        operand_bytes: of an element of the matrix units' operands.
        flops: matrix operations: two a multiply-add.
        bytes: that must be read and written at least.
        programs: that are launched.
    """

    sizes: str
    operand_bytes: int
    flops: int
    bytes: int
    programs: int


@dataclass(frozen=True)
class AotCase:
    """One kernel with the types and constants it is launched with.

    Args:
        name: unique among all cases of a target.
        kernel: imports and returns the ``triton.jit`` function.
        signature: argument to type, as Triton writes it (``"*fp16"``, ``"i32"``, ``"fp32"``);
            constants need no entry.
        constexprs: the constants, ``None`` for absent pointers included.
        aligned: arguments divisible by 16; without it a load is not split into 16-byte copies.
        options: ``num_warps``, ``num_stages`` and the like.
        expect: the matrix instruction: ``"mma"`` (``wgmma`` on sm_90), ``"mma_sync"`` (tiles too
            small for ``wgmma``), the same with ``_s8`` for int8 operands and ``_e4m3`` for fp8
            ones, or None for none.
        async_loads: whether asynchronous copies of 16 bytes are expected (NVIDIA only).
        targets: names out of ``GPUS``; None for all.
        problem: what it is launched for, where that is one shape.
    """

    name: str
    kernel: Callable[[], Any]
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    expect: str | None = None
    async_loads: bool = False
    targets: tuple[str, ...] | None = None
    problem: Problem | None = None


def compile_case(case: AotCase, target: str) -> Row:
    """Compile one case: its resources, its main loop and what went wrong."""
    row: Row = {"name": case.name, "kernel": "", "config": config_of(case)}
    start = _cpu_seconds()
    with _captured_stderr() as stderr:
        try:
            row["kernel"], compiled = _compile(case, target)
        except Exception as error:
            return row | {"problems": [f"does not compile: {error!r}"[:2000]]}
    seconds, num_warps = _cpu_seconds() - start, compiled.metadata.num_warps
    row |= {"compile_seconds": round(seconds, 2), "shared_bytes": compiled.metadata.shared}
    if GPUS[target].is_nvidia:
        assembly = compiled.asm["ptx"]
        row |= _read_cubin(compiled.asm["cubin"], num_warps, target)
        programs, limit = occupancy(target, row["registers"], num_warps, row["shared_bytes"])
        row |= {"programs": programs, "limit": limit}
    else:
        assembly = compiled.asm["amdgcn"]
        row |= _read_amdgcn(assembly)
    row["matrix_instruction"] = _matrix_instruction(assembly)
    copy = r"cp\.async\.(c[ag]\.shared\.global .*, 0x10[,;]|bulk)"
    row["async_loads"] = re.search(copy, assembly) is not None
    if case.problem is not None:
        row["problem"] = asdict(case.problem)
    row["problems"] = [line for line in stderr if "error" in line.lower()]
    row["problems"] += _check(case, row, target)
    if case.options.get("launch_pdl") and not WAITS_FIRST.match(assembly):
        row["problems"].append("reads or writes before it waits for the kernel ahead")
    return row


def _compile(case: AotCase, target: str) -> tuple[str, Any]:
    """The kernel's name, and Triton's compiled form."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu, kernel = GPUS[target], case.kernel()
    unknown = {*case.signature, *case.constexprs, *case.aligned} - set(kernel.arg_names)
    if unknown:
        raise ValueError(f"the kernel has no arguments {sorted(unknown)}")
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in case.aligned
    }
    source = ASTSource(kernel, signature, constexprs=dict(case.constexprs), attrs=attrs)
    triton_target = GPUTarget(*(("cuda", gpu.arch, 32) if gpu.is_nvidia else ("hip", gpu.arch, 64)))
    compiled = triton_compile(source, target=triton_target, options=dict(case.options))
    return kernel.fn.__name__, compiled


def config_of(case: AotCase) -> dict[str, Any]:
    """Tile sizes, warps and stages."""
    tiles = {k: v for k, v in case.constexprs.items() if k.startswith("BLOCK")}
    return tiles | dict(case.options)


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """What is written to file descriptor 2, by the compiler's C++ too."""
    lines: list[str] = []
    saved = os.dup(2)
    with tempfile.TemporaryFile() as capture:
        os.dup2(capture.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            capture.seek(0)
            lines += capture.read().decode(errors="replace").splitlines()


def _cpu_seconds() -> float:
    """Time spent by this process and by the assemblers it started, whatever else is running."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _read_cubin(cubin: bytes, num_warps: int, target: str) -> Row:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        usage = run(str(tools / "cuobjdump"), "-res-usage")
        loop = analyze(run(str(tools / "nvdisasm"), "-c"), num_warps, target)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "spill_bytes": found["STACK"] + found["LOCAL"],
        "loop": asdict(loop) | {"bound": loop.bound, "best_share": round(loop.best_share, 3)},
    }


def _read_amdgcn(assembly: str) -> Row:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        assert found, f"no {name} in the assembly"
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": number("private_segment_fixed_size"),
        "matrix_instructions": len(re.findall(r"^\tv_mfma", assembly, re.MULTILINE)),
    }


def _matrix_instruction(assembly: str) -> str | None:
    """The first matrix instruction, with its shape and types."""
    pattern = r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)\S*"
    found = re.search(pattern, assembly)
    return None if found is None else found[0]


def _expected_instruction(expect: str, target: str) -> str:
    """Pattern of the matrix instruction that ``expect`` means on ``target``."""
    int8 = expect.endswith("_s8")
    if expect.endswith("_e4m3"):
        return r"wgmma.*\.e4m3\.e4m3" if target == "sm_90" else r"kind::f8f6f4|\.e4m3\.e4m3"
    if target == "gfx942":
        return r"v_mfma_i32" if int8 else r"v_mfma_f32"
    if target == "sm_90" and not expect.startswith("mma_sync"):
        return r"wgmma.*\.s8\.s8" if int8 else r"wgmma"
    if target == "sm_100":
        # the tensor memory form where the tile is large enough
        return r"kind::i8|mma\.sync.*\.s8\.s8" if int8 else r"kind::f16|mma\.sync"
    return r"mma\.sync.*\.s8\.s8" if int8 else r"mma\.sync"


def _check(case: AotCase, row: Row, target: str) -> list[str]:
    gpu, problems = GPUS[target], []
    if row["spill_bytes"] > gpu.spill_bytes:
        problems.append(f"spills {row['spill_bytes']} bytes, allowed {gpu.spill_bytes}")
    if row["shared_bytes"] > gpu.program_shared_bytes:
        problems.append(f"{row['shared_bytes']} B of shared memory of {gpu.program_shared_bytes}")
    if row["compile_seconds"] > MAX_COMPILE_SECONDS:
        problems.append(f"takes {row['compile_seconds']} s to compile")
    if case.expect is not None:
        pattern, found = _expected_instruction(case.expect, target), row["matrix_instruction"]
        if found is None or not re.search(pattern, found):
            problems.append(f"expected {pattern}, found {found}")
    if case.async_loads and gpu.is_nvidia and not row["async_loads"]:
        problems.append("no asynchronous 16-byte loads")
    return problems
