"""What the device could do at most, measured: a large copy and two large matrix products."""

import torch

from bench.case import Row, ValueCase
from bench.roofline import COPIED_BYTES, SIZE, measure_roofline


def measure(device: str = "cuda") -> list[Row]:
    """Rates, and the operations a byte at which a bf16 product stops being a matter of memory."""
    ceilings = measure_roofline(torch.bfloat16, device)
    size = f"{SIZE[device]}^3"
    return [
        _row(f"copy of {COPIED_BYTES[device] // 2**20} MiB", ceilings.byte_per_s / 1e9, "GB/s"),
        _row(f"bf16 product, {size}", ceilings.flop_per_s / 1e12, "TFLOP/s"),
        _row(f"int8 product, {size}", ceilings.int8_op_per_s / 1e12, "TOP/s"),
        _row("ridge of bf16", ceilings.flop_per_s / ceilings.byte_per_s, "FLOP a byte"),
    ]


def _row(name: str, value: float, unit: str) -> Row:
    return {"name": name, "value": value, "unit": unit}


CEILINGS = ValueCase("ceilings", "Measured ceilings", measure, device="cuda", takes_device=True)
