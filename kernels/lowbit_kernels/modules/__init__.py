"""Drop-in modules: QLinear, QConv1d, QAttention, and the training twin QATLinear."""

from lowbit_kernels.modules.attention import QAttention
from lowbit_kernels.modules.base import QuantizedModule, check_spec
from lowbit_kernels.modules.conv1d import QConv1d, folded_weight, takes_offset
from lowbit_kernels.modules.folded import FoldedFeedForward, FoldedLinear
from lowbit_kernels.modules.linear import QLinear
from lowbit_kernels.modules.qat import QATLinear, check_qat

__all__ = [
    "FoldedFeedForward",
    "FoldedLinear",
    "QATLinear",
    "QAttention",
    "QConv1d",
    "QLinear",
    "QuantizedModule",
    "check_qat",
    "check_spec",
    "folded_weight",
    "takes_offset",
]
