"""Other people's low-bit linear layers for a GPU, each behind one function.

Each takes a float layer on the GPU and returns a call with its inputs and outputs.

Dimension key: M rows, N output features, K input features.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]

TORCHAO = {"torchao": "torchao"}
BITSANDBYTES = {"bitsandbytes": "bitsandbytes"}
GEMLITE = {"gemlite": "gemlite"}
HUMMING = {"humming": "humming-kernels"}

FP8_MAX = 448.0
GEMLITE_GROUP = 64


@functools.cache
def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` of a function, once, so that every set of weights shares its code."""
    return torch.compile(function, **options)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A float layer and its activation."""
    return F.gelu(F.linear(x, weight, bias))


def linear_plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A float layer."""
    return F.linear(x, weight, bias)


def max_autotune(linear: nn.Linear, gelu: bool) -> Layer:
    """``torch.compile`` with its own templates against cuBLAS; the graphs are the harness's."""
    function = linear_gelu if gelu else linear_plain
    run = compiled(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda x: run(x, linear.weight, linear.bias)


def _quantized(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """x / scale, and the scale [M, 1] that makes the largest value of a row ``largest``."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    return x.float() / scale, scale


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 levels, and the scale [M, 1] of each row."""
    levels, scale = _quantized(x, 127)
    return levels.round().to(torch.int8), scale


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    levels, scale = _quantized(x, FP8_MAX)
    return levels.to(torch.float8_e4m3fn), scale


def _finish_int8(acc: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    y = acc.float() * x_scale * scale + bias
    return (F.gelu(y) if gelu else y).to(bias.dtype)


def int_mm(linear: nn.Linear, gelu: bool) -> Layer:
    """cuBLAS's int8 product between a compiled quantization and a compiled epilogue."""
    qweight, scale = to_int8(linear.weight)
    quantize = compiled(to_int8, dynamic=True)
    finish = compiled(_finish_int8, dynamic=True)

    def run(x: Tensor) -> Tensor:
        levels, x_scale = quantize(x)
        return finish(torch._int_mm(levels, qweight.t()), x_scale, scale.t(), linear.bias, gelu)

    return run


def scaled_mm(linear: nn.Linear, gelu: bool) -> Layer:
    """cuBLAS's fp8 product with a scale a row, after a compiled quantization."""
    qweight, scale = _to_fp8(linear.weight)
    quantize, activate = compiled(_to_fp8, dynamic=True), compiled(F.gelu, dynamic=True)

    def run(x: Tensor) -> Tensor:
        levels, x_scale = quantize(x)
        y = torch._scaled_mm(
            levels, qweight.t(), scale_a=x_scale, scale_b=scale.t(), bias=linear.bias,
            out_dtype=x.dtype,
        )  # fmt: skip
        return activate(y) if gelu else y

    return run


def torchao_int4(linear: nn.Linear) -> Layer:
    """Groups of 128, in the layout of PyTorch's own int4 kernel."""
    from torchao.quantization import Int4WeightOnlyConfig

    return _torchao(linear, Int4WeightOnlyConfig(128, int4_packing_format="tile_packed_to_4d"))


def torchao_int8(linear: nn.Linear) -> Layer:
    """int8 weights and inputs, compiled as torchao asks for."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return torch.compile(_torchao(linear, Int8DynamicActivationInt8WeightConfig()))


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


def bitsandbytes_backward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Its gradient of the input: the weight is dequantized, then multiplied."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(linear.weight, blocksize=64, quant_type="nf4")
    return lambda dz: dz @ dequantize_4bit(packed, state).to(dz.dtype)


def gemlite_weight_only(linear: nn.Linear, bits: int) -> Layer:
    """Groups of 64 with a zero point, between the least and the largest value of the group."""
    from gemlite.helper import A16Wn_HQQ_INT

    _gemlite_configs()
    groups = linear.weight.float().view(-1, GEMLITE_GROUP)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low).clamp(min=1e-8) / (2**bits - 1)
    zero = -low / scale
    levels = (groups / scale + zero).round().clamp(0, 2**bits - 1).to(torch.uint8)
    processor = A16Wn_HQQ_INT(
        device=str(linear.weight.device), dtype=linear.weight.dtype, W_nbits=bits
    )
    return processor.from_weights(levels.view_as(linear.weight), scale, zero, linear.bias)


def gemlite_int8(linear: nn.Linear) -> Layer:
    """int8 weights and inputs."""
    from gemlite.helper import A8W8_int8_dynamic

    _gemlite_configs()
    return A8W8_int8_dynamic(device=str(linear.weight.device)).from_linear(_copy(linear))


@functools.cache
def _gemlite_configs() -> None:
    """Its tuned tiles of the H100 on every Hopper: it ships none of the H200."""
    import gemlite

    if torch.cuda.get_device_capability() == (9, 0):
        gemlite.load_config(Path(gemlite.__file__).parent / "configs" / "h100.json")


def humming_int4(linear: nn.Linear) -> Layer:
    """Groups of 128; its kernels are compiled on first use, by nvcc or NVRTC."""
    return _humming(linear, {"dtype": "int4", "group_size": 128}, None)


def humming_int4_int8(linear: nn.Linear) -> Layer:
    """int4 weights, one scale a channel, and int8 inputs."""
    return _humming(linear, {"dtype": "int4"}, {"dtype": "int8"})


def _humming(linear: nn.Linear, weights: dict[str, Any], inputs: dict[str, Any] | None) -> Layer:
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=linear.out_features, shape_k=linear.in_features, weight_config=weights,
        input_config=inputs, torch_dtype=linear.weight.dtype, has_bias=True,
    ).to(linear.weight.device)  # fmt: skip
    layer.load_from_unquantized(linear.weight.detach())
    layer.bias.data.copy_(linear.bias.view_as(layer.bias))
    layer.transform()
    return layer


def _copy(linear: nn.Linear) -> nn.Linear:
    """The quantizers write into what they are given."""
    twin = nn.Linear(linear.in_features, linear.out_features)
    twin.load_state_dict(linear.state_dict())
    return twin.to(linear.weight)
