"""What the device could do at most: the rates of a large matrix product and of a large copy."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.timing import Call, Timer, timer_for

SIZE = 8192
COPIED_BYTES = 2**31
ROUNDS = 10


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings.

    Args:
        flop_per_s: of a matrix product in the case's dtype.
        int8_op_per_s: of one of int8 values.
        byte_per_s: of a copy, bytes read plus bytes written.
    """

    flop_per_s: float
    int8_op_per_s: float
    byte_per_s: float

    def seconds(self, operations: int, moved: int, int8: bool) -> float:
        """The least time for some operations and bytes."""
        rate = self.int8_op_per_s if int8 else self.flop_per_s
        return max(operations / rate, moved / self.byte_per_s)


@functools.cache
def measure_roofline(dtype: torch.dtype, device: str = "cuda") -> Roofline:
    """Measure a device, on random data: zeros are multiplied faster."""
    timer = timer_for(device)
    a, b = (torch.randn(SIZE, SIZE, device=device, dtype=dtype) for _ in range(2))
    integers = _integers(device), _integers(device).t()
    source = torch.zeros(COPIED_BYTES // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    operations = 2 * SIZE**3
    return Roofline(
        flop_per_s=operations / _best(timer, lambda: a @ b),
        int8_op_per_s=operations / _best(timer, lambda: torch._int_mm(*integers)),
        byte_per_s=COPIED_BYTES / _best(timer, lambda: target.copy_(source)),
    )


def _integers(device: str) -> Tensor:
    return torch.randint(-127, 128, (SIZE, SIZE), device=device, dtype=torch.int8)


def _best(timer: Timer, call: Call) -> float:
    return min(timer.seconds(call, 3) for _ in range(ROUNDS))
