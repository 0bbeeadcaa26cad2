"""Drop-in modules: QLinear, QConv1d, QAttention, and the training twins QATLinear and QATConv1d."""

from lowbit_kernels.modules.attention import QAttention
from lowbit_kernels.modules.base import QuantizedModule, check_spec
from lowbit_kernels.modules.conv1d import QConv1d, folded_weight, takes_offset
from lowbit_kernels.modules.conv_module import ConvolutionModule
from lowbit_kernels.modules.linear import QLinear
from lowbit_kernels.modules.low_bit_matmuls import LowBitMatmuls, attend
from lowbit_kernels.modules.qat import QATConv1d, QATLinear
from lowbit_kernels.modules.qat_base import QATModule, check_qat

__all__ = [
    "ConvolutionModule",
    "LowBitMatmuls",
    "QATConv1d",
    "QATLinear",
    "QATModule",
    "QAttention",
    "QConv1d",
    "QLinear",
    "QuantizedModule",
    "attend",
    "check_qat",
    "check_spec",
    "folded_weight",
    "takes_offset",
]
