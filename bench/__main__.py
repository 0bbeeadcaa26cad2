"""``python -m bench``: list the cases, run some or all, turn the results into tables and plots."""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch

from bench.cases import CASES
from bench.harness import Case, ValueCase, run_case
from bench.record import LOAD_BEFORE, RESULTS, commit, environment, write
from bench.report import ReportError, write_report

# other work that takes a quarter of a core already shows in the timings
BUSY_LOAD = 0.25


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "what", nargs="+", metavar="list | report | all | CASE", help="what to do, or which cases"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all cases together")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--slow", action="store_true", help="also providers slow to prepare")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 2 for a wrong one."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.what == ["list"]:
        list_cases()
        return 0
    if options.what == ["report"]:
        try:
            for path in write_report(options.results):
                print(path)
        except ReportError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
        return 0
    names = everything() if options.what == ["all"] else options.what
    if unknown := [name for name in names if name not in CASES]:
        known = ", ".join(["list", "report", "all", *CASES])
        print(f"bench: CASE must be one of {known}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    if options.minutes <= 0 or options.threads < 1:
        print("bench: --minutes and --threads must be positive", file=sys.stderr)
        return 2
    return run(names, options, "python -m bench " + shlex.join(arguments))


def everything() -> list[str]:
    """The names behind ``all``: with a GPU the cases of the GPU, else those of the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name, case in CASES.items() if not isinstance(case, ValueCase) or case.in_all]
    left = [name for name in names if CASES[name].device != device]
    if left:
        why = "name the cases of the CPU" if device == "cuda" else "they need a CUDA GPU"
        print(f"not run: {', '.join(left)} ({why})", file=sys.stderr)
    return [name for name in names if name not in left]


def list_cases() -> None:
    """Print each case with its providers and what is missing."""
    for case in CASES.values():
        lacking = "" if _has_device(case) else ", needs a CUDA GPU"
        print(f"{case.name}: {case.title} ({case.device}{lacking})")
        if isinstance(case, ValueCase):
            continue
        print(f"  points: {', '.join(point.name for point in case.points)}")
        for provider in case.providers:
            notes = ["baseline"] if provider.name == case.baseline else []
            notes += ["only with --slow"] if provider.slow else []
            notes += [f"missing: pip install {' '.join(provider.missing)}"] * bool(provider.missing)
            print(f"  {provider.name}" + (f" ({', '.join(notes)})" if notes else ""))


def run(names: list[str], options: argparse.Namespace, command: str) -> int:
    """Run cases one after the other, each within its share of the time, and write their JSON.

    Returns:
        1 if a case gave no result, which does not stop the others, or 0.
    """
    torch.set_num_threads(options.threads)
    if lacking := [name for name in names if not _has_device(CASES[name])]:
        print(f"bench: {', '.join(lacking)} needs a CUDA GPU", file=sys.stderr)
        return 2
    cases, failed = [CASES[name] for name in names], False
    _warn()
    end = time.perf_counter() + 60 * options.minutes
    for i, case in enumerate(cases):
        about = environment(case.device, options.threads, command)
        share = case.weight / sum(other.weight for other in cases[i:])
        try:
            record = run_case(case, share * (end - time.perf_counter()), options.slow)
        except RuntimeError as error:
            print(f"{case.name} gave no result: {error}", file=sys.stderr)
            failed = True
            continue
        print(write(record | about, options.results), flush=True)
    return int(failed)


def _has_device(case: Case | ValueCase) -> bool:
    return case.device == "cpu" or torch.cuda.is_available()


def _warn() -> None:
    if "-dirty" in commit():
        print("kernels/ or bench/ differ from the commit: not for README", file=sys.stderr)
    if LOAD_BEFORE > BUSY_LOAD:
        print(f"load average {LOAD_BEFORE:.2f}: timings need a quiet machine", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
