"""Low-bit speech encoders: quantized linear, conv1d and attention behind drop-in modules.

>>> from lowbit_kernels import quantize
>>> report = quantize(model)  # any wav2vec2-family model, in place

Names load on first use, so importing the package costs little.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

# registers with transformers and torchaudio once they are imported, and imports neither
import lowbit_kernels.integrations  # noqa: F401

if TYPE_CHECKING:
    from lowbit_kernels.attention import (
        BucketedBias,
        DenseBias,
        RelativeKey,
        TransformerXL,
        flash_attention,
    )
    from lowbit_kernels.checkpoint import (
        CheckpointError,
        inspect_checkpoint,
        load_quantized,
        save_quantized,
    )
    from lowbit_kernels.conv1d import low_bit_conv1d
    from lowbit_kernels.conversion import capture_graphs, dequantize, quantize
    from lowbit_kernels.conversion.qat import convert, prepare_qat
    from lowbit_kernels.fake_quant import fake_quantize
    from lowbit_kernels.formats import QuantConfig, QuantSpec
    from lowbit_kernels.integrations.huggingface import LowbitConfig
    from lowbit_kernels.matmul import low_bit_linear
    from lowbit_kernels.modules import QAttention, QConv1d, QLinear

try:
    __version__ = version("lowbit-kernels")
except PackageNotFoundError:  # a source tree on the path, without an installation
    __version__ = "unknown"

_HOME = {
    "BucketedBias": "attention",
    "CheckpointError": "checkpoint",
    "DenseBias": "attention",
    "LowbitConfig": "integrations.huggingface",
    "QAttention": "modules",
    "QConv1d": "modules",
    "QLinear": "modules",
    "QuantConfig": "formats",
    "QuantSpec": "formats",
    "RelativeKey": "attention",
    "TransformerXL": "attention",
    "capture_graphs": "conversion",
    "convert": "conversion.qat",
    "dequantize": "conversion",
    "fake_quantize": "fake_quant",
    "flash_attention": "attention",
    "inspect_checkpoint": "checkpoint",
    "load_quantized": "checkpoint",
    "low_bit_conv1d": "conv1d",
    "low_bit_linear": "matmul",
    "prepare_qat": "conversion.qat",
    "quantize": "conversion",
    "save_quantized": "checkpoint",
}

__all__ = [
    "BucketedBias",
    "CheckpointError",
    "DenseBias",
    "LowbitConfig",
    "QAttention",
    "QConv1d",
    "QLinear",
    "QuantConfig",
    "QuantSpec",
    "RelativeKey",
    "TransformerXL",
    "capture_graphs",
    "convert",
    "dequantize",
    "fake_quantize",
    "flash_attention",
    "inspect_checkpoint",
    "load_quantized",
    "low_bit_conv1d",
    "low_bit_linear",
    "prepare_qat",
    "quantize",
    "save_quantized",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
