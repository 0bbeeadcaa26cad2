"""The normalizations of a speech encoder on a GPU: GroupNorm, and LayerNorm down to int8.

Dimension key: B batch, C channels, T frames; M rows, K features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Cost, Point, Prepared, Provider, Result
from bench.errors import float_error
from bench.shapes import NORM_CUDA as POINTS
from lowbit_kernels.norm import masked_group_norm, norm_quantize

# rounding to int8 moves a value by one step where float32 and bfloat16 fall on two sides of a half
INT8_ERROR = 0.03


@dataclass(frozen=True)
class Inputs:
    """x [B, C, T] for GroupNorm, or x and a residual [M, K]; a weight and a bias a channel."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor


def make_inputs(point: Point, device: str, dtype: torch.dtype) -> Inputs:
    """Gaussian values."""
    torch.manual_seed(0)
    s = point.sizes
    is_rows = "K" in s
    shape = (s["M"], s["K"]) if is_rows else (s["B"], s["C"], s["T"])
    parameters = torch.randn(2, shape[1], device=device, dtype=dtype)
    x, residual = torch.randn(2, *shape, device=device, dtype=dtype)
    return Inputs(x, residual if is_rows else None, *parameters)


def cost(point: Point, itemsize: int) -> Cost:
    """Five operations a value; LayerNorm reads x and a residual, writes their sum and int8."""
    s = point.sizes
    if "K" in s:
        return Cost(8 * s["M"] * s["K"], s["M"] * (s["K"] * (3 * itemsize + 1) + 4))
    values = s["B"] * s["C"] * s["T"]
    return Cost(5 * values, 2 * itemsize * values)


def eager(inputs: Inputs) -> Result:
    """PyTorch's operators: y, or the int8 values, their scales and the sum."""
    x, residual, weight, bias = inputs.x, inputs.residual, inputs.weight, inputs.bias
    if residual is None:
        return F.group_norm(x, x.shape[1], weight, bias)
    h = x + residual
    y = F.layer_norm(h, h.shape[-1:], weight, bias).float()
    scale = y.abs().amax(-1, keepdim=True) / 127
    return (y / scale).round().to(torch.int8), scale, h


def lowbit(inputs: Inputs) -> Result:
    """Ours."""
    x, residual, weight, bias = inputs.x, inputs.residual, inputs.weight, inputs.bias
    if residual is None:
        return masked_group_norm(x, weight, bias, lengths=None, num_groups=x.shape[1])
    return norm_quantize(x, weight, bias, residual=residual)


def compiled(inputs: Inputs) -> Prepared:
    """``torch.compile`` of PyTorch's operators, for this very shape."""
    torch.compiler.reset()
    return prepare(torch.compile(eager, dynamic=False), inputs)


def prepare(norm: Callable[[Inputs], Result], inputs: Inputs) -> Prepared:
    """Each of them is checked against PyTorch's operators in float32."""
    x, residual = inputs.x.float(), None
    if inputs.residual is not None:
        # the sum is rounded to the dtype of x before it is normalized
        x, residual = (inputs.x + inputs.residual).float(), torch.zeros_like(x)
    exact = Inputs(x, residual, inputs.weight.float(), inputs.bias.float())
    bound = float_error(x.shape[-1], inputs.x.dtype)
    bound += 0 if residual is None else INT8_ERROR
    return Prepared(lambda: norm(inputs), bound, lambda: eager(exact))


NORM_CUDA = Case(
    name="norm_cuda",
    title="Normalizations on a GPU, speed against bfloat16",
    points=POINTS,
    make_inputs=make_inputs,
    providers=(
        Provider("bf16", lambda inputs: prepare(eager, inputs)),
        Provider("bf16 torch.compile", compiled),
        Provider("lowbit", lambda inputs: prepare(lowbit, inputs)),
    ),
    baseline="bf16",
    cost=cost,
    device="cuda",
    dtype=torch.bfloat16,
    weight=0.5,
)
