"""What the device could do at most: the rates of a large matrix product and of a large copy."""

import functools
from dataclasses import dataclass

import torch

from bench.timing import Call, Timer, timer_for

# of the matrices, and bytes of the copy; a CPU is only tried
SIZE = {"cuda": 8192, "cpu": 256}
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**22}
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
    timer, size, copied = timer_for(device), SIZE[device], COPIED_BYTES[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left, right = (
        torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2)
    )
    source = torch.randint(-127, 128, (copied // 2,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    operations = 2 * size**3
    return Roofline(
        flop_per_s=operations / _best(timer, lambda: a @ b),
        int8_op_per_s=operations / _best(timer, lambda: torch._int_mm(left, right.t())),
        byte_per_s=copied / _best(timer, lambda: target.copy_(source)),
    )


def _best(timer: Timer, call: Call) -> float:
    return min(timer.seconds(call, 3) for _ in range(ROUNDS))
