"""One linear layer at every shape of the encoders, against float32 and PyTorch's dynamic int8.

What it shares with the cases of a GPU serves any device and dtype.

Dimension key: M rows, K input features, N output features.
"""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Case, Cost, Point, Prepared, Provider
from bench.errors import float_error, int8_input_error
from bench.peers import dynamic_int8
from bench.shapes import LINEAR
from lowbit_kernels import QLinear, QuantSpec

# 7-bit inputs with one scale a tensor leave 2 to 3 %, int8 weights with one scale 1 %
DYNAMIC_INT8_ERROR = 0.06


@dataclass(frozen=True)
class Inputs:
    """A layer, its input x [M, K], and whether GELU follows."""

    linear: nn.Linear
    x: Tensor
    gelu: bool

    @property
    def stored(self) -> int:
        """Bytes of the layer."""
        return self.linear.weight.nbytes + self.linear.bias.nbytes

    def with_float(self, x: Tensor) -> Tensor:
        """What the float layer computes."""
        y = F.linear(x, self.linear.weight, self.linear.bias)
        return F.gelu(y) if self.gelu else y


def make_inputs(point: Point, device: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Gaussian rows, and the layer as ``nn.Linear`` initializes it."""
    torch.manual_seed(seed)
    linear = nn.Linear(point.sizes["K"], point.sizes["N"], device=device).requires_grad_(False)
    x = torch.randn(point.sizes["M"], point.sizes["K"], device=device, dtype=dtype)
    return Inputs(linear.to(dtype), x, "gelu" in point.sizes)


def cost(point: Point, itemsize: int) -> Cost:
    """Of float inputs and outputs."""
    M, K, N = (point.sizes[name] for name in "MKN")
    return Cost(flops=2 * M * K * N, bytes=itemsize * M * (K + N))


def unquantized(inputs: Inputs) -> Prepared:
    """``F.linear``."""
    bound = float_error(inputs.linear.in_features, inputs.x.dtype)
    return Prepared(lambda: inputs.with_float(inputs.x), bound, weight_bytes=inputs.stored)


def quantize_dynamic(inputs: Inputs) -> Prepared:
    """PyTorch's dynamic int8."""
    model = dynamic_int8(nn.Sequential(inputs.linear))
    weight = inputs.linear.weight.numel() + inputs.linear.bias.nbytes
    return Prepared(lambda: model(inputs.x), DYNAMIC_INT8_ERROR, weight_bytes=weight)


def ours(inputs: Inputs, int8: bool, bits: int = 4) -> Prepared:
    """A QLinear; right if it computes with exactly the weights it stores."""
    spec = QuantSpec(bits=bits, inputs="int8" if int8 else None)
    layer = QLinear.from_float(inputs.linear, spec)
    x, epilogue = inputs.x, "gelu" if inputs.gelu else None
    twin = replace(inputs, linear=copy.deepcopy(layer.to_float()).float())
    bound = float_error(layer.in_features, x.dtype) + (int8_input_error(x, 1) if int8 else 0)
    return Prepared(
        lambda: layer(x, epilogue=epilogue),
        bound,
        lambda: twin.with_float(x.float()),
        layer.quantized_weight().nbytes + inputs.linear.bias.nbytes,
        int8=int8,
    )


LINEAR_CPU = Case(
    name="linear_cpu",
    title="Linear layers, speed against float32",
    points=LINEAR,
    make_inputs=make_inputs,
    providers=(
        Provider("float32", unquantized),
        Provider("quantize_dynamic int8", quantize_dynamic),
        Provider("lowbit w4, int8 inputs", lambda inputs: ours(inputs, int8=True)),
        Provider("lowbit w4, float inputs", lambda inputs: ours(inputs, int8=False)),
    ),
    baseline="float32",
    cost=cost,
)
