"""The gradients of a frozen layer's input and bias, its activation's gradient included.

Dimension key: M rows, N output features, K input features.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import cuda_peers as peers
from bench import linear_points as points
from bench.case import ALL_MODES, Case, Cost, Point, Prepared, Provider, Result, Row
from bench.cases.linear_cpu import Inputs as Forward
from bench.cases.linear_cpu import make_inputs as make_forward
from bench.cases.linear_cuda import LOSS, SETS
from bench.errors import float_error
from lowbit_kernels import QLinear, QuantSpec
from lowbit_kernels.matmul.dispatch import choose_backend
from lowbit_kernels.matmul.gpu import gpu_of
from lowbit_kernels.matmul.op import flatten


@dataclass(frozen=True)
class Inputs:
    """A layer, the gradient of its output and its pre-activation [M, N]."""

    forward: Forward
    grad_y: Tensor
    z: Tensor | None

    def dz(self, dtype: torch.dtype) -> Tensor:
        """[M, N], PyTorch's gradient of the activation."""
        if self.z is None:
            return self.grad_y.to(dtype)
        return torch.ops.aten.gelu_backward(self.grad_y.to(dtype), self.z.to(dtype))


def make_inputs(point: Point, device: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Gaussian gradients and pre-activations."""
    forward = make_forward(point, device, dtype, seed)
    shape = (2, point.sizes["M"], point.sizes["N"])
    grad_y, z = torch.randn(shape, device=device, dtype=dtype)
    return Inputs(forward, grad_y, z if forward.gelu else None)


def cost(point: Point, itemsize: int) -> Cost:
    """One product; the gradient of the output and the pre-activation are read once."""
    M, K, N = (point.sizes[name] for name in "MKN")
    read = M * N * (2 if "gelu" in point.sizes else 1)
    return Cost(flops=2 * M * K * N, bytes=itemsize * (read + M * K))


def prepare(
    inputs: Inputs, times_weight: Callable[[Tensor], Tensor], exact: Tensor, loss: float = 0.0
) -> Prepared:
    """Autograd's way: activation, product and sum, one after the other.

    Args:
        inputs: of the point.
        times_weight: dz to dx.
        exact: the weight [N, K] that it means.
        loss: relative error of what the peer stores, against ``exact``.
    """

    def call() -> Result:
        dz = inputs.dz(inputs.grad_y.dtype)
        return times_weight(dz), dz.sum(0)

    return Prepared(call, loss or _bound(inputs), functools.partial(_exact, inputs, exact))


def _exact(inputs: Inputs, weight: Tensor) -> Result:
    dz = inputs.dz(torch.float32)
    return dz @ weight.float(), dz.sum(0)


def _bound(inputs: Inputs) -> float:
    """The gradient of the activation is rounded before it is multiplied."""
    return 2 * float_error(max(inputs.grad_y.shape), inputs.grad_y.dtype)


def cublas(inputs: Inputs) -> Prepared:
    """The weight kept in 16 bits."""
    weight = inputs.forward.linear.weight
    return prepare(inputs, lambda dz: dz @ weight, weight)


def dequantize_matmul(inputs: Inputs) -> Prepared:
    """Our packed weight, dequantized by one kernel, then cuBLAS."""
    layer = QLinear.from_float(inputs.forward.linear, QuantSpec(bits=4))
    packed, dtype = layer.quantized_weight(), inputs.grad_y.dtype
    dequantize: Callable[[], Tensor] = functools.partial(packed.dequantize, dtype)
    if inputs.grad_y.is_cuda:
        from lowbit_kernels.matmul.decode_kernel import dequantize_triton

        dequantize = functools.partial(dequantize_triton, packed, dtype)
    return prepare(inputs, lambda dz: dz @ dequantize(), packed.dequantize(torch.float32))


def bitsandbytes(inputs: Inputs) -> Prepared:
    """What its autograd function does."""
    linear = inputs.forward.linear
    return prepare(inputs, peers.bitsandbytes_backward(linear), linear.weight, LOSS[4])


def lowbit(inputs: Inputs, bits: int) -> Prepared:
    """One op: dz and the bias' gradient in a pass, then dx."""
    spec = QuantSpec(bits=bits)
    packed = QLinear.from_float(inputs.forward.linear, spec).quantized_weight()
    epilogue, flat = "gelu" if inputs.forward.gelu else None, flatten(packed)

    def call() -> Result:
        dx, dbias = torch.ops.lowbit.linear_backward.default(
            inputs.grad_y, inputs.z, epilogue, True, *flat
        )
        return dx, dbias

    def facts() -> Row:
        if not inputs.grad_y.is_cuda:
            return {"backend": "cpu"}
        M, dtype = len(inputs.grad_y), inputs.grad_y.dtype
        return {"backend": choose_backend(M, None, dtype, gpu_of(inputs.grad_y.device).capability)}

    exact = functools.partial(_exact, inputs, packed.dequantize(torch.float32))
    return Prepared(call, _bound(inputs), exact, packed.nbytes, facts)


LINEAR_BACKWARD = Case(
    name="linear_backward",
    title="Gradients of a linear layer's input and bias, the weight frozen",
    points=points.BACKWARD,
    make_inputs=make_inputs,
    providers=(
        Provider(points.DEQUANTIZE_MATMUL, dequantize_matmul),
        Provider(points.CUBLAS, cublas),
        Provider(points.OURS_BACKWARD, lambda inputs: lowbit(inputs, 4)),
        Provider("lowbit w8, gradients", lambda inputs: lowbit(inputs, 8)),
        Provider("bitsandbytes nf4", bitsandbytes, peers.BITSANDBYTES, gpu_only=True),
    ),
    baseline=points.DEQUANTIZE_MATMUL,
    cost=cost,
    layout="goals",
    device="cuda",
    dtype=torch.bfloat16,
    small=points.small(points.BACKWARD),
    sets=SETS,
    modes=ALL_MODES,
)
