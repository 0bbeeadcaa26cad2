"""What a benchmark case is, and how one is run: correctness first, then time, then a record.

A case is data: points (shapes with their origin), providers (ours and the peers), a baseline and a
cost. ``run_case`` owns everything else, so that every case is measured in the same way.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bench.roofline import Roofline, measure_roofline
from bench.timing import Call, Spread, host_seconds, time_side_by_side, timer_for

Row = dict[str, Any]
Result = Tensor | tuple[Tensor, ...]
# how the report shows a case: a row a provider, a row a point, or one line a value
Layout = Literal["providers", "points", "values"]


@dataclass(frozen=True)
class Point:
    """One shape of a case.

    Args:
        name: unique in the case.
        sizes: the dimensions.
        origin: the model and layer that has this shape.
    """

    name: str
    sizes: dict[str, int]
    origin: str


@dataclass(frozen=True)
class Cost:
    """What any implementation must do at least.

    Args:
        flops: floating-point (or integer) operations, two a multiply-add.
        bytes: of inputs and outputs; the weight is counted as each provider stores it.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Prepared:
    """A provider ready to be timed at one point.

    Args:
        call: runs it once and returns the result.
        max_error: the largest relative error (Frobenius norm) that is not a bug.
        expected: what ``call`` must return to within ``max_error``; None: the baseline's result.
        weight_bytes: of the weights as stored.
        facts: further numbers for the record, read after the timing.
        int8: whether it multiplies in int8, whose roofline is another.
    """

    call: Callable[[], Result]
    max_error: float
    expected: Callable[[], Result] | None = None
    weight_bytes: int = 0
    facts: Callable[[], Row] = dict
    int8: bool = False


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Args:
        name: as shown in tables.
        prepare: makes it ready for a case's inputs.
        needs: modules it imports, to the pip package that brings each; empty: nothing optional.
        slow: takes minutes to prepare, so it runs only when asked for.
    """

    name: str
    prepare: Callable[[Any], Prepared]
    needs: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False

    @property
    def missing(self) -> list[str]:
        """The pip packages that are not installed."""
        return [pip for module, pip in self.needs.items() if not importlib.util.find_spec(module)]


@dataclass(frozen=True)
class Case:
    """Providers timed side by side over some points.

    Args:
        name: on the command line, and of the JSON file.
        title: one line for the report.
        points: the shapes.
        make_inputs: what the providers share at a point, on a device and of a dtype.
        providers: with the baseline among them.
        baseline: name of the provider that ratios refer to.
        cost: of a point, with the bytes an element of its inputs and outputs.
        layout: ``"providers"`` or ``"points"``.
        weight: share of a sitting's time, relative to the other cases.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the inputs.
        probe: numbers about a (point, provider) that are measured apart, in a process of their own.
    """

    name: str
    title: str
    points: tuple[Point, ...]
    make_inputs: Callable[[Point, str, torch.dtype], Any]
    providers: tuple[Provider, ...]
    baseline: str
    cost: Callable[[Point, int], Cost]
    layout: Layout = "points"
    weight: float = 1.0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    probe: Callable[[Point, Provider], Row] | None = None

    def provider(self, name: str) -> Provider:
        """The provider called ``name``."""
        return next(p for p in self.providers if p.name == name)

    def point(self, name: str) -> Point:
        """The point called ``name``."""
        return next(p for p in self.points if p.name == name)


@dataclass(frozen=True)
class ValueCase:
    """A few numbers that are no comparison of kernels.

    Args:
        name, title, weight: as in ``Case``.
        measure: returns rows of ``{"name", "value", "unit"}``, with ``"q1"`` and ``"q3"`` where the
            value is a median, and ``"goal"`` where there is one.
        in_all: whether ``all`` runs it.
    """

    name: str
    title: str
    measure: Callable[[], list[Row]]
    weight: float = 0.1
    device: str = "cpu"
    layout: Layout = "values"
    in_all: bool = True


def run_case(case: Case | ValueCase, seconds: float, slow: bool = False) -> Row:
    """Run a case and return its part of the record.

    Args:
        case: what to run.
        seconds: to spend; timing gets what preparing and probing leave of it. Points that it does
            not last for are left out, the first one never.
        slow: whether providers marked slow run too.
    """
    record: Row = {"case": case.name, "title": case.title, "layout": case.layout}
    if isinstance(case, ValueCase):
        return record | {"results": case.measure()}
    rows: list[Row] = []
    end = time.perf_counter() + seconds
    roofline = measure_roofline(case.dtype) if case.device == "cuda" else None
    record |= {"baseline": case.baseline, "dtype": str(case.dtype).removeprefix("torch.")}
    record |= {"roofline": asdict(roofline)} if roofline is not None else {}
    for i, point in enumerate(case.points):
        started = time.perf_counter()
        if rows and started > end:
            record["left_out"] = [left.name for left in case.points[i:]]
            _say(f"{case.name}: no time left for {', '.join(record['left_out'])}")
            break
        share = (end - started) / (len(case.points) - i)
        try:
            rows += _run_point(case, point, started + share, slow, roofline)
        except RuntimeError as error:
            # after an access out of bounds the GPU serves this process no more: keep what is there
            if not rows:
                raise
            record["stopped"] = f"{point.name}: {error}"[:500]
            _say(f"{case.name} stopped at {record['stopped']}")
            break
        _say(f"{case.name} {point.name}: {time.perf_counter() - started:.0f} s")
    return record | {"results": rows}


def _run_point(
    case: Case, point: Point, end: float, slow: bool, roofline: Roofline | None
) -> list[Row]:
    inputs = case.make_inputs(point, case.device, case.dtype)
    cost = case.cost(point, case.dtype.itemsize)
    rows: dict[str, Row] = {}
    ready: dict[str, Prepared] = {}
    # the baseline goes first: the others are checked against it
    providers = sorted(case.providers, key=lambda p: p.name != case.baseline)
    baseline_result: Result | None = None
    for provider in providers:
        row = rows[provider.name] = {"point": point.name, "origin": point.origin}
        row |= {"sizes": point.sizes, "provider": provider.name}
        if provider.missing:
            row |= {"status": "missing", "reason": f"pip install {' '.join(provider.missing)}"}
        elif provider.slow and not slow:
            row |= {"status": "skipped", "reason": "slow to prepare: add --slow"}
        else:
            prepared, result, verdict = _prepare(provider, inputs, baseline_result)
            row |= verdict
            if verdict["status"] == "ok":
                ready[provider.name] = prepared
                baseline_result = result if baseline_result is None else baseline_result
    if case.baseline not in ready:
        raise RuntimeError(f"{case.name} {point.name}: the baseline failed: {rows[case.baseline]}")
    if case.probe is not None:
        for name in ready:
            rows[name] |= _probe(case.probe, point, case.provider(name))
    with torch.inference_mode():
        calls: dict[str, Call] = {name: prepared.call for name, prepared in ready.items()}
        samples = time_side_by_side(calls, timer_for(case.device), end)
        if case.device == "cuda":
            for name, call in calls.items():
                rows[name]["host_seconds"] = host_seconds(call)
    for name, prepared in ready.items():
        rows[name] |= _rates(samples[name], samples[case.baseline], cost, prepared)
        if roofline is not None:
            moved = cost.bytes + prepared.weight_bytes
            floor = roofline.seconds(cost.flops, moved, prepared.int8)
            rows[name]["roofline_share"] = floor / rows[name]["seconds"]["median"]
        rows[name] |= prepared.facts()
    return [rows[provider.name] for provider in case.providers]


def _probe(probe: Callable[[Point, Provider], Row], point: Point, provider: Provider) -> Row:
    """What the probe says, or why it could not: the times are worth keeping all the same."""
    try:
        return probe(point, provider)
    except RuntimeError as error:
        _say(str(error))
        return {"probe_failed": str(error)}


def _prepare(
    provider: Provider, inputs: Any, baseline_result: Result | None
) -> tuple[Any, Any, Row]:
    """The prepared provider, its result, and whether that result is right."""
    try:
        prepared = provider.prepare(inputs)
        with torch.inference_mode():
            result = _copy(prepared.call())
            expected = prepared.expected() if prepared.expected else baseline_result
    except Exception as error:
        _say(f"{provider.name} failed: {error}")
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None, None, {"status": "failed", "reason": reason}
    error = relative_error(result, result if expected is None else expected)
    verdict: Row = {"status": "ok", "error": error, "max_error": prepared.max_error}
    if baseline_result is not None:
        verdict["error_vs_baseline"] = relative_error(result, baseline_result)
    # written so that NaN is wrong
    if not error <= prepared.max_error:
        verdict["status"] = "wrong"
        verdict["reason"] = f"relative error {error:.2e}, allowed {prepared.max_error:.2e}"
        _say(f"{provider.name} is wrong: {verdict['reason']}")
    return prepared, result, verdict


def _copy(result: Result) -> Result:
    return result.clone() if isinstance(result, Tensor) else tuple(x.clone() for x in result)


def relative_error(actual: Result, expected: Result) -> float:
    """Frobenius norm of the difference over that of ``expected``; inf for another shape.

    The largest of those of its members for a tuple.
    """
    if isinstance(actual, tuple) or isinstance(expected, tuple):
        errors = [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
        # max() would lose a NaN
        return float(torch.tensor(errors).max())
    if actual.shape != expected.shape:
        return float("inf")
    wanted = expected.detach().double()
    return float((actual.detach().double() - wanted).norm() / wanted.norm())


def _rates(samples: list[float], baseline: list[float], cost: Cost, prepared: Prepared) -> Row:
    spread = Spread.of(samples)
    # a ratio a round: what slows the machine for a moment slows both
    ratio = Spread.of([b / s for b, s in zip(baseline, samples, strict=True)])
    return {
        "seconds": asdict(spread),
        "ratio": asdict(ratio),
        "gflop_per_s": cost.flops / spread.median / 1e9,
        "gb_per_s": (cost.bytes + prepared.weight_bytes) / spread.median / 1e9,
        "weight_bytes": prepared.weight_bytes,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
