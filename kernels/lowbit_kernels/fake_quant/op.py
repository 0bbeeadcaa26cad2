"""torch.ops.lowbit.fake_quantize: schema, validation, fakes, backends and gradient.

Dimension key: K the last dimension, M rows, all others together; S scale groups a row.

A quantizer travels flat through the schemas, as ``PACKED`` lists it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.checks import check_dtype
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.fake_quant.quantizer import Levels, Quantizer, check_quantizer
from lowbit_kernels.fake_quant.reference import (
    as_matrices,
    fake_quantize_backward_reference,
    fake_quantize_reference,
)

PACKED = (
    "Tensor? scale, Tensor? group_scale, Tensor? center, int low, int high, int step, "
    "int group_size, str method"
)

torch.library.define("lowbit::fake_quantize", f"(Tensor x, {PACKED}) -> Tensor")
torch.library.define(
    "lowbit::fake_quantize_backward",
    f"(Tensor grad, Tensor x, {PACKED}) -> (Tensor dx, Tensor dscale)",
)


def flatten(quantizer: Quantizer) -> tuple[Any, ...]:
    """The arguments that ``PACKED`` lists."""
    levels = quantizer.levels
    return (
        quantizer.scale, quantizer.group_scale, quantizer.center,
        levels.low, levels.high, levels.step, quantizer.group_size, quantizer.method,
    )  # fmt: skip


def unpack(x: Tensor, packed: Sequence[Any]) -> tuple[Tensor, Quantizer]:
    """x [..., K] as [M, K], and the quantizer that ``flatten`` took apart, as matrices."""
    scale, group_scale, center, low, high, step, group_size, method = packed
    levels = Levels(low, high, step)
    return as_matrices(x, Quantizer(levels, scale, method, group_scale, group_size, center))


@torch.library.register_fake("lowbit::fake_quantize")
def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("lowbit::fake_quantize_backward")
def _fake_backward(grad: Tensor, x: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


@torch.library.impl("lowbit::fake_quantize", "cpu")
def _cpu(x: Tensor, *packed: Any) -> Tensor:
    y = fake_quantize_reference(*unpack(x, packed))
    out: Tensor = torch.ops.aten._unsafe_view(y, x.shape)
    return out


@torch.library.impl("lowbit::fake_quantize_backward", "cpu")
def _cpu_backward(grad: Tensor, x: Tensor, *packed: Any) -> tuple[Tensor, Tensor]:
    rows, quantizer = unpack(x, packed)
    grad = grad.reshape(rows.shape).contiguous()
    dx, dscale = fake_quantize_backward_reference(grad, rows, quantizer)
    return dx.view(x.shape), dscale.view(packed[0].shape)


def _cuda(x: Tensor, *packed: Any) -> Tensor:
    # imported on first use, so that `import lowbit_kernels` needs no GPU and no Triton
    from lowbit_kernels.fake_quant.elementwise_kernel import fake_quantize_triton

    y = fake_quantize_triton(*unpack(x, packed), x.dtype)
    out: Tensor = torch.ops.aten._unsafe_view(y, x.shape)
    return out


def _cuda_backward(grad: Tensor, x: Tensor, *packed: Any) -> tuple[Tensor, Tensor]:
    from lowbit_kernels.fake_quant.elementwise_kernel import fake_quantize_backward_triton

    rows, quantizer = unpack(x, packed)
    grad = grad.reshape(1, *rows.shape).contiguous()
    dx, dscale = fake_quantize_backward_triton(grad, rows, quantizer)
    return dx.view(x.shape), dscale.view(packed[0].shape)


implement_on_cuda("lowbit::fake_quantize", _cuda)
implement_on_cuda("lowbit::fake_quantize_backward", _cuda_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, group_scale, center, *ctx.constants = inputs
    # "ste" passes the gradient on, and needs nothing for it
    if ctx.constants[-1] != "ste":
        ctx.save_for_backward(x, scale, group_scale, center)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    constants = (None,) * 7
    if ctx.constants[-1] == "ste":
        return grad, None, *constants
    dx, dscale = torch.ops.lowbit.fake_quantize_backward.default(
        grad, *ctx.saved_tensors, *ctx.constants
    )
    needs_x, needs_scale = ctx.needs_input_grad[:2]
    return dx if needs_x else None, dscale if needs_scale else None, *constants


torch.library.register_autograd("lowbit::fake_quantize", _backward, setup_context=_setup_context)


def fake_quantize(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Quantize x and dequantize it again, with a gradient to train through.

    Equivalent to ``round_to_levels((x - center) / step) * step`` with
    ``step = group_scale * scale``; ``Quantizer`` says which levels, scales and gradients there are,
    and gives their formulas and sources. One pass over x forward and one backward, none backward
    with ``"ste"``.

    >>> scale = initial_scale(x, Levels.of_input(8)).requires_grad_()
    >>> y = fake_quantize(x, Quantizer(Levels.of_input(8), scale, "lsq"))

    Args:
        x: [..., K], fp16, bf16 or fp32 (fp64 on a CPU). Any strides.
        quantizer: levels, scale and method. With groups they are those of the last dimension.

    Returns:
        Like x, contiguous. Differentiable in x and, except with ``"ste"``, in the scale, whose
        gradient is summed in a fixed order.

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
    """
    check_dtype("x", x)
    check_quantizer(quantizer, "x", x)
    y: Tensor = torch.ops.lowbit.fake_quantize.default(x, *flatten(quantizer))
    return y
