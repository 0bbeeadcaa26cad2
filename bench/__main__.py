"""``python -m bench``: list the cases, run some or all, turn the results into tables and plots.

``python -m bench sitting`` is all of it on a GPU in one command; ``report`` takes its archive.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch

from bench import STARTED
from bench.case import Case, ValueCase, shrunk
from bench.cases import CASES
from bench.record import RESULTS
from bench.run import Options, compile_slice, run
from bench.tune import compile_part
from bench.tune import run as run_tuning
from lowbit_kernels.matmul.gpu import gpu_of

COMMANDS = ("list", "report", "static", "sitting", "tune", "compile", "all")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "what", nargs="+", metavar=" | ".join([*COMMANDS, "CASE"]),
        help="what to do, or which cases",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, help="for all cases together")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--slow", action="store_true", help="also providers slow to prepare")
    parser.add_argument(
        "--small", action="store_true", help="small shapes, which need no GPU: a trial, no result"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS,
        help="folder of the JSON files; an archive of a sitting for report",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="keep the points that --results has of this code"
    )
    parser.add_argument("--part", default="0/1", help="of compile: which of how many parts")
    return parser


def main(arguments: list[str] | None = None, started: float | None = None) -> int:
    """Run the command line; 2 for a wrong one. Minutes count from ``started``, or from now."""
    arguments = sys.argv[1:] if arguments is None else arguments
    started = time.perf_counter() if started is None else started
    if arguments[:1] == ["static"]:
        # compiles kernels, and needs no device
        from bench.static.command import main as static

        return static(arguments[1:])
    if arguments[:1] == ["sitting"]:
        from bench.sitting import main as sitting

        return sitting(arguments[1:], started)
    options = parser().parse_args(arguments)
    if options.what == ["list"]:
        list_cases()
        return 0
    if options.what == ["report"]:
        return report(options.results)
    if options.what == ["tune"]:
        return tune(options, started)
    compiles = options.what[0] == "compile"
    names = options.what[1:] if compiles else options.what
    names = everything(options.small) if names in (["all"], []) else names
    if unknown := [name for name in names if name not in CASES]:
        known = ", ".join([*COMMANDS, *CASES])
        print(f"bench: CASE must be one of {known}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    if options.minutes <= 0 or options.threads < 1:
        print("bench: --minutes and --threads must be positive", file=sys.stderr)
        return 2
    cases = [shrunk(CASES[name]) if options.small else CASES[name] for name in names]
    if lacking := [case.name for case in cases if not has_device(case)]:
        print(f"bench: {', '.join(lacking)} needs a CUDA GPU (or --small)", file=sys.stderr)
        return 2
    if pointless := [c.name for c in cases if isinstance(c, Case) and not c.points]:
        print(f"bench: {', '.join(pointless)} has no small shapes", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    if compiles:
        index, count = map(int, options.part.split("/"))
        code = compile_slice(cases, index, count, options.results)
        if torch.cuda.is_available() and not options.small:
            compile_part(index, count, gpu_of(torch.device("cuda", 0)), "cuda", torch.bfloat16)
        return code
    command = "python -m bench " + shlex.join(without_results(arguments))
    kept = Options(options.results, options.threads, options.slow, options.small, options.resume)
    return run(cases, started + 60 * options.minutes, kept, command)


def without_results(arguments: list[str]) -> list[str]:
    """The arguments that change what is measured, not where it is written."""
    at = next((i for i, word in enumerate(arguments) if word.startswith("--results")), None)
    if at is None:
        return arguments
    return arguments[:at] + arguments[at + (1 if "=" in arguments[at] else 2) :]


def tune(options: argparse.Namespace, started: float) -> int:
    """Fill the package's table for this GPU."""
    if not torch.cuda.is_available():
        print("bench: tune needs a CUDA GPU", file=sys.stderr)
        return 2
    end, gpu = started + 60 * options.minutes, gpu_of(torch.device("cuda", 0))
    print(run_tuning(options.results, end, gpu, "cuda", torch.bfloat16))
    return 0


def report(results: Path) -> int:
    """Tables and plots of a folder of results, or of the archive of a sitting."""
    from bench.report import ReportError, write_report
    from bench.sitting import unpack

    try:
        folder = unpack(results, results.with_name("sitting")) if results.is_file() else results
        for path in write_report(folder):
            print(path)
    except ReportError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def everything(small: bool = False) -> list[str]:
    """The names behind ``all``: with a GPU, or with small shapes, the cases of the GPU."""
    device = "cuda" if small or torch.cuda.is_available() else "cpu"
    names = [name for name, case in CASES.items() if case.in_all]
    if small:
        return [name for name in names if CASES[name].device == device and _shrinks(CASES[name])]
    left = [name for name in names if CASES[name].device != device]
    if left:
        why = "name the cases of the CPU" if device == "cuda" else "they need a CUDA GPU"
        print(f"not run: {', '.join(left)} ({why})", file=sys.stderr)
    return [name for name in names if name not in left]


def _shrinks(case: Case | ValueCase) -> bool:
    return case.takes_device if isinstance(case, ValueCase) else bool(case.small)


def list_cases() -> None:
    """Print each case with its providers and what is missing."""
    for case in CASES.values():
        lacking = "" if has_device(case) else ", needs a CUDA GPU"
        print(f"{case.name}: {case.title} ({case.device}{lacking})")
        if isinstance(case, ValueCase):
            continue
        print(f"  points: {', '.join(point.name for point in case.points)}")
        for provider in case.providers:
            notes = ["baseline"] if provider.name == case.baseline else []
            notes += ["only with --slow"] if provider.slow else []
            notes += [f"missing: pip install {' '.join(provider.missing)}"] * bool(provider.missing)
            print(f"  {provider.name}" + (f" ({', '.join(notes)})" if notes else ""))


def has_device(case: Case | ValueCase) -> bool:
    """Whether the machine has what the case runs on."""
    return case.device == "cpu" or torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
