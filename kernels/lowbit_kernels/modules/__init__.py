"""Drop-in modules: QLinear, QConv1d, QAttention."""

from lowbit_kernels.modules.attention import QAttention
from lowbit_kernels.modules.base import QuantizedModule, check_spec
from lowbit_kernels.modules.conv1d import QConv1d, folded_weight, takes_offset
from lowbit_kernels.modules.linear import QLinear

__all__ = [
    "QAttention",
    "QConv1d",
    "QLinear",
    "QuantizedModule",
    "check_spec",
    "folded_weight",
    "takes_offset",
]
