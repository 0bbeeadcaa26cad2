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
    """CUDA events around the calls, on the current stream."""

    def seconds(self, call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats


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
        once = timer.seconds(calls[name], 1)
        repeats[name] = max(1, int(SAMPLE_SECONDS / max(once, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(MAX_ROUNDS):
        if i >= MIN_ROUNDS and time.perf_counter() > end:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timer.seconds(calls[name], repeats[name]))
    return samples
