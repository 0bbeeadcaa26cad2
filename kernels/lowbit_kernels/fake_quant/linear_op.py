"""torch.ops.lowbit.training_linear: a linear layer whose weight is float, or fake-quantized.

Dimension key: M rows of the input, N output features, K input features; N_out N / 2 with ``glu``
and N without.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.device import on_device
from lowbit_kernels.fake_quant.op import PACKED, check_dtype, flatten, unflatten
from lowbit_kernels.fake_quant.quantizer import Quantizer, check_quantizer
from lowbit_kernels.fake_quant.reference import (
    as_matrices,
    fake_quantize_backward_reference,
    fake_quantize_reference,
)
from lowbit_kernels.matmul.reference import apply_epilogue, epilogue_backward_reference

EPILOGUES = (None, "gelu", "gelu_tanh", "silu", "relu", "glu")

# what stands for no quantizer in the schemas
_FLOAT = (None, None, None, -1, 1, 1, 0, "float")

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


def _unpack(packed: tuple[Any, ...], weight: Tensor) -> tuple[Tensor, Quantizer | None]:
    """The weight, contiguous, and its quantizer, whose tensors are matrices."""
    if packed[-1] == "float":
        return weight.contiguous(), None
    return as_matrices(weight, unflatten(*packed))


def _output_shape(x: Tensor, weight: Tensor, epilogue: str | None) -> tuple[int, ...]:
    N = weight.shape[0]
    return (*x.shape[:-1], N // 2 if epilogue == "glu" else N)


def _keeps_rounded(x: Tensor, weight: Tensor, method: str) -> bool:
    """Whether the weight that multiplied is another tensor than the weight."""
    return method != "float" or x.dtype != weight.dtype


@torch.library.register_fake("lowbit::training_linear")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    save: bool,
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    z_shape = (*x.shape[:-1], weight.shape[0]) if save and epilogue is not None else (0,)
    keeps = save and _keeps_rounded(x, weight, packed[-1])
    return (
        x.new_empty(_output_shape(x, weight, epilogue)),
        x.new_empty(z_shape),
        x.new_empty(weight.shape if keeps else (0,)),
    )


@torch.library.register_fake("lowbit::training_linear_backward")
def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    preactivation: Tensor | None,
    rounded: Tensor | None,
    epilogue: str | None,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    learns = needs_weight and packed[-1] in ("lsq", "elastic")
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        x.new_empty(weight.shape[0] if needs_bias else 0),
        packed[0].new_empty(packed[0].shape) if learns else x.new_empty(0),
    )


def _saved(
    x: Tensor,
    weight: Tensor,
    epilogue: str | None,
    save: bool,
    method: str,
    y: Tensor,
    z: Tensor,
    rounded: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's outputs in their shapes: what the backward does not need is empty."""
    view, empty = torch.ops.aten._unsafe_view, x.new_empty(0)
    keeps = save and _keeps_rounded(x, weight, method)
    return (
        view(y, _output_shape(x, weight, epilogue)),
        view(z, (*x.shape[:-1], weight.shape[0])) if save and epilogue is not None else empty,
        rounded if keeps else x.new_empty(0),
    )


@torch.library.impl("lowbit::training_linear", "cpu")
def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    save: bool,
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, quantizer = _unpack(packed, weight)
    if quantizer is None:
        rounded = rows.to(x.dtype)
    else:
        rounded = fake_quantize_reference(rows, quantizer, x.dtype)
    z = F.linear(x.reshape(-1, x.shape[-1]), rounded, bias)
    y = apply_epilogue(z, epilogue)
    if residual is not None:
        y = y + residual.reshape(y.shape)
    return _saved(x, weight, epilogue, save, packed[-1], y, z, rounded)


@torch.library.impl("lowbit::training_linear", "cuda")
def _cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    save: bool,
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    # imported on first use, so that `import lowbit_kernels` needs no GPU and no Triton
    from lowbit_kernels.fake_quant.linear_cuda import round_weight_cuda, training_linear_cuda

    with on_device(x):
        rounded = round_weight_cuda(*_unpack(packed, weight), x.dtype)
        y, z = training_linear_cuda(x, rounded, bias, residual, epilogue)
    return _saved(x, weight, epilogue, save, packed[-1], y, z, rounded)


