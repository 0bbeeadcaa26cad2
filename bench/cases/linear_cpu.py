"""One linear layer at every shape of the encoders, against float32 and PyTorch's dynamic int8.

Dimension key: M rows, K input features, N output features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import float32_error, int8_input_error
from bench.harness import Case, Cost, Point, Prepared, Provider
from bench.peers import dynamic_int8
from bench.shapes import LINEAR
from lowbit_kernels import QLinear, QuantSpec

# 7-bit inputs with one scale a tensor leave 2 to 3 %, int8 weights with one scale 1 %
DYNAMIC_INT8_ERROR = 0.06


@dataclass(frozen=True)
class Inputs:
    """A layer and its input x [M, K]."""

    linear: nn.Linear
    x: Tensor


def make_inputs(point: Point) -> Inputs:
    """Gaussian rows, and the layer as ``nn.Linear`` initializes it."""
    torch.manual_seed(0)
    linear = nn.Linear(point.sizes["K"], point.sizes["N"]).requires_grad_(False)
    return Inputs(linear, torch.randn(point.sizes["M"], point.sizes["K"]))


def cost(point: Point) -> Cost:
    """Of float32 inputs and outputs."""
    M, K, N = (point.sizes[name] for name in "MKN")
    return Cost(flops=2 * M * K * N, bytes=4 * M * (K + N))


def float32(inputs: Inputs) -> Prepared:
    """``F.linear``."""
    linear, x = inputs.linear, inputs.x
    bytes_ = linear.weight.nbytes + linear.bias.nbytes
    call = lambda: F.linear(x, linear.weight, linear.bias)  # noqa: E731
    return Prepared(call, float32_error(linear.in_features), weight_bytes=bytes_)


def quantize_dynamic(inputs: Inputs) -> Prepared:
    """PyTorch's dynamic int8."""
    model = dynamic_int8(nn.Sequential(inputs.linear))
    weight = inputs.linear.weight.numel() + inputs.linear.bias.nbytes
    return Prepared(lambda: model(inputs.x), DYNAMIC_INT8_ERROR, weight_bytes=weight)


def ours(inputs: Inputs, int8: bool) -> Prepared:
    """A 4-bit QLinear; right if it computes with exactly the weights it stores."""
    spec = QuantSpec(bits=4, inputs="int8" if int8 else None)
    layer = QLinear.from_float(inputs.linear, spec)
    x, twin = inputs.x, layer.to_float()
    bound = float32_error(layer.in_features) + (int8_input_error(x, 1) if int8 else 0)
    stored = layer.quantized_weight().nbytes + inputs.linear.bias.nbytes
    return Prepared(lambda: layer(x), bound, lambda: twin(x), stored)


LINEAR_CPU = Case(
    name="linear_cpu",
    title="Linear layers, speed against float32",
    points=LINEAR,
    make_inputs=make_inputs,
    providers=(
        Provider("float32", float32),
        Provider("quantize_dynamic int8", quantize_dynamic),
        Provider("lowbit w4, int8 inputs", lambda inputs: ours(inputs, int8=True)),
        Provider("lowbit w4, float inputs", lambda inputs: ours(inputs, int8=False)),
    ),
    baseline="float32",
    cost=cost,
)
