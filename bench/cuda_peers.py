"""Other people's low-bit linear layers for a GPU, each behind one function.

Each takes a float layer on the GPU and returns a call with its inputs and outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]

TORCHAO = {"torchao": "torchao"}
BITSANDBYTES = {"bitsandbytes": "bitsandbytes"}
GEMLITE = {"gemlite": "gemlite"}
GEMLITE_HQQ = GEMLITE | {"hqq": "hqq"}


def torchao_int4(linear: nn.Linear) -> Layer:
    """Groups of 128, in the layout of PyTorch's own int4 kernel."""
    from torchao.quantization import Int4WeightOnlyConfig

    return _torchao(linear, Int4WeightOnlyConfig(128, int4_packing_format="tile_packed_to_4d"))


def torchao_int8(linear: nn.Linear) -> Layer:
    """int8 weights and inputs, compiled as torchao asks for."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return torch.compile(_torchao(linear, Int8DynamicActivationInt8WeightConfig()), dynamic=False)


def _torchao(linear: nn.Linear, config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    model = nn.Sequential(_copy(linear))
    quantize_(model, config)
    return model


def bitsandbytes_nf4(linear: nn.Linear) -> Layer:
    """Blocks of 64 on the grid of the normal distribution."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        linear.in_features, linear.out_features,
        compute_dtype=linear.weight.dtype, quant_type="nf4",
    )  # fmt: skip
    layer.load_state_dict({name: tensor.cpu() for name, tensor in linear.state_dict().items()})
    return layer.to(linear.weight.device)


def gemlite_int4(linear: nn.Linear) -> Layer:
    """Groups of 64, quantized by HQQ."""
    from gemlite.helper import A16Wn
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    layer = HQQLinear(
        _copy(linear), BaseQuantizeConfig(nbits=4, group_size=64, axis=1),
        compute_dtype=linear.weight.dtype, device=str(linear.weight.device),
    )  # fmt: skip
    return A16Wn(device=str(linear.weight.device)).from_hqqlinear(layer)


def gemlite_int8(linear: nn.Linear) -> Layer:
    """int8 weights and inputs."""
    from gemlite.helper import A8W8_int8_dynamic

    return A8W8_int8_dynamic(device=str(linear.weight.device)).from_linear(_copy(linear))


def _copy(linear: nn.Linear) -> nn.Linear:
    """The quantizers write into what they are given."""
    twin = nn.Linear(linear.in_features, linear.out_features)
    twin.load_state_dict(linear.state_dict())
    return twin.to(linear.weight)
