"""Compile Triton kernels for GPUs that are not there, and read what the compiler made of them.

``python -m tests.aot.harness TARGET OUT.json`` compiles every case of every ``cases_*.py`` beside
this file. It runs in a process of its own, because Triton's interpreter must be off there.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KIB = 1024
# 5 are promised; a slow or shared processor may take twice as many
MAX_COMPILE_SECONDS = 10


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Args:
        backend: ``"cuda"`` or ``"hip"``.
        arch: what Triton calls the architecture.
        warp_size: threads a warp.
        shared_bytes: shared memory that one program may use.
        spill_bytes: spilled bytes a thread that are tolerated.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    spill_bytes: int = 64


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * KIB, spill_bytes=0),
    "sm_90": Target("cuda", 90, 32, 227 * KIB, spill_bytes=0),
    "sm_89": Target("cuda", 89, 32, 99 * KIB),
    "sm_100": Target("cuda", 100, 32, 227 * KIB),
    "sm_120": Target("cuda", 120, 32, 99 * KIB),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB),
}
DEFAULT_TARGETS = ("sm_80", "sm_90")


@dataclass(frozen=True)
class AotCase:
    """One kernel with the types and constants it is launched with.

    Args:
        name: unique among all cases.
        kernel: imports and returns the ``triton.jit`` function.
        signature: argument to type, as Triton writes it (``"*fp16"``, ``"i32"``, ``"fp32"``);
            constants need no entry.
        constexprs: the constants, ``None`` for absent pointers included.
        aligned: arguments divisible by 16; without it a load is not split into 16-byte copies.
        options: ``num_warps``, ``num_stages`` and the like.
        expect: the matrix instruction: ``"mma"`` (``wgmma`` on sm_90), ``"mma_sync"`` (tiles too
            small for ``wgmma``), the same with ``_s8`` for int8 operands, or None for none.
        async_loads: whether asynchronous copies of 16 bytes are expected (NVIDIA only).
        targets: names out of ``TARGETS``; None for all.
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


def load_cases(target: str) -> list[AotCase]:
    """The cases that are meant for ``target``, from every ``cases_*.py``."""
    cases = [
        case
        for path in sorted(HERE.glob("cases_*.py"))
        for case in importlib.import_module(f"tests.aot.{path.stem}").CASES
        if case.targets is None or target in case.targets
    ]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), f"two cases share a name among {sorted(names)}"
    return cases


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


def compile_case(case: AotCase, target_name: str) -> dict[str, Any]:
    """Compile one case: its resources, its matrix instructions and what went wrong."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, kernel = TARGETS[target_name], case.kernel()
    unknown = ({*case.signature, *case.constexprs, *case.aligned}) - set(kernel.arg_names)
    assert not unknown, f"{case.name}: the kernel has no arguments {sorted(unknown)}"
    signature = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in case.aligned
    }
    source = ASTSource(kernel, signature, constexprs=dict(case.constexprs), attrs=attrs)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    start = _cpu_seconds()
    with _captured_stderr() as stderr:
        try:
            compiled = triton_compile(source, target=gpu, options=dict(case.options))
        except Exception as error:
            return {"name": case.name, "problems": [f"does not compile: {error!r}"[:2000]]}
    seconds = _cpu_seconds() - start
    problems = [line for line in stderr if "error" in line.lower()]
    if target.backend == "cuda":
        resources = _cuda_resources(compiled.asm["cubin"])
        assembly = compiled.asm["ptx"]
    else:
        assembly = compiled.asm["amdgcn"]
        resources = _hip_resources(assembly)
    report = {
        "name": case.name,
        **resources,
        "shared_bytes": compiled.metadata.shared,
        "matrix_instruction": _matrix_instruction(assembly),
        "async_loads": bool(re.search(r"cp\.async\.c[ag]\.shared\.global .*, 0x10[,;]", assembly)),
        "compile_seconds": round(seconds, 2),
    }
    report["problems"] = problems + _check(case, report, target_name)
    return report


def _cpu_seconds() -> float:
    """Time spent by this process and by the assemblers it started, whatever else is running."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _cuda_resources(cubin: bytes) -> dict[str, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str) -> str:
            done = subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        usage = run(str(tools / "cuobjdump"), "-res-usage")
        code = run(str(tools / "nvdisasm"), "-c")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "spill_bytes": found["STACK"] + found["LOCAL"],
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    }


def _hip_resources(assembly: str) -> dict[str, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        assert found, f"no {name} in the assembly"
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": number("private_segment_fixed_size"),
        "instructions": len(re.findall(r"^\t[vsdgb]\w*_\w+", assembly, re.MULTILINE)),
    }


def _matrix_instruction(assembly: str) -> str | None:
    """The first matrix instruction, with its shape and types."""
    pattern = r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)\S*"
    found = re.search(pattern, assembly)
    return None if found is None else found[0]


def _expected_instruction(expect: str, target: str) -> str:
    """Pattern of the matrix instruction that ``expect`` means on ``target``."""
    int8 = expect.endswith("_s8")
    if target == "gfx942":
        return r"v_mfma_i32" if int8 else r"v_mfma_f32"
    if target == "sm_90" and not expect.startswith("mma_sync"):
        return r"wgmma.*\.s8\.s8" if int8 else r"wgmma"
    if target == "sm_100":
        # the tensor memory form where the tile is large enough
        return r"kind::i8|mma\.sync.*\.s8\.s8" if int8 else r"kind::f16|mma\.sync"
    return r"mma\.sync.*\.s8\.s8" if int8 else r"mma\.sync"


def _check(case: AotCase, report: Mapping[str, Any], target_name: str) -> list[str]:
    target, problems = TARGETS[target_name], []
    if report["spill_bytes"] > target.spill_bytes:
        problems.append(f"spills {report['spill_bytes']} bytes, allowed {target.spill_bytes}")
    if report["shared_bytes"] > target.shared_bytes:
        problems.append(f"{report['shared_bytes']} B of shared memory of {target.shared_bytes}")
    if report["compile_seconds"] > MAX_COMPILE_SECONDS:
        problems.append(f"takes {report['compile_seconds']} s to compile")
    if case.expect is not None:
        pattern, found = (
            _expected_instruction(case.expect, target_name),
            report["matrix_instruction"],
        )
        if found is None or not re.search(pattern, found):
            problems.append(f"expected {pattern}, found {found}")
    if case.async_loads and target.backend == "cuda" and not report["async_loads"]:
        problems.append("no asynchronous 16-byte loads")
    return problems


def _compile_by_index(index: int, target: str) -> dict[str, Any]:
    return compile_case(load_cases(target)[index], target)


def compile_all(target: str) -> list[dict[str, Any]]:
    """One report a case, in order."""
    indices = range(len(load_cases(target)))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_compile_by_index, indices, [target] * len(indices)))


def run_in_subprocess(target: str, work: Path) -> list[dict[str, Any]]:
    """``compile_all`` with Triton's interpreter off and its cache in ``work``."""
    root, out = HERE.parent.parent, work / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(work / "cache")
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    # each worker compiles alone: more threads would only fight
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.harness", target, str(out)],
        cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    reports: list[dict[str, Any]] = json.loads(out.read_text())
    return reports


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(compile_all(sys.argv[1])))