@torch.library.impl("lowbit::training_linear_backward", "cpu")
def _cpu_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    preactivation: Tensor | None,
    rounded: Tensor | None,
    epilogue: str | None,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, N = grad_y.reshape(-1, grad_y.shape[-1]), weight.shape[0]
    z = None if preactivation is None else preactivation.reshape(-1, N)
    dz = epilogue_backward_reference(dy, z, epilogue)
    dx, dweight, dbias, dscale = (x.new_empty(0) for _ in range(4))
    if needs_x:
        dx = (dz @ (weight if rounded is None else rounded)).view(x.shape)
    if needs_bias:
        dbias = dz.sum(0)
    if needs_weight:
        dweight = dz.t() @ x.reshape(-1, x.shape[-1])
        rows, quantizer = _unpack(packed, weight)
        if quantizer is None or quantizer.method == "ste":
            dweight = dweight.to(weight.dtype)
        else:
            dweight, dscale = fake_quantize_backward_reference(dweight, rows, quantizer)
            dscale = dscale.view(packed[0].shape)
    return dx, dweight, dbias, dscale


@torch.library.impl("lowbit::training_linear_backward", "cuda")
def _cuda_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    preactivation: Tensor | None,
    rounded: Tensor | None,
    epilogue: str | None,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lowbit_kernels.fake_quant import linear_cuda

    dx, dweight, dscale = x.new_empty(0), weight.new_empty(0), x.new_empty(0)
    with on_device(x):
        dz, dbias = linear_cuda.preactivation_gradient_cuda(
            grad_y, preactivation, epilogue, needs_bias
        )
        if needs_x:
            dx = (dz @ (weight if rounded is None else rounded)).view(x.shape)
        if needs_weight:
            rows, quantizer = _unpack(packed, weight)
            learned = None if quantizer is None or quantizer.method == "ste" else quantizer
            x_rows = x.reshape(-1, x.shape[-1])
            dweight, found = linear_cuda.weight_gradient_cuda(dz, x_rows, rows, learned)
            dscale = dscale if found is None else found.view(packed[0].shape)
    return dx, dweight, dbias, dscale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, ctx.epilogue, _, scale, group_scale, center, *ctx.constants = inputs
    _, z, rounded = output
    ctx.mark_non_differentiable(z, rounded)
    ctx.save_for_backward(
        x,
        weight,
        None if ctx.epilogue is None else z,
        rounded if _keeps_rounded(x, weight, ctx.constants[-1]) else None,
        scale,
        group_scale,
        center,
    )
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    constants = (None,) * 7
    if grad_y is None:
        return (None,) * 14
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    needs_scale = ctx.needs_input_grad[6]
    dx = dweight = dbias = dscale = None
    if needs_x or needs_weight or needs_bias or needs_scale:
        x, weight, z, rounded, *tensors = ctx.saved_tensors
        dx, dweight, dbias, dscale = torch.ops.lowbit.training_linear_backward.default(
            grad_y, x, weight, z, rounded, ctx.epilogue,
            needs_x, needs_weight or needs_scale, needs_bias,
            *tensors, *ctx.constants,
        )  # fmt: skip
    return (
        dx if needs_x else None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        grad_y if needs_residual else None,
        None,
        None,
        dscale if needs_scale and ctx.constants[-1] != "ste" else None,
        *constants,
    )


torch.library.register_autograd("lowbit::training_linear", _backward, setup_context=_setup_context)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, epilogue: str | None
) -> None:
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue must be one of {EPILOGUES}, got {epilogue!r}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be [N, K] and not empty, got shape {tuple(weight.shape)}")
    check_dtype("x", x)
    check_dtype("weight", weight)
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., K] with K = {K}, got shape {tuple(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
    if epilogue == "glu" and N % 2:
        raise ValueError(f"epilogue 'glu' needs an even number of rows, got N = {N}")
    shapes = {"bias": (N,), "residual": _output_shape(x, weight, epilogue)}
    for name, tensor in (("bias", bias), ("residual", residual)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} must be {x.dtype} on {x.device} like x, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def autocast(tensor: Tensor) -> Tensor:
    """What autocast makes of an argument of F.linear: fp64 and integers stay."""
    # autocast does not know the meta device
    if tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


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
    x = autocast(x)
    bias = None if bias is None else autocast(bias)
    residual = None if residual is None else autocast(residual)
    _check(x, weight, bias, residual, epilogue)
    if quantizer is not None:
        check_quantizer(quantizer, "weight", weight)
        if quantizer.scale is None:
            raise ValueError("scale must be given for a weight, got None")
    scale = None if quantizer is None else quantizer.scale
    tensors = (x, weight, bias, residual, scale)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    packed = _FLOAT if quantizer is None else flatten(quantizer)
    y: Tensor
    y, _, _ = torch.ops.lowbit.training_linear.default(
        x, weight, bias, residual, epilogue, save, *packed
    )
    return y
