"""Every kind of convolution in a speech encoder, against float32.

What it shares with ``conv1d_cuda`` serves any device and dtype.

Dimension key: B batch, C input channels, N output channels, T input frames, k taps, g groups.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.case import Case, Cost, Point, Prepared, Provider
from bench.errors import float_error, int8_input_error
from bench.shapes import CONV1D, frames_out
from lowbit_kernels import QConv1d, QuantSpec


@dataclass(frozen=True)
class Inputs:
    """A layer and its input x [B, C, T]."""

    conv: nn.Conv1d
    x: Tensor


def make_inputs(point: Point, device: str, dtype: torch.dtype) -> Inputs:
    """Gaussian frames, and the layer as ``nn.Conv1d`` initializes it."""
    torch.manual_seed(0)
    s = point.sizes
    conv = nn.Conv1d(s["C"], s["N"], s["k"], s["stride"], s["padding"], groups=s["g"])
    x = torch.randn(s["B"], s["C"], s["T"], device=device, dtype=dtype)
    return Inputs(conv.requires_grad_(False).to(device, dtype), x)


def cost(point: Point, itemsize: int) -> Cost:
    """Of float inputs and outputs."""
    s, T_out = point.sizes, frames_out(point.sizes)
    flops = 2 * s["B"] * T_out * s["N"] * s["k"] * s["C"] // s["g"]
    return Cost(flops, bytes=itemsize * s["B"] * (s["C"] * s["T"] + s["N"] * T_out))


def unquantized(inputs: Inputs) -> Prepared:
    """``nn.Conv1d`` on channel-first memory, as the models hold it."""
    conv, x = inputs.conv, inputs.x
    stored = conv.weight.nbytes + conv.bias.nbytes
    bound = float_error(conv.weight[0].numel(), x.dtype)
    return Prepared(lambda: conv(x), bound, weight_bytes=stored)


def ours(inputs: Inputs, int8: bool, bits: int = 4) -> Prepared:
    """A QConv1d on channel-last memory, as chained layers keep it."""
    spec = QuantSpec(bits=bits, inputs="int8" if int8 else None)
    layer = QConv1d.from_float(inputs.conv, spec)
    x = inputs.x.transpose(1, 2).contiguous().transpose(1, 2)
    twin = copy.deepcopy(layer.to_float()).float()
    bound = float_error(layer.K, x.dtype) + (int8_input_error(x, (1, 2)) if int8 else 0)
    stored = layer.quantized_weight().nbytes + inputs.conv.bias.nbytes
    expected = lambda: twin(inputs.x.float())  # noqa: E731
    return Prepared(lambda: layer(x), bound, expected, stored, int8=int8)


CONV1D_CPU = Case(
    name="conv1d_cpu",
    title="Convolutions, speed against float32",
    points=CONV1D,
    make_inputs=make_inputs,
    providers=(
        Provider("float32", unquantized),
        Provider("lowbit w4, int8 inputs", lambda inputs: ours(inputs, int8=True)),
        Provider("lowbit w4, float inputs", lambda inputs: ours(inputs, int8=False)),
    ),
    baseline="float32",
    cost=cost,
)
