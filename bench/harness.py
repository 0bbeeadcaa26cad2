"""Run a case: correctness first, then time, then a record, the same way for every case."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.case import (
    BEST_PEER,
    FLOOR,
    READ_ONLY,
    Case,
    Cost,
    Goal,
    Point,
    Prepared,
    Provider,
    Result,
    Row,
    ValueCase,
)
from bench.roofline import Roofline, measure_roofline
from bench.timing import Call, Spread, host_seconds, sampler, time_side_by_side, timer_for

Rows = list[Row]
Samples = dict[str, dict[str, list[float]]]


# after one of them every call of the process fails; others, as in a capture, pass
LOST = (
    "illegal memory access", "misaligned address", "illegal instruction", "device-side assert",
    "launch failure", "hardware", "uncorrectable",
)  # fmt: skip


def device_lost(error: Exception) -> bool:
    """Whether the device serves this process no more."""
    return any(word in str(error) for word in LOST)


class Watch:
    """Told what is about to run, so that what kills the process can be left out the next time."""

    def starts(self, case: str, point: str, provider: str) -> None:
        """A provider is about to be prepared, or timed."""

    def died(self, case: str, point: str, provider: str) -> bool:
        """Whether an earlier process died of it."""
        return False


@dataclass
class _Ready:
    """A provider at a point: what it was prepared to, and its calls, one a set of data."""

    prepared: Prepared
    calls: list[Call]


def run_case(
    case: Case | ValueCase,
    seconds: float,
    slow: bool = False,
    done: Row | None = None,
    save: Callable[[Row], object] = lambda record: None,
    watch: Watch | None = None,
) -> Row:
    """Run a case and return its part of the record.

    Args:
        case: what to run.
        seconds: to spend; timing gets what preparing and probing leave of it. Points that it does
            not last for are left out, the first one never.
        slow: whether providers marked slow run too.
        done: an earlier record of the same case and code, whose points are kept and not run again.
        save: called with the record whenever a point is done.
        watch: told about each provider before it runs.

    Raises:
        RuntimeError: if no point gives a result, or the device serves this process no more.
    """
    record: Row = {"case": case.name, "title": case.title, "layout": case.layout}
    if isinstance(case, ValueCase):
        rows = case.measure(case.device) if case.takes_device else case.measure()
        return record | {"results": rows}
    rows = list(done["results"]) if done else []
    kept = {row["point"] for row in rows}
    points = [point for point in case.points if point.name not in kept]
    end, ran, broken = time.perf_counter() + seconds, False, {}
    roofline = measure_roofline(case.dtype) if case.device == "cuda" and points else None
    record |= {"baseline": case.baseline, "dtype": str(case.dtype).removeprefix("torch.")}
    record |= {"roofline": asdict(roofline)} if roofline is not None else {}
    if roofline is None and done and "roofline" in done:
        record["roofline"] = done["roofline"]
    for i, point in enumerate(points):
        started = time.perf_counter()
        if (ran or kept) and started > end:
            record["left_out"] = [left.name for left in points[i:]]
            _say(f"{case.name}: no time left for {', '.join(record['left_out'])}")
            break
        share = (end - started) / (len(points) - i)
        try:
            rows += _run_point(case, point, started + share, slow, roofline, watch or Watch())
        except (RuntimeError, ImportError) as error:  # transformers may not be there
            if device_lost(error):
                raise
            broken[point.name] = str(error)[:500]
            _say(f"{case.name} {point.name} is broken: {error}")
            continue
        ran = True
        save(record | {"results": rows})
        _say(f"{case.name} {point.name}: {time.perf_counter() - started:.0f} s")
    if not rows:
        raise RuntimeError(f"every point is broken: {broken}")
    return record | {"results": rows} | ({"broken": broken} if broken else {})


def prepare_point(
    case: Case, point: Point, slow: bool = False, watch: Watch | None = None
) -> tuple[dict[str, Row], dict[str, _Ready]]:
    """Check every provider at a point: its row, and those that may be timed by name."""
    watch = watch or Watch()
    sets = [_inputs(case, point, seed) for seed in range(case.sets)]
    rows: dict[str, Row] = {}
    ready: dict[str, _Ready] = {}
    baseline_result: Result | None = None
    # the baseline goes first: the others are checked against it
    for provider in sorted(case.providers, key=lambda p: p.name != case.baseline):
        row = rows[provider.name] = {"point": point.name, "origin": point.origin}
        row |= {"sizes": point.sizes, "provider": provider.name}
        if provider.missing:
            row |= {"status": "missing", "reason": f"pip install {' '.join(provider.missing)}"}
        elif provider.gpu_only and case.device != "cuda":
            row |= {"status": "missing", "reason": "needs a CUDA GPU"}
        elif provider.points is not None and point.name not in provider.points:
            row |= {"status": "skipped", "reason": "not at this shape"}
        elif provider.slow and not slow:
            row |= {"status": "skipped", "reason": "slow to prepare: add --slow"}
        elif watch.died(case.name, point.name, provider.name):
            row |= {"status": "failed", "reason": "the process died of it"}
        else:
            watch.starts(case.name, point.name, provider.name)
            one, result, verdict = _prepare(provider, sets, baseline_result)
            row |= verdict
            if verdict["status"] == "ok":
                ready[provider.name] = one
                baseline_result = result if baseline_result is None else baseline_result
    if case.baseline not in ready:
        raise RuntimeError(f"{case.name} {point.name}: the baseline failed: {rows[case.baseline]}")
    return rows, ready


def _run_point(
    case: Case, point: Point, end: float, slow: bool, roofline: Roofline | None, watch: Watch
) -> list[Row]:
    cost = case.cost(point, case.dtype.itemsize)
    rows, ready = prepare_point(case, point, slow, watch)
    if case.probe is not None:
        for name in ready:
            rows[name] |= _probe(case.probe, point, case.provider(name))
    with torch.inference_mode():
        samples = _time(case, point, ready, rows, end, watch)
        if case.device == "cuda":
            for name, one in ready.items():
                rows[name]["host_seconds"] = host_seconds(one.calls[0])
    for name, one in ready.items():
        rows[name] |= _rates(name, samples, case.baseline, cost, one.prepared)
        if roofline is not None:
            moved = cost.bytes + one.prepared.weight_bytes
            floor = roofline.seconds(cost.flops, moved, one.prepared.int8)
            rows[name]["floor_seconds"] = floor
            rows[name]["roofline_share"] = floor / rows[name]["seconds"]["median"]
        rows[name] |= one.prepared.facts()
    for name in rows:
        goals = [goal for goal in point.goals if goal.ours == name]
        if goals:
            rows[name]["goals"] = [_reached(goal, rows, samples) for goal in goals]
    return [rows[provider.name] for provider in case.providers]


def _inputs(case: Case, point: Point, seed: int) -> Any:
    seeds = (seed,) if case.sets > 1 else ()
    return case.make_inputs(point, case.device, case.dtype, *seeds)


def _time(
    case: Case,
    point: Point,
    ready: dict[str, _Ready],
    rows: dict[str, Row],
    end: float,
    watch: Watch,
) -> Samples:
    """Seconds a call by mode, provider and round."""
    timer, samples = timer_for(case.device), {}
    modes = case.modes if case.device == "cuda" else ("wall",)
    for i, mode in enumerate(modes):
        samplers = {}
        for name, one in ready.items():
            watch.starts(case.name, point.name, name)
            try:
                samplers[name] = sampler(mode, one.calls, timer)
            except RuntimeError as error:
                if device_lost(error):
                    raise
                rows[name][f"no_{mode}"] = str(error).splitlines()[0][:200]
        now = time.perf_counter()
        samples[mode] = time_side_by_side(samplers, now + (end - now) / (len(modes) - i))
    return samples


def _probe(probe: Callable[..., Row], *arguments: Any) -> Row:
    """What the probe says, or why it could not: the times are worth keeping all the same."""
    try:
        return probe(*arguments)
    except RuntimeError as error:
        _say(str(error))
        return {"probe_failed": str(error)}


def _prepare(
    provider: Provider, sets: list[Any], baseline_result: Result | None
) -> tuple[Any, Any, Row]:
    """The prepared provider, its result, and whether that result is right."""
    try:
        prepared = provider.prepare(sets[0])
        with torch.inference_mode():
            result = _copy(prepared.call())
            expected = prepared.expected() if prepared.expected else baseline_result
        calls = [prepared.call, *(provider.prepare(data).call for data in sets[1:])]
        with torch.inference_mode():
            for call in calls[1:]:  # a graph records no first call
                call()
    except NotImplementedError as error:
        return None, None, {"status": "missing", "reason": str(error)}
    except Exception as error:
        if device_lost(error):
            raise
        _say(f"{provider.name} failed: {error}")
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None, None, {"status": "failed", "reason": reason}
    error = relative_error(result, result if expected is None else expected)
    verdict: Row = {"status": "ok", "error": error, "max_error": prepared.max_error}
    # frozen weights have fewer gradients than trained ones
    if baseline_result is not None and _count(result) == _count(baseline_result):
        verdict["error_vs_baseline"] = relative_error(result, baseline_result)
    # written so that NaN is wrong
    if not error <= prepared.max_error:
        verdict["status"] = "wrong"
        verdict["reason"] = f"relative error {error:.2e}, allowed {prepared.max_error:.2e}"
        _say(f"{provider.name} is wrong: {verdict['reason']}")
    return _Ready(prepared, calls), result, verdict


def _count(result: Result) -> int:
    return 1 if isinstance(result, Tensor) else len(result)


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


def _common(samples: Samples, *names: str) -> str:
    """The first mode in which all of them were timed."""
    return next(mode for mode, times in samples.items() if all(name in times for name in names))


def _ratio(samples: Samples, name: str, against: str) -> Spread:
    """How many times faster than another, round by round: a slow moment slows both."""
    times = samples[_common(samples, name, against)]
    return Spread.of([b / s for b, s in zip(times[against], times[name], strict=True)])


def _rates(name: str, samples: Samples, baseline: str, cost: Cost, prepared: Prepared) -> Row:
    mode = _common(samples, name)
    spread = Spread.of(samples[mode][name])
    row = {
        "seconds": asdict(spread),
        "ratio": asdict(_ratio(samples, name, baseline)),
        "gflop_per_s": cost.flops / spread.median / 1e9,
        "gb_per_s": (cost.bytes + prepared.weight_bytes) / spread.median / 1e9,
        "weight_bytes": prepared.weight_bytes,
    }
    if len(samples) > 1:
        timed = {m: asdict(Spread.of(times[name])) for m, times in samples.items() if name in times}
        row |= {"mode": mode, "ratio_mode": _common(samples, name, baseline), "modes": timed}
    return row


def _reached(goal: Goal, rows: dict[str, Row], samples: Samples) -> Row:
    """A goal with what was reached: ``"moonshot"``, ``"good"`` or ``"no"``; None: not measured."""
    peers = [n for n, row in rows.items() if row["status"] == "ok" and not n.startswith("lowbit")]
    if goal.against == BEST_PEER:
        peers = [name for name in peers if name != READ_ONLY]
    against, ratio = goal.against, None
    if rows[goal.ours]["status"] == "ok":
        if against == FLOOR:
            ratio = rows[goal.ours].get("roofline_share")
        else:
            chosen = peers if against == BEST_PEER else [name for name in peers if name == against]
            ratios = {name: _ratio(samples, goal.ours, name).median for name in chosen}
            if ratios:
                hardest = min(ratios, key=ratios.__getitem__)
                ratio, against = ratios[hardest], hardest
    reached = None
    if ratio is not None:
        reached = "moonshot" if ratio >= goal.moonshot else "good" if ratio >= goal.good else "no"
    return {
        "against": goal.against, "peer": against, "good": goal.good, "moonshot": goal.moonshot,
        "ratio": ratio, "reached": reached,
    }  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
