"""Time several calls side by side, so that a drift of the machine hits all of them alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


def host_seconds(call: Call, repeats: int = 20) -> float:
    """Mean seconds for which one call keeps the host busy, while the device works on its own."""
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


def time_side_by_side(
    calls: Mapping[str, Call], timer: Timer, end: float
) -> dict[str, list[float]]:
    """Sample every call once a round, each round starting with the next one.

    Args:
        calls: name to call, each warmed up once here.
        timer: of the device.
        end: when to stop, by ``time.perf_counter``; ``MIN_ROUNDS`` rounds are run in any case.

    Returns:
        Name to seconds a call, one sample a round; sample i of every name is of the same round.
    """
    names = list(calls)
    repeats = {}
    for name in names:
        timer.seconds(calls[name], 1)  # the first call packs weights and compiles kernels
        # with what the timer itself takes
        started = time.perf_counter()
        timer.seconds(calls[name], 1)
        once = time.perf_counter() - started
        repeats[name] = max(1, int(SAMPLE_SECONDS / max(once, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(MAX_ROUNDS):
        if i >= MIN_ROUNDS and time.perf_counter() > end:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timer.seconds(calls[name], repeats[name]))
    return samples
