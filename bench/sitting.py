"""A whole sitting on a GPU in one command: ``python -m bench sitting --minutes 9 --results OUT``.

On a bare machine without network, most important first: compile the kernels in a pool of processes,
run the GPU's tests (and compute-sanitizer beside them), tune, run the cases. Whatever is done is in
``OUT/sitting.tar.gz`` at any moment; ``--resume`` takes such an archive and goes on from there.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.case import Row
from bench.record import ROOT, code_digest, device_slug, environment
from bench.run import DEVICE_LOST
from bench.tune import TUNED
from bench.tune import install as install_table

ARCHIVE = "sitting.tar.gz"
STEPS = ("compile", "tests", "tune", "cases")
# of the minutes, at most; the cases get what is left
SHARES = {"compile": 0.16, "tests": 0.24, "tune": 0.15}
PROCESSES = 16
# what ends, writes and packs after the time is up
RESERVE_SECONDS = 12.0
PACK_SECONDS = 20.0
RESTARTS = 8
LEFT_OUT = {"site", "running", "deselect.txt"}
REFUSAL = re.compile(
    r"^=+.*(not supported|failed to initialize|unable to|permission).*$",
    re.MULTILINE | re.IGNORECASE,
)
OUTCOME = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR) (.+?) *$", re.MULTILINE)


@dataclass
class Sitting:
    """What the steps share.

    Args:
        work: folder of everything that goes into the archive.
        archive: of ``work``, renewed all the time.
        end: when to be done, by ``time.perf_counter``.
        small: a trial at small shapes, which needs no GPU.
        cases: names, or ``["all"]``.
        state: what ``sitting.json`` holds.
        site: where wheels were installed to.
    """

    work: Path
    archive: Path
    end: float
    small: bool
    cases: list[str]
    state: Row = field(default_factory=dict)
    site: Path | None = None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    def save(self) -> None:
        """Write the state and pack everything; a kill at any time leaves an archive."""
        (self.work / "sitting.json").write_text(json.dumps(self.state, indent=1) + "\n")
        scratch = self.archive.with_suffix(".new")
        with tarfile.open(scratch, "w:gz", compresslevel=3) as tar:
            for path in sorted(self.work.iterdir()):
                if path.name not in LEFT_OUT:
                    tar.add(path, path.name)
        scratch.replace(self.archive)

    def start(self, name: str, command: list[str], **env: str) -> "subprocess.Popen[bytes]":
        """Start a process of its own group, its output in ``logs/<name>.log``."""
        log = self.work / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        paths = [str(p) for p in (self.site, os.environ.get("PYTHONPATH")) if p]
        env |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        env["BENCH_CODE"] = code_digest()
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            return subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | env, start_new_session=True,
            )  # fmt: skip

    def wait(self, processes: list["subprocess.Popen[bytes]"], seconds: float) -> list[int | None]:
        """Exit codes; None for those that the time was too short for, which are killed."""
        until, packed = time.perf_counter() + seconds, time.perf_counter()
        while any(p.poll() is None for p in processes) and time.perf_counter() < until:
            time.sleep(0.05)
            if time.perf_counter() - packed > PACK_SECONDS:
                self.save()
                packed = time.perf_counter()
        return [p.returncode if p.poll() is not None else _kill(p) for p in processes]

    def bench(self, *arguments: str) -> list[str]:
        """A command of this bench whose results are kept in ``work``."""
        small = ["--small"] if self.small else []
        return [sys.executable, "-m", "bench", *arguments, "--results", str(self.work), *small]

    def log(self, name: str) -> str:
        """What a process wrote."""
        path = self.work / "logs" / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""


def _kill(process: "subprocess.Popen[bytes]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def compile_kernels(sitting: Sitting, seconds: float) -> Row:
    """Fill Triton's cache on disk: every process runs its part of the points once.

    Beside them the optional CUDA C++ kernels are built, where there is a compiler for them.
    """
    count = min(PROCESSES, os.cpu_count() or 1)
    build = []
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        command = [sys.executable, "setup_cuda.py", "--arch", f"{major}{minor}"]
        build.append(sitting.start("setup_cuda", command))
    processes = [
        sitting.start(
            f"compile-{i}", sitting.bench("compile", *sitting.cases, "--part", f"{i}/{count}"),
            OMP_NUM_THREADS="1",
        )
        for i in range(count)
    ]  # fmt: skip
    codes = sitting.wait([*processes, *build], seconds)
    row: Row = {"status": _status(codes[:count]), "processes": count, "exit_codes": codes[:count]}
    return row | ({"setup_cuda_exit_code": codes[count]} if build else {})


def _status(codes: list[int | None]) -> str:
    if None in codes:
        return "unfinished"
    return "done" if not any(codes) else "failed"


def run_tests(sitting: Sitting, seconds: float) -> Row:
    """The tests that use a GPU; those that passed in an earlier sitting are not run again."""
    passed = _passed(sitting)
    deselected = sitting.work / "deselect.txt"
    deselected.write_text("".join(f"--deselect={name}\n" for name in passed))
    command = [sys.executable, "-m", "pytest", "-n", "8", "--gpu", "-v", "--tb=short"]
    (sitting.work / "logs" / "tests.log").unlink(missing_ok=True)
    checked = _start_sanitizer(sitting)
    tests = sitting.start("tests", [*command, f"@{deselected}"], OMP_NUM_THREADS="1")
    started = time.perf_counter()
    [code] = sitting.wait([tests], seconds)
    outcomes = OUTCOME.findall(sitting.log("tests"))
    row: Row = {"status": "unfinished" if code is None else "done", "exit_code": code}
    now_passed = sorted({*passed, *(name for how, name in outcomes if how == "PASSED")})
    row |= {"passed": len(now_passed), "code": tests_digest(), "passed_tests": now_passed}
    row["failed_tests"] = sorted({name for how, name in outcomes if how != "PASSED"})
    if checked is not None:
        [code] = sitting.wait([checked], seconds - (time.perf_counter() - started))
    verdict = _sanitizer_verdict(checked is not None, code, sitting.log("sanitizer"))
    sitting.state["sanitizer"] = verdict
    return row


def _passed(sitting: Sitting) -> list[str]:
    earlier = sitting.state["steps"].get("tests", {})
    return list(earlier["passed_tests"]) if earlier.get("code") == tests_digest() else []


def tests_digest() -> str:
    """Of the sources and of the tests."""
    digest = hashlib.sha256(code_digest().encode())
    for path in sorted((ROOT / "tests").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _start_sanitizer(sitting: Sitting) -> "subprocess.Popen[bytes] | None":
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return None
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    command += sitting.bench("compile", "linear_odd", "linear_backward")
    command += [] if sitting.small else ["--small"]
    # one allocation a tensor, so that leaving it is an error
    return sitting.start("sanitizer", command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def _sanitizer_verdict(exists: bool, code: int | None, log: str) -> Row:
    if not exists:
        return {"status": "missing", "reason": "no compute-sanitizer on the PATH"}
    if code is None:
        return {"status": "unfinished", "reason": "the time was too short"}
    if refusal := REFUSAL.search(log):
        return {"status": "refused", "reason": refusal.group(0)[:300]}
    if code:
        return {"status": "failed", "reason": f"exit code {code}, see logs/sanitizer.log"}
    return {"status": "clean"}


def tune(sitting: Sitting, seconds: float) -> Row:
    """Measure what the table of this GPU lacks; the cases then run with it."""
    if sitting.small:
        return {"status": "left out", "reason": "there is nothing to tune at small shapes"}
    return _go_on(sitting, "tune", ["tune"], seconds)


def run_cases(sitting: Sitting, seconds: float) -> Row:
    """All cases, most important first; measured ceilings come with them."""
    return _go_on(sitting, "cases", [*sitting.cases, "--resume"], seconds)


def _go_on(sitting: Sitting, name: str, what: list[str], seconds: float) -> Row:
    """A process that goes on after what killed the one before."""
    end, codes = time.perf_counter() + seconds, []
    for _ in range(RESTARTS):
        left = end - time.perf_counter()
        command = sitting.bench(*what, "--minutes", f"{left / 60:.3f}")
        codes += sitting.wait([sitting.start(name, command)], left + RESERVE_SECONDS / 2)
        if codes[-1] is None:  # slow, not broken
            (sitting.work / "running").unlink(missing_ok=True)
        if codes[-1] is None or 0 <= codes[-1] != DEVICE_LOST or end - time.perf_counter() < 20:
            break
    return {"status": _status(codes[-1:]), "exit_codes": codes}


RUN = {"compile": compile_kernels, "tests": run_tests, "tune": tune, "cases": run_cases}


def install(sitting: Sitting, wheels: Path) -> None:
    """Install each wheel by itself, so that one that does not fit stops no other."""
    sitting.site = sitting.work / "site"
    state: Row = {}
    for wheel in sorted(wheels.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
        command += ["--no-compile", "--target", str(sitting.site), str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True)
        state[wheel.name] = done.stderr.strip()[-300:] if done.returncode else "installed"
    sitting.state["wheels"] = state


def unpack(archive: Path, target: Path) -> Path:
    """Unpack the archive of a sitting."""
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target


def _open(options: argparse.Namespace, started: float) -> Sitting:
    options.results.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="sitting-"))
    if options.resume is not None:
        earlier = options.resume
        unpack(earlier / ARCHIVE if earlier.is_dir() else earlier, work)
        if torch.cuda.is_available():
            for table in work.glob(f"{device_slug('cuda', 1)}/{TUNED}"):
                install_table(table, torch.cuda.get_device_name())
    end = started + 60 * options.minutes - RESERVE_SECONDS
    cases = options.cases or ["all"]
    sitting = Sitting(work, options.results / ARCHIVE, end, options.small, cases)
    state = work / "sitting.json"
    earlier_state = json.loads(state.read_text()) if state.exists() else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = environment(device, 1, f"python -m bench sitting --minutes {options.minutes:g}")
    # tests know by their own digest, and cases by their records, what still holds
    same = earlier_state and earlier_state["device"]["slug"] == about["device"]["slug"]
    sitting.state = about | {"steps": earlier_state["steps"] if same else {}}
    return sitting


def main(arguments: list[str], started: float) -> int:
    """Run the command line; 1 if a step failed, 2 for a wrong one; minutes are from ``started``."""
    options = parser().parse_args(arguments)
    if not options.small and not torch.cuda.is_available():
        print("bench: a sitting needs a CUDA GPU (or --small)", file=sys.stderr)
        return 2
    if 60 * options.minutes <= RESERVE_SECONDS:
        print(f"bench: --minutes must be over {RESERVE_SECONDS / 60:g}", file=sys.stderr)
        return 2
    if options.resume is not None and not options.resume.exists():
        print(f"bench: --resume: there is no {options.resume}", file=sys.stderr)
        return 2
    sitting, failed = _open(options, started), False
    if options.wheels is not None:
        install(sitting, options.wheels)
    for name in STEPS:
        if name not in options.steps:
            continue
        started, share = time.perf_counter(), SHARES.get(name, 1.0)
        seconds = min(sitting.left, 60 * options.minutes * share)
        if seconds <= 0:
            row: Row = {"status": "left out", "reason": "no time left"}
        else:
            row = RUN[name](sitting, seconds)
        row["seconds"] = round(time.perf_counter() - started, 1)
        sitting.state["steps"][name] = row
        failed |= row["status"] == "failed"
        sitting.save()
        shown = {k: v for k, v in row.items() if not k.endswith("_tests")}
        print(f"{name}: {shown}", flush=True)
    print(f"{sitting.archive}: python -m bench report --results {ARCHIVE} draws it")
    shutil.rmtree(sitting.work)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench sitting", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="instead of all, in this order")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--results", type=Path, required=True, help=f"folder for {ARCHIVE}")
    parser.add_argument("--resume", type=Path, help="archive of an earlier sitting, or its folder")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of peers to install first")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="some of them")
    parser.add_argument("--small", action="store_true", help="a trial at small shapes")
    return parser
