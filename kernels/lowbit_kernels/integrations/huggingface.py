"""LowbitConfig and its quantizer: from_pretrained, save_pretrained, PEFT and pipelines.

Imports transformers, and is imported by it or with it: never by ``import lowbit_kernels``.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from lowbit_kernels.conversion import adapt, dequantize, exposed, quantize
from lowbit_kernels.formats import QuantConfig
from lowbit_kernels.integrations.huggingface_config import QUANT_METHOD, LowbitConfig
from lowbit_kernels.integrations.skeletons import layer_table, place_skeletons
from lowbit_kernels.modules import QuantizedModule
from lowbit_kernels.modules.base import KEEP_DTYPE

__all__ = ["LowbitConfig", "LowbitQuantizer", "attach", "detach", "is_pretrained"]

register_quantization_config(QUANT_METHOD)(LowbitConfig)


@register_quantizer(QUANT_METHOD)
class LowbitQuantizer(HfQuantizer):
    """What transformers calls around the loading and saving of a model.

    A float checkpoint is loaded in float and converted afterwards; a quantized one is loaded into
    empty quantized layers. Tensors on their way from the file are never touched.
    """

    quantization_config: LowbitConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            with exposed(model):
                place_skeletons(model, self.quantization_config.layers)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config.quant_config
        if self.pre_quantized:
            _check_scales(model)
            adapt(model)
            attach(model, config)
        else:
            quantize(model, config, method=self.quantization_config.method or "rtn")

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters train on top: yes."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works: yes."""
        return True


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers'."""
    from transformers.modeling_utils import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def attach(model: Any, config: QuantConfig) -> None:
    """Mark a transformers model as quantized: ``save_pretrained`` then writes its layer table.

    Args:
        model: holds quantized layers.
        config: what it was quantized with.
    """
    stored = LowbitConfig(config=config.to_dict(), method=None, layers=layer_table(model))
    model.config.quantization_config = stored
    model.hf_quantizer = LowbitQuantizer(stored, pre_quantized=True)
    model.quantization_method = QUANT_METHOD
    _set_quantized(model, True)


def detach(model: Any) -> None:
    """Undo ``attach``."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    _set_quantized(model, False)
    _restore_weight_norm(model)


def _restore_weight_norm(model: nn.Module) -> None:
    """Give positional convolutions their weight norm back: a float checkpoint is loaded with it."""
    for module in model.modules():
        conv = module._modules.get("conv")
        is_embedding = type(module).__name__.endswith("PositionalConvEmbedding")
        if is_embedding and type(conv) is nn.Conv1d and getattr(module, "batch_norm", None) is None:
            nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2)


def _set_quantized(model: Any, value: bool) -> None:
    model.is_quantized = value
    for module in model.modules():
        if is_pretrained(module):
            module.config._is_quantized = value


def _check_scales(model: nn.Module) -> None:
    """Refuse a model whose scales were cast on the way in: the digits would be gone for good."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            wide = torch.float32 if module.zero_point is None else torch.float16
            for scale in KEEP_DTYPE:
                wanted = wide if scale in ("scale", "zero_point") else torch.float32
                tensor = module._buffers.get(scale)
                if tensor is not None and tensor.dtype != wanted:
                    raise ValueError(f"{name}.{scale} must be {wanted}, got {tensor.dtype}")
