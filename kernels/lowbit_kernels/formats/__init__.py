"""What low-bit means: specs, the packed format, and rounding float weights into it."""

from lowbit_kernels.formats.config import QuantConfig
from lowbit_kernels.formats.packing import FORMAT_VERSION
from lowbit_kernels.formats.rounding import METHODS, quantize_depthwise_weight, quantize_weight
from lowbit_kernels.formats.spec import QuantSpec
from lowbit_kernels.formats.weight import QuantizedWeight, empty_depthwise_weight, empty_weight

__all__ = [
    "FORMAT_VERSION",
    "METHODS",
    "QuantConfig",
    "QuantSpec",
    "QuantizedWeight",
    "empty_depthwise_weight",
    "empty_weight",
    "quantize_depthwise_weight",
    "quantize_weight",
]
