"""CPU kernels: int8 and low-bit products, convolutions, front end, attention, norms."""

from lowbit_kernels.cpu.attention import (
    attention_backward_cpu,
    attention_cpu,
    empty_gates,
    empty_heads,
)
from lowbit_kernels.cpu.conv1d import conv1d_cpu
from lowbit_kernels.cpu.front_end import FrontEndLayer, Norm, front_end_cpu
from lowbit_kernels.cpu.library import cpu_backend
from lowbit_kernels.cpu.linear import linear_cpu
from lowbit_kernels.cpu.norm import (
    group_norm_backward_cpu,
    group_norm_cpu,
    norm_quantize_cpu,
)
from lowbit_kernels.cpu.resident import resident_bytes

__all__ = [
    "FrontEndLayer",
    "Norm",
    "attention_backward_cpu",
    "attention_cpu",
    "conv1d_cpu",
    "cpu_backend",
    "empty_gates",
    "empty_heads",
    "front_end_cpu",
    "group_norm_backward_cpu",
    "group_norm_cpu",
    "linear_cpu",
    "norm_quantize_cpu",
    "resident_bytes",
]
