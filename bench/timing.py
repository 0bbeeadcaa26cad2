"""Time several calls side by side, so that a drift of the machine hits all of them alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from statistics import median, quantiles
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

# a sample shorter than this is mostly clock and interpreter
SAMPLE_SECONDS = 0.01
MIN_ROUNDS = 5
MAX_ROUNDS = 200
# several times the L2 cache of any GPU
FLUSH_BYTES = 2**30
WARM_SECONDS = 0.1
LONG_SECONDS = 0.01


class Timer(Protocol):
    """How a device is timed."""

    def seconds(self, call: Call, repeats: int) -> float:
        """Mean seconds of one call over ``repeats`` in a row."""


class CpuTimer:
    """Wall clock."""

    def seconds(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class CudaTimer:
    """CUDA events around each call, on the current stream; no input is left in the L2 cache.

    Filling the memory between two calls also takes so long that the host has launched what a short
    call launches before the device gets to it. What launching costs is ``host_seconds``.
    """

    def __init__(self) -> None:
        self._other_data = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        until = time.perf_counter() + WARM_SECONDS
        while time.perf_counter() < until:  # idle clocks are low
            self._other_data.zero_()
            torch.cuda.synchronize()

    def seconds(self, call: Call, repeats: int) -> float:
        events = []
        torch.cuda.synchronize()
        for _ in range(repeats):
            self._other_data.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1000 / repeats


class WarmCudaTimer:
    """CUDA events around all calls together: what the host cannot launch in time counts too."""

    def seconds(self, call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / repeats


def host_seconds(call: Call, repeats: int = 20) -> float:
    """Mean seconds for which one call keeps the host busy, while the device works on its own.

    A first call says whether so many are worth their time.
    """
    torch.cuda.synchronize()
    if CpuTimer().seconds(call, 1) > LONG_SECONDS:
        repeats = 1
    torch.cuda.synchronize()
    seconds = CpuTimer().seconds(call, repeats)
    torch.cuda.synchronize()
    return seconds


def timer_for(device: str) -> Timer:
    """The timer of a device type, ``"cpu"`` or ``"cuda"``."""
    return CudaTimer() if device == "cuda" else CpuTimer()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one quantity over the rounds."""

    median: float
    q1: float
    q3: float
    rounds: int

    @staticmethod
    def of(samples: list[float]) -> "Spread":
        q1, _, q3 = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return Spread(median(samples), q1, q3, len(samples))


@dataclass(frozen=True)
class Sampler:
    """One way to time one provider: ``call`` stands for ``calls`` calls of it."""

    timer: Timer
    call: Call
    calls: int = 1

    def seconds(self, repeats: int) -> float:
        """Mean seconds of one call of the provider."""
        return self.timer.seconds(self.call, repeats) / self.calls


def capture(calls: list[Call]) -> Call:
    """A CUDA graph of the calls, one after the other; they have run before.

    Raises:
        RuntimeError: if one of them cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def sampler(mode: str, calls: list[Call], timer: Timer) -> Sampler:
    """How to time calls that do the same to different data.

    Args:
        mode: ``"graph"``: a CUDA graph of all of them is replayed; ``"eager"``: each is launched;
            ``"flushed"``: each by itself, after the L2 cache was filled with something else;
            ``"warm"``: a graph of the first alone, whose data the L2 cache may hold;
            ``"wall"``: on a CPU.
        calls: one for each set of inputs and weights; they are cycled through.
        timer: ``timer_for`` the device.

    Raises:
        RuntimeError: if the calls cannot be captured.
    """
    if mode in ("graph", "warm"):
        recorded = calls if mode == "graph" else calls[:1] * len(calls)
        return Sampler(WarmCudaTimer(), capture(recorded), len(calls))
    if mode == "eager":
        return Sampler(WarmCudaTimer(), lambda: [call() for call in calls], len(calls))
    turns = cycle(calls)
    return Sampler(timer, lambda: next(turns)())


def time_side_by_side(samplers: Mapping[str, Sampler], end: float) -> dict[str, list[float]]:
    """Sample every call once a round, each round starting with the next one.

    Args:
        samplers: by name; each is warmed up here.
        end: when to stop, by ``time.perf_counter``; ``MIN_ROUNDS`` rounds are run in any case.

    Returns:
        Name to seconds a call, one sample a round; sample i of every name is of the same round.
    """
    names = list(samplers)
    repeats = {}
    for name in names:
        samplers[name].seconds(1)  # the first call packs weights and compiles kernels
        # with what the timer itself takes
        started = time.perf_counter()
        samplers[name].seconds(1)
        once = time.perf_counter() - started
        repeats[name] = max(1, int(SAMPLE_SECONDS / max(once, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(MAX_ROUNDS):
        if i >= MIN_ROUNDS and time.perf_counter() > end:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(samplers[name].seconds(repeats[name]))
    return samples
