"""A layer that trains its weight: output, and gradients of input, weight and bias.

Dimension key: M rows, N output features, K input features.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import cuda_peers as peers
from bench import linear_points as points
from bench.case import ALL_MODES, Case, Cost, Point, Prepared, Provider, Result
from bench.cases.linear_cpu import Inputs, make_inputs
from bench.cases.linear_cuda import LOSS, SETS
from bench.errors import float_error
from lowbit_kernels import QuantSpec

Layer = Callable[[Tensor], Tensor]


def cost(point: Point, itemsize: int) -> Cost:
    """Three products; x, y and their gradients once, the weight's gradient too."""
    M, K, N = (point.sizes[name] for name in "MKN")
    return Cost(flops=6 * M * K * N, bytes=itemsize * (2 * M * (K + N) + N * K))


def step(layer: Layer, inputs: Inputs, wanted: list[Tensor], grad_y: Tensor) -> Result:
    """y and its gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        y = layer(inputs.x)
        y = F.gelu(y) if inputs.gelu else y
        return y.detach(), *torch.autograd.grad(y, wanted, grad_y)


def prepare(
    inputs: Inputs, linear: nn.Linear, layer: Layer, exact: Tensor, loss: float = 0.0
) -> Prepared:
    """A layer, its activation after it.

    Args:
        inputs: of the point.
        linear: holds the parameters.
        layer: computes with them.
        exact: the weight [N, K] that it means, whose gradient is passed on to the parameter.
        loss: relative error of a peer that quantizes more than the weight.
    """
    inputs = replace(inputs, x=inputs.x.detach().requires_grad_())
    M, N = len(inputs.x), linear.out_features
    generator = torch.Generator(inputs.x.device).manual_seed(7)
    grad_y = torch.randn(M, N, device=inputs.x.device, generator=generator).to(inputs.x.dtype)
    wanted = [inputs.x, linear.weight, linear.bias]

    def expected() -> Result:
        with torch.inference_mode(False):
            x, weight, bias = (
                t.detach().float().requires_grad_() for t in (inputs.x, exact, linear.bias)
            )
        wide = replace(inputs, x=x)
        return step(lambda x: F.linear(x, weight, bias), wide, [x, weight, bias], grad_y.float())

    bound = loss or 2 * float_error(max(M, N, linear.in_features), inputs.x.dtype)
    call = functools.partial(step, layer, inputs, wanted, grad_y)
    return Prepared(call, bound, expected, weight_bytes=linear.weight.nbytes)


def _trained(inputs: Inputs) -> nn.Linear:
    return inputs.linear.requires_grad_()


def unquantized(inputs: Inputs) -> Prepared:
    """``nn.Linear``."""
    linear = _trained(inputs)
    return prepare(inputs, linear, linear, linear.weight)


def compiled(inputs: Inputs) -> Prepared:
    """``torch.compile`` of it."""
    linear = _trained(inputs)
    run = peers.compiled(peers.linear_gelu if inputs.gelu else peers.linear_plain, dynamic=False)
    prepared = prepare(inputs, linear, linear, linear.weight)
    plain = replace(inputs, gelu=False)
    call = prepare(plain, linear, lambda x: run(x, linear.weight, linear.bias), linear.weight).call
    return replace(prepared, call=call)


def ours(inputs: Inputs, bits: int) -> Prepared:
    """QATLinear; its weight is fake-quantized in every call, straight through."""
    from lowbit_kernels.modules import QATLinear

    layer = QATLinear.from_float(_trained(inputs), QuantSpec(bits=bits), quantizer="ste")
    exact = layer.to_quantized().quantized_weight().dequantize(torch.float32)
    fused = functools.partial(layer, epilogue="gelu") if inputs.gelu else layer
    plain = replace(inputs, gelu=False)
    prepared = prepare(inputs, layer, layer, exact)
    return replace(prepared, call=prepare(plain, layer, fused, exact).call)


def torchao_int8(inputs: Inputs) -> Prepared:
    """int8 products in both directions, compiled."""
    from torchao.prototype.quantized_training import int8_mixed_precision_training
    from torchao.quantization import quantize_

    linear = _trained(inputs)
    model = nn.Sequential(peers._copy(linear))
    quantize_(model, int8_mixed_precision_training())
    run = torch.compile(model)
    return prepare(inputs, model[0], run, linear.weight, LOSS[8])


LINEAR_TRAINING = Case(
    name="linear_training",
    title="A linear layer in training: output and all gradients",
    points=points.TRAINING,
    make_inputs=make_inputs,
    providers=(
        Provider(points.CUBLAS, unquantized),
        Provider(points.COMPILED, compiled, gpu_only=True),
        Provider(points.QAT_W4, lambda inputs: ours(inputs, 4)),
        Provider("lowbit w1 QAT", lambda inputs: ours(inputs, 1)),
        Provider("torchao int8 training", torchao_int8, peers.TORCHAO, gpu_only=True),
    ),
    baseline=points.CUBLAS,
    cost=cost,
    layout="goals",
    device="cuda",
    dtype=torch.bfloat16,
    small=points.small(points.TRAINING),
    sets=SETS,
    modes=ALL_MODES,
)
