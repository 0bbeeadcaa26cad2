"""What an eager call of a low-bit layer keeps the host busy for, beside ``nn.Linear``'s."""

from collections.abc import Callable

import torch
from torch import nn

from bench.case import Row, ValueCase
from bench.timing import CpuTimer, Spread, host_seconds
from lowbit_kernels import QLinear, QuantSpec

# one row: the device is done before the host
ROWS, FEATURES = 1, 1024
ROUNDS, REPEATS = 30, 100
GOAL_US, MOONSHOT_US = 15.0, 3.0
SPECS = {
    "QLinear w4, float inputs": QuantSpec(bits=4),
    "QLinear w8, float inputs": QuantSpec(bits=8),
    "QLinear w4, int8 inputs": QuantSpec(bits=4, inputs="int8"),
}


def measure(device: str = "cuda") -> list[Row]:
    """Microseconds a call; on a CPU the arithmetic of one row is in them too."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    linear = nn.Linear(FEATURES, FEATURES, device=device, dtype=dtype)
    layers = {"nn.Linear": linear}
    layers |= {name: QLinear.from_float(linear, spec) for name, spec in SPECS.items()}
    x = torch.randn(ROWS, FEATURES, device=device, dtype=dtype)
    seconds: Callable[..., float] = host_seconds if device == "cuda" else CpuTimer().seconds
    samples: dict[str, list[float]] = {name: [] for name in layers}
    with torch.inference_mode():
        for layer in layers.values():
            seconds(lambda layer=layer: layer(x), REPEATS)
        for _ in range(ROUNDS):
            for name, layer in layers.items():
                samples[name].append(1e6 * seconds(lambda layer=layer: layer(x), REPEATS))
    rows = [_row(name, times) for name, times in samples.items()]
    for name in SPECS:
        more = [a - b for a, b in zip(samples[name], samples["nn.Linear"], strict=True)]
        goals = {"goal": GOAL_US, "moonshot": MOONSHOT_US}
        rows.append(_row(f"{name}, over nn.Linear", more) | goals)
    return rows


def _row(name: str, samples: list[float]) -> Row:
    spread = Spread.of(samples)
    return {
        "name": name, "value": spread.median, "q1": spread.q1, "q3": spread.q3, "unit": "us",
        "rounds": spread.rounds,
    }  # fmt: skip


HOST_OVERHEAD = ValueCase(
    "host_overhead", "Host time of an eager call of one row", measure, device="cuda",
    takes_device=True,
)  # fmt: skip
