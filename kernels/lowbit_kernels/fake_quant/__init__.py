"""Fake quantization: quantize and dequantize in one pass, with gradients for training."""

from lowbit_kernels.fake_quant.linear_op import training_linear
from lowbit_kernels.fake_quant.op import fake_quantize
from lowbit_kernels.fake_quant.quantizer import Levels, Quantizer
from lowbit_kernels.fake_quant.scales import initial_scale, weight_scale

__all__ = [
    "Levels",
    "Quantizer",
    "fake_quantize",
    "initial_scale",
    "training_linear",
    "weight_scale",
]
