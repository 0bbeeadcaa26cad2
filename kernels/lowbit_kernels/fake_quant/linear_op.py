"""torch.ops.lowbit.training_linear: a linear layer whose weight is float, or fake-quantized.

Dimension key: M rows of the input, N output features, K input features; N_out N / 2 with ``glu``
and N without.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.checks import (
    autocast,
    check_dtype,
    check_epilogue,
    check_input,
    check_like,
    output_shape,
)
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.fake_quant.op import PACKED, flatten, unpack
from lowbit_kernels.fake_quant.quantizer import Quantizer, check_quantizer
from lowbit_kernels.fake_quant.reference import (
    fake_quantize_backward_reference,
    fake_quantize_reference,
)
from lowbit_kernels.matmul.reference import apply_epilogue, epilogue_backward_reference

# what stands for no quantizer in the schemas
FLOAT = (None, None, None, -1, 1, 1, 0, "float")

torch.library.define(
    "lowbit::training_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? epilogue, bool save, "
    f"{PACKED}) -> (Tensor y, Tensor preactivation, Tensor rounded)",
)
torch.library.define(
    "lowbit::training_linear_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor? preactivation, Tensor? rounded, "
    "str? epilogue, bool needs_x, bool needs_weight, bool needs_bias, "
    f"{PACKED}) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale)",
)


def unpack_weight(weight: Tensor, packed: list[Any]) -> tuple[Tensor, Quantizer | None]:
    """The weight, contiguous, and its quantizer, whose tensors are matrices."""
    if packed[-1] == "float":
        return weight.contiguous(), None
    return unpack(weight, packed)


def keeps_rounded(x: Tensor, weight: Tensor, method: str) -> bool:
    """Whether the weight that multiplied is another tensor than the weight."""
    return method != "float" or x.dtype != weight.dtype


@torch.library.register_fake("lowbit::training_linear")
def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, _, _, epilogue, save, *_, method = args
    N, keeps = weight.shape[0], save and keeps_rounded(x, weight, method)
    return (
        x.new_empty(output_shape(x, N, epilogue)),
        x.new_empty((*x.shape[:-1], N) if save and epilogue is not None else (0,)),
        x.new_empty(weight.shape if keeps else (0,)),
    )


@torch.library.register_fake("lowbit::training_linear_backward")
def fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a training layer's backward op: what is not needed is empty."""
    _, x, weight, _, _, _, needs_x, needs_weight, needs_bias, *rest = args
    scale, learns = rest[-8], needs_weight and rest[-1] in ("lsq", "elastic")
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        x.new_empty(weight.shape[0] if needs_bias else 0),
        scale.new_empty(scale.shape) if learns else x.new_empty(0),
    )


