"""Whole models: quantize and dequantize, static calibration, the report."""

from lowbit_kernels.conversion.convert import adapt, dequantize, quantize
from lowbit_kernels.conversion.expose import exposed
from lowbit_kernels.conversion.graphs import GraphedModel, capture_graphs
from lowbit_kernels.conversion.registry import ADAPTERS, EXPOSERS, FINISHERS, Adapter, finish
from lowbit_kernels.conversion.report import LayerReport, QuantizationReport

__all__ = [
    "ADAPTERS",
    "EXPOSERS",
    "FINISHERS",
    "Adapter",
    "GraphedModel",
    "LayerReport",
    "QuantizationReport",
    "adapt",
    "capture_graphs",
    "dequantize",
    "exposed",
    "finish",
    "quantize",
]
