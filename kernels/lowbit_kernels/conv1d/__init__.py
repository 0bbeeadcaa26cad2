"""One-dimensional convolution with a low-bit weight, or one that trains."""

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.conv1d.op import low_bit_conv1d
from lowbit_kernels.conv1d.reference import conv1d_reference, quantize_utterances
from lowbit_kernels.conv1d.training_op import training_conv1d

__all__ = [
    "Geometry",
    "conv1d_reference",
    "low_bit_conv1d",
    "quantize_utterances",
    "training_conv1d",
]