def _outputs(
    args: tuple[Any, ...], y: Tensor, z: Tensor, rounded: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's outputs in their shapes: what the backward does not need is empty."""
    x, weight, _, _, epilogue, save, *_, method = args
    view, N = torch.ops.aten._unsafe_view, weight.shape[0]
    return (
        view(y, output_shape(x, N, epilogue)),
        view(z, (*x.shape[:-1], N)) if save and epilogue is not None else x.new_empty(0),
        rounded if save and keeps_rounded(x, weight, method) else x.new_empty(0),
    )


def round_weight_reference(
    weight: Tensor, quantizer: Quantizer | None, dtype: torch.dtype
) -> Tensor:
    """The weight that multiplies, [N, K]; maybe itself without a quantizer."""
    if quantizer is None:
        return weight.to(dtype)
    return fake_quantize_reference(weight, quantizer, dtype)


@torch.library.impl("lowbit::training_linear", "cpu")
def _cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, residual, epilogue, _, *packed = args
    rounded = round_weight_reference(*unpack_weight(weight, packed), x.dtype)
    z = F.linear(x.reshape(-1, x.shape[-1]), rounded, bias)
    y = apply_epilogue(z, epilogue)
    if residual is not None:
        y = y + residual.reshape(y.shape)
    return _outputs(args, y, z, rounded)


def _cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    # imported on first use, so that `import lowbit_kernels` needs no GPU and no Triton
    from lowbit_kernels.fake_quant.linear_cuda import round_weight_cuda, training_linear_cuda

    x, weight, bias, residual, epilogue, _, *packed = args
    rounded = round_weight_cuda(*unpack_weight(weight, packed), x.dtype)
    return _outputs(args, *training_linear_cuda(x, rounded, bias, residual, epilogue), rounded)


def _gradients(
    args: tuple[Any, ...], dz: Tensor, dbias: Tensor, weight_gradient: Callable[..., Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward's outputs, from the pre-activation's gradient [M, N]."""
    _, x, weight, _, rounded, _, needs_x, needs_weight, _, *packed = args
    dx, dweight, dscale = x.new_empty(0), weight.new_empty(0), x.new_empty(0)
    if needs_x:
        dx = (dz @ (weight if rounded is None else rounded)).view(x.shape)
    if needs_weight:
        rows, quantizer = unpack_weight(weight, packed)
        learned = None if quantizer is None or quantizer.method == "ste" else quantizer
        dweight, found = weight_gradient(dz, x.reshape(-1, x.shape[-1]), rows, learned)
        dscale = dscale if found is None else found.view(packed[0].shape)
    return dx, dweight, dbias, dscale


def _cpu_weight_gradient(
    dz: Tensor, x: Tensor, weight: Tensor, learned: Quantizer | None
) -> tuple[Tensor, Tensor | None]:
    dweight = dz.t() @ x
    if learned is None:
        return dweight.to(weight.dtype), None
    return fake_quantize_backward_reference(dweight, weight, learned)


@torch.library.impl("lowbit::training_linear_backward", "cpu")
def _cpu_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_y, x, weight, preactivation, _, epilogue, _, _, needs_bias, *_ = args
    z = None if preactivation is None else preactivation.reshape(-1, weight.shape[0])
    dz = epilogue_backward_reference(grad_y.reshape(-1, grad_y.shape[-1]), z, epilogue)
    dbias = dz.sum(0) if needs_bias else x.new_empty(0)
    return _gradients(args, dz, dbias, _cpu_weight_gradient)


def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lowbit_kernels.fake_quant import linear_cuda

    grad_y, _, _, z, _, epilogue, _, _, needs_bias, *_ = args
    dz, dbias = linear_cuda.preactivation_gradient_cuda(grad_y, z, epilogue, needs_bias)
    return _gradients(args, dz, dbias, linear_cuda.weight_gradient_cuda)


implement_on_cuda("lowbit::training_linear", _cuda)
implement_on_cuda("lowbit::training_linear_backward", _cuda_backward)


def register_training_gradient(op: str) -> None:
    """Let ``lowbit::OP_backward`` be the gradient of ``lowbit::OP``, a layer that trains.

    Both have the arguments of the linear ones, and maybe others before the quantizer's.
    """
    backward_op = getattr(torch.ops.lowbit, f"{op}_backward").default

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, _, ctx.epilogue, _, *rest = inputs
        _, z, rounded = output
        ctx.mark_non_differentiable(z, rounded)
        keeps = keeps_rounded(x, weight, rest[-1]), ctx.epilogue is not None
        ctx.is_tensor = [isinstance(a, Tensor) for a in rest]
        ctx.rest = [None if isinstance(a, Tensor) else a for a in rest]
        ctx.save_for_backward(
            x, weight, z if keeps[1] else None, rounded if keeps[0] else None,
            *(a for a in rest if isinstance(a, Tensor)),
        )  # fmt: skip
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * (6 + len(ctx.rest))
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        needs_scale = ctx.needs_input_grad[-8] and ctx.rest[-1] != "ste"
        if grad_y is not None and (needs_x or needs_weight or needs_bias or needs_scale):
            saved = iter(ctx.saved_tensors)
            layer = [next(saved) for _ in range(4)]
            rest = (next(saved) if t else a for t, a in zip(ctx.is_tensor, ctx.rest, strict=True))
            found = backward_op(
                grad_y, *layer, ctx.epilogue, needs_x, needs_weight or needs_scale, needs_bias,
                *rest,
            )  # fmt: skip
            for i, needed, grad in zip(
                (0, 1, 2, -8), (needs_x, needs_weight, needs_bias, needs_scale), found, strict=True
            ):
                grads[i] = grad if needed else None
        grads[3] = grad_y if needs_residual else None
        return tuple(grads)

    torch.library.register_autograd(f"lowbit::{op}", backward, setup_context=setup_context)


register_training_gradient("training_linear")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, epilogue: str | None
) -> None:
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be [N, K] and not empty, got shape {tuple(weight.shape)}")
    N, K = weight.shape
    check_epilogue(epilogue, N)
    check_dtype("x", x)
    check_dtype("weight", weight)
    check_input(x, K, weight)
    check_like("bias", bias, (N,), x.dtype, x)
    check_like("residual", residual, output_shape(x, N, epilogue), x.dtype, x)


def training_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    quantizer: Quantizer | None = None,
    epilogue: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer that trains its weight, fake-quantized or float.

    Equivalent to ``epilogue(F.linear(x, fake_quantize(weight, quantizer), bias)) + residual``.
    Forward: one pass over the weight, torch's matrix product, one pass for the rest. Backward: one
    pass for the pre-activation's gradient and the bias's, then two products, of which the weight's
    ends with the quantizer's gradient (in 16 bits on CUDA; elsewhere that is a pass of its own).

    Args:
        x: [..., K], fp16, bf16 or fp32 (fp64 on a CPU). Under autocast x, bias and residual are
            cast to autocast's dtype.
        weight: [N, K], of any such dtype; an fp32 weight of 16-bit inputs is rounded once, to its
            level, and gets an fp32 gradient.
        bias: [N], like x.
        quantizer: how the weight is fake-quantized; None multiplies by the weight itself. Its scale
            is one for all, one a row ([N]) or one a group ([N, S]).
        epilogue: None, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"relu"`` or ``"glu"``; the last
            multiplies feature n by the sigmoid of feature n + N / 2.
        residual: [..., N] ([..., N / 2] with ``"glu"``), like x.

    Returns:
        [..., N] ([..., N / 2] with ``"glu"``), in the dtype of x. Differentiable in x, weight,
        bias, residual and, but for ``"ste"``, the quantizer's scale.

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
    """
    x, bias, residual = autocast(x, bias, residual)
    _check(x, weight, bias, residual, epilogue)
    if quantizer is not None:
        check_quantizer(quantizer, "weight", weight)
        if quantizer.scale is None:
            raise ValueError("scale must be given for a weight, got None")
    scale = None if quantizer is None else quantizer.scale
    tensors = (x, weight, bias, residual, scale)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    packed = FLOAT if quantizer is None else flatten(quantizer)
    y: Tensor
    y, _, _ = torch.ops.lowbit.training_linear.default(
        x, weight, bias, residual, epilogue, save, *packed
    )
    return y
