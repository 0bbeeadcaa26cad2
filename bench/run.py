"""Run cases one after the other within a given time; continue where an earlier process ended."""

import gc
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.case import Case, Row, ValueCase
from bench.harness import Watch, device_lost, prepare_point, run_case
from bench.record import LOAD_BEFORE, commit, environment, read_done, write

# other work that takes a quarter of a core already shows in the timings
BUSY_LOAD = 0.25
# the device failed: another process may go on
DEVICE_LOST = 3


@dataclass(frozen=True)
class Options:
    """How to run.

    Args:
        results: folder of the JSON files.
        threads: of a CPU.
        slow: whether providers slow to prepare run too.
        small: whether the cases are small, so that their results are kept apart.
        resume: whether points that ``results`` has of the same code and device are kept.
    """

    results: Path
    threads: int = 1
    slow: bool = False
    small: bool = False
    resume: bool = False


class FileWatch(Watch):
    """Remembers in files what was running when a process died."""

    def __init__(self, results: Path) -> None:
        results.mkdir(parents=True, exist_ok=True)
        self._running, self._file = results / "running", results / "died.json"
        self._died = json.loads(self._file.read_text()) if self._file.exists() else []
        if self._running.exists():  # nobody took it away
            self._died.append(json.loads(self._running.read_text()))
            self._file.write_text(json.dumps(self._died))
            self._running.unlink()

    def starts(self, case: str, point: str, provider: str) -> None:
        self._running.write_text(json.dumps([case, point, provider]))

    def died(self, case: str, point: str, provider: str) -> bool:
        return [case, point, provider] in self._died

    def ends(self) -> None:
        """The process is about to end by itself."""
        self._running.unlink(missing_ok=True)


def about(case: Case | ValueCase, options: Options, command: str) -> Row:
    """What the record says about the device; a small trial has a folder of its own."""
    row = environment(case.device, options.threads, command)
    if options.small:
        row["device"] = row["device"] | {"slug": row["device"]["slug"] + "-small"}
    return row


def run(cases: list[Case] | list[ValueCase], end: float, options: Options, command: str) -> int:
    """Run cases, each within its share of the time left, and write their JSON.

    Args:
        cases: what to run, most important first.
        end: when to be done, by ``time.perf_counter``.
        options: how.
        command: what was typed.

    Returns:
        1 if a case gave no result, which does not stop the others; ``DEVICE_LOST`` if the device
        serves this process no more; or 0.
    """
    _warn()
    watch, failed = FileWatch(options.results) if options.resume else None, False
    pending, again = list(cases), False
    while pending:
        left_over: list[Case | ValueCase] = []
        for i, case in enumerate(pending):
            share = case.weight / sum(other.weight for other in pending[i:])
            seconds = end - time.perf_counter()
            if seconds <= 0 and (i or again):
                print(f"no time left for {', '.join(c.name for c in pending[i:])}", file=sys.stderr)
                break
            try:
                if not _run(case, share * seconds, options, command, watch):
                    left_over.append(case)
            except RuntimeError as error:
                print(f"{case.name} gave no result: {error}", file=sys.stderr)
                if device_lost(error):
                    return DEVICE_LOST
                failed = True
            _free()
        # what one case left of its time is another's
        again = options.resume and time.perf_counter() < end
        pending = left_over if again else []
    if watch is not None:
        watch.ends()
    return int(failed)


def _run(
    case: Case | ValueCase, seconds: float, options: Options, command: str, watch: Watch | None
) -> bool:
    """Whether every point of a case is done."""
    where = about(case, options, command)
    done = read_done(case.name, where, options.results) if options.resume else None
    if done is not None and _is_whole(case, done):
        return True

    def save(record: Row) -> Path:
        return write(record | where, options.results)

    record = run_case(case, seconds, options.slow, done, save, watch)
    print(save(record), flush=True)
    return "left_out" not in record


def _is_whole(case: Case | ValueCase, done: Row) -> bool:
    if isinstance(case, ValueCase):
        return True
    return {row["point"] for row in done["results"]} >= {point.name for point in case.points}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compile_slice(
    cases: list[Case] | list[ValueCase], index: int, count: int, results: Path
) -> int:
    """Run our providers once at every ``count``-th point, which leaves their kernels on disk.

    Args:
        cases: with points and, for which there is nothing to compile here, without.
        index, count: which part.
        results: points with a result of this code are left out.
    """
    pairs = [
        (case, point) for case in cases if isinstance(case, Case)
        for point in case.points if point.name not in _points_done(case, results)
    ]  # fmt: skip
    failed = False
    for case, point in pairs[index::count]:
        providers = tuple(p for p in case.providers if p.is_ours or p.name == case.baseline)
        started = time.perf_counter()
        try:
            rows, _ = prepare_point(replace(case, providers=providers, sets=1), point)
            wrong = {
                name: row["reason"] for name, row in rows.items()
                if row["status"] in ("wrong", "failed")
            }  # fmt: skip
        except (RuntimeError, ImportError) as error:
            if device_lost(error):
                raise
            wrong = {case.baseline: str(error)}
        failed |= bool(wrong)
        print(f"{case.name} {point.name}: {time.perf_counter() - started:.1f} s {wrong or ''}")
        sys.stdout.flush()
        _free()
    return int(failed)


def _points_done(case: Case, results: Path) -> set[Any]:
    done = read_done(case.name, environment(case.device, 1, ""), results)
    return {row["point"] for row in done["results"]} if done else set()


def _warn() -> None:
    if "-dirty" in commit():
        print("kernels/ or bench/ differ from the commit: not for README", file=sys.stderr)
    if LOAD_BEFORE > BUSY_LOAD:
        print(f"load average {LOAD_BEFORE:.2f}: timings need a quiet machine", file=sys.stderr)
