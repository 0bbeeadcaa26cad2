"""LowbitConfig and its quantizer: from_pretrained, save_pretrained, PEFT and pipelines.

Imports transformers, and is imported by it or with it: never by ``import lowbit_kernels``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from lowbit_kernels.conversion import adapt, dequantize, exposed, quantize
from lowbit_kernels.conversion.matmuls import add_matmuls
from lowbit_kernels.formats import QuantConfig
from lowbit_kernels.integrations import checksum
from lowbit_kernels.integrations.fuse import fuse_layers
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
    empty quantized layers. Tensors on their way from the file are never touched. A checksum is
    written with them and compared before they are loaded.
    """

    quantization_config: LowbitConfig
    _shapes: dict[str, torch.Size]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        # None where the caller hands in a state dict
        if files := kwargs.get("checkpoint_files"):
            checksum.check_files([Path(file) for file in files])
        with exposed(model):
            add_matmuls(model, self.quantization_config.quant_config)
            place_skeletons(model, self.quantization_config.layers)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config.quant_config
        if self.pre_quantized:
            _check_loaded(model, self._shapes)
            _check_scales(model)
            adapt(model)
            attach(model, config)
        else:
            quantize(model, config, method=self.quantization_config.method or "rtn")

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize(model)
        return model if dtype is None else model.to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """What ``save_pretrained`` adds to the file's metadata: the checksum of its tensors."""
        if getattr(model, "_hf_peft_config_loaded", False):  # then only adapters are written
            return None, {}
        ignored = model._keys_to_ignore_on_save or ()
        state = {n: tensor for n, tensor in model.state_dict().items() if n not in ignored}
        stored = revert_weight_conversion(model, state).values()
        # known after the save only: tensors that it merges or splits, that are offloaded or sharded
        if {*map(id, state.values())} != {*map(id, stored)} or any(
            tensor.is_meta or hasattr(tensor, "full_tensor") for tensor in stored
        ):
            return None, {}
        return None, {checksum.KEY: checksum.checksum(stored)}

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


def attach(model: Any, config: QuantConfig) -> str | None:
    """Mark a transformers model as quantized: ``save_pretrained`` then writes its layer table.

    With ``config.fuse`` its encoder layers become fused ones.

    Args:
        model: holds quantized layers.
        config: what it was quantized with.

    Returns:
        How many layers were fused, if any were to be.
    """
    stored = LowbitConfig(config=config.to_dict(), method=None, layers=layer_table(model))
    model.config.quantization_config = stored
    model.hf_quantizer = LowbitQuantizer(stored, pre_quantized=True)
    model.quantization_method = QUANT_METHOD
    _set_quantized(model, True)
    count = fuse_layers(model) if config.fuse else 0
    if count:
        model.set_attn_implementation("lowbit")
    return f"{count} encoder layers are fused" if config.fuse else None


def detach(model: Any) -> None:
    """Undo ``attach``."""
    model.__dict__.pop("hf_quantizer", None)
    model.__dict__.pop("quantization_method", None)
    model.config.__dict__.pop("quantization_config", None)
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


def _check_loaded(model: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """Refuse tensors of another shape, and quantized layers that got none, whatever the caller."""
    for name, tensor in model.state_dict().items():
        wanted = shapes.get(name, tensor.shape)
        if tensor.shape != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(tensor.shape)} in the file")
    for name, module in model.named_modules():
        # Accelerate's hooks move tensors, and lose transformers' mark of what came from the file
        if not isinstance(module, QuantizedModule) or hasattr(module, "_hf_hook"):
            continue
        for key, tensor in module.state_dict(keep_vars=True).items():
            if not getattr(tensor, "_is_hf_initialized", False):
                raise ValueError(f"{name}.{key} must be in the file in the layer's shape, got none")


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
