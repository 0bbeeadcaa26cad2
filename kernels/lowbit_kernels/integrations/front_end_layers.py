"""Reading a transformers feature encoder as the layers of ``conv1d.front_end``."""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.cpu import FrontEndLayer, Norm
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.integrations.activations import epilogue_of
from lowbit_kernels.modules import QConv1d


def front_end_layers(conv_layers: nn.ModuleList) -> list[FrontEndLayer] | None:
    """The layers, or ``None`` where one of them is of another form than the fused call serves.

    Served: a float convolution of one channel, then quantized ones whose inputs are all float or
    all int8, none with padding or dilation; LayerNorm over channels anywhere, a GroupNorm of one
    channel a group in the first layer.
    """
    layers = []
    for i, module in enumerate(conv_layers):
        layer: Any = module
        conv: Any = layer.conv
        kind = nn.Conv1d if i == 0 else QConv1d
        if type(conv) is not kind or any(conv.padding) or any(d != 1 for d in conv.dilation):
            return None
        if (conv.in_channels != 1) if i == 0 else (conv.groups != 1):
            return None
        norm, served = _norm(getattr(layer, "layer_norm", None), conv.out_channels, i == 0)
        epilogue = epilogue_of(layer.activation)
        if not served or epilogue is None:
            return None
        if i == 0:
            layers.append(FrontEndLayer(conv.weight, conv.bias, conv.stride[0], norm, epilogue))
            continue
        packed: QConv1d = layer.conv
        weight, bias = packed.quantized_weight(), packed.bias_with_offset()
        layers.append(
            FrontEndLayer(weight, bias, conv.stride[0], norm, epilogue, packed.input_offset)
        )
    inputs = {
        layer.weight.spec.inputs for layer in layers if isinstance(layer.weight, QuantizedWeight)
    }
    return layers if inputs in ({None}, {"int8"}) else None


def needs_gradient(conv_layers: nn.ModuleList, waveform: Tensor) -> bool:
    """Whether a call of the layers must be differentiable."""
    if not torch.is_grad_enabled():
        return False
    return waveform.requires_grad or any(p.requires_grad for p in conv_layers.parameters())


def _norm(module: Any, channels: int, first: bool) -> tuple[Norm | None, bool]:
    """The norm of a layer, and whether it is one that the fused call serves."""
    if module is None:
        return None, True
    if isinstance(module, nn.GroupNorm):
        one_channel = first and module.num_groups == channels and module.affine
        return Norm("group", module.weight, module.bias, module.eps), one_channel
    affine = isinstance(module, nn.LayerNorm) and module.elementwise_affine
    if not affine or module.bias is None:
        return None, False
    return Norm("layer", module.weight, module.bias, module.eps), True
