"""CPU kernels: int8 and low-bit products, convolutions, and the passes between them."""

from lowbit_kernels.cpu.conv1d import conv1d_cpu
from lowbit_kernels.cpu.library import cpu_backend
from lowbit_kernels.cpu.linear import linear_cpu
from lowbit_kernels.cpu.resident import resident_bytes

__all__ = ["conv1d_cpu", "cpu_backend", "linear_cpu", "resident_bytes"]
