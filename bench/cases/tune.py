"""Other tiles than the ones chosen for the fused linear kernel: what a better choice would gain."""

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from bench.cases.linear_cpu import make_inputs
from bench.harness import Point, Row, ValueCase, relative_error
from bench.shapes import LINEAR_CUDA
from bench.timing import Spread, Timer, timer_for
from lowbit_kernels import QLinear, QuantSpec
from lowbit_kernels.matmul.dispatch import LinearConfig, choose_config

ROUNDS, CALLS = 5, 10
POINTS = tuple(
    point
    for point in LINEAR_CUDA
    if point.origin.startswith("large") and point.sizes["M"] in (1, 64, 499)
    and "gelu" not in point.sizes
)  # fmt: skip
SPECS = {
    "w4, float inputs": QuantSpec(bits=4),
    "w4, int8 inputs": QuantSpec(bits=4, inputs="int8"),
}
CHANGES: tuple[dict[str, int], ...] = (
    {"block_n": 64}, {"block_n": 128}, {"block_m": 16}, {"block_m": 64}, {"block_m": 128},
    {"num_warps": 4}, {"num_warps": 8}, {"num_stages": 2}, {"num_stages": 3}, {"num_stages": 4},
    {"splits": 1}, {"splits": 2}, {"splits": 4}, {"splits": 8},
)  # fmt: skip


def measure(device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Microseconds with the chosen tiles and with each neighbor, one change at a time."""
    timer = timer_for(device)
    rows: list[Row] = []
    for point in POINTS:
        for kind, spec in SPECS.items():
            # the kernel is called without the module: where there is no GPU, it is interpreted
            inputs = make_inputs(point, device, dtype)
            layer = QLinear.from_float(inputs.linear, spec)
            rows += _rows(f"{point.name} {kind}", point, layer, inputs.x, timer)
    return rows


def _rows(name: str, point: Point, layer: QLinear, x: Tensor, timer: Timer) -> Iterator[Row]:
    from triton.runtime.errors import OutOfResources

    from lowbit_kernels.matmul import cuda

    chosen: list[LinearConfig] = []

    def remember(*sizes: int) -> LinearConfig:
        chosen.append(choose_config(*sizes))
        return chosen[0]

    def call() -> Tensor:
        return cuda.linear_cuda(x, layer.quantized_weight(), layer.bias, None, None)[0]

    with torch.inference_mode():
        with patch.object(cuda, "choose_config", remember):
            expected = call()
        for config in [chosen[0], *neighbors(chosen[0])]:
            with patch.object(cuda, "choose_config", lambda *_, config=config: config):
                try:
                    error = relative_error(call(), expected)
                    samples = [1e6 * timer.seconds(call, CALLS) for _ in range(ROUNDS)]
                except OutOfResources:
                    continue
            spread = Spread.of(samples)
            yield {
                "name": f"{name}: {config}", "value": spread.median, "q1": spread.q1,
                "q3": spread.q3, "unit": "us", "difference": error,
            }  # fmt: skip


def neighbors(chosen: LinearConfig) -> list[LinearConfig]:
    """Tiles that differ from the chosen ones in one number."""
    return [config for change in CHANGES if (config := replace(chosen, **change)) != chosen]


TUNE = ValueCase("tune", "Tiles of the linear kernel", measure, device="cuda", in_all=False)
