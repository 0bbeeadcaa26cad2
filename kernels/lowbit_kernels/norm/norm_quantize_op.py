"""torch.ops.lowbit.norm_quantize: schema, validation, fake, backends and gradient.

Dimension key: any leading dimensions, together M rows; N features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_kernels.checks import check_dtype, check_lengths, check_like
from lowbit_kernels.cpu import norm_quantize_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.matmul.reference import (
    apply_epilogue,
    epilogue_backward_reference,
    int8_scale,
)
from lowbit_kernels.norm.checks import (
    check_activation,
    check_parameter,
    check_scale,
)
from lowbit_kernels.norm.levels import aligned_levels, empty_levels
from lowbit_kernels.norm.reference import quantize_rows_reference, zero_padding

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

torch.library.define(
    "lowbit::norm_quantize",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool return_y, "
    "Tensor? lengths, str? activation, Tensor? static_scale, bool quantize, "
    "Tensor? first_weight=None, Tensor? first_bias=None, float first_eps=0.0) "
    "-> (Tensor h, Tensor y, Tensor q, Tensor scale, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "lowbit::norm_quantize_backward",
    "(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor bias, Tensor mean, "
    "Tensor rstd, Tensor? lengths, str? activation) "
    "-> (Tensor dh, Tensor dweight, Tensor dbias)",
)


@torch.library.register_fake("lowbit::norm_quantize")
def _fake(*args: Any) -> Outputs:
    x, _, _, residual, _, return_y, _, _, _, quantize, *first = args
    has_h = residual is not None or (first and first[0] is not None)
    wide = torch.promote_types(x.dtype, torch.float32)
    statistic = (*x.shape[:-1], 1)
    return (
        x.new_empty(x.shape if has_h else 0),
        x.new_empty(x.shape if return_y else 0),
        empty_levels(x.shape if quantize else (0,), x.device),
        x.new_empty(statistic, dtype=torch.float32),
        x.new_empty(statistic, dtype=wide),
        x.new_empty(statistic, dtype=wide),
    )


@torch.library.register_fake("lowbit::norm_quantize_backward")
def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, h, weight, bias, *_ = args
    return h.new_empty(h.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@torch.library.impl("lowbit::norm_quantize", "cpu")
def _cpu(*args: Any) -> Outputs:
    first_weight, first_bias, first_eps = args[10:] or (None, None, 0.0)
    if first_weight is None:
        return _norm_cpu(*args[:10])
    x, weight, bias = args[0], first_weight.to(args[0].dtype), first_bias.to(args[0].dtype)
    h = F.layer_norm(x, (x.shape[-1],), weight, bias, first_eps)
    _, *of_second = _norm_cpu(h, *args[1:10])
    return h, *of_second  # type: ignore[return-value]


def _norm_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    return_y: bool,
    lengths: Tensor | None,
    activation: str | None,
    static_scale: Tensor | None,
    quantize: bool,
) -> Outputs:
    if x.dtype == torch.float32 and lengths is None and activation is None and quantize:
        native = norm_quantize_cpu(x, weight, bias, residual, eps, return_y, static_scale)
        if native is not None:
            h, y, q, scale, mean, rstd = native
            return h, y, aligned_levels(q), scale, mean, rstd
    wide = torch.promote_types(x.dtype, torch.float32)
    h = zero_padding(x if residual is None else x + residual, lengths).contiguous()
    z, mean, rstd = torch.native_layer_norm(
        h.to(wide), (h.shape[-1],), weight.to(wide), bias.to(wide), eps
    )
    y = zero_padding(apply_epilogue(z, activation), lengths)
    y = y.to(x.dtype) if return_y else y
    if quantize:
        q, scale = quantize_rows_reference(y.to(wide), static_scale)
    else:
        q, scale = x.new_empty(0, dtype=torch.int8), int8_scale(y.abs().amax(-1, keepdim=True))
    h = x.new_empty(0) if residual is None else h
    y = y if return_y else x.new_empty(0)
    return h, y, aligned_levels(q), scale, mean, rstd


@torch.library.impl("lowbit::norm_quantize_backward", "cpu")
def _cpu_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, grad_h, h, weight, bias, mean, rstd, lengths, activation = args
    wide = mean.dtype
    grad, weight_wide = zero_padding(grad_y, lengths).to(wide).contiguous(), weight.to(wide)
    h_wide = zero_padding(h, lengths).to(wide).contiguous()
    if activation is not None:
        z = (h_wide - mean) * rstd * weight_wide + bias.to(wide)
        grad = epilogue_backward_reference(grad, z, activation)
    dh, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, h_wide, (h.shape[-1],), mean, rstd, weight_wide, bias.to(wide), [True, True, True]
    )
    if grad_h is not None:
        dh = dh + zero_padding(grad_h, lengths)
    return dh.to(h.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)


implement_on_cuda(
    "lowbit::norm_quantize",
    "lowbit_kernels.norm.norm_quantize_kernel.norm_quantize_triton",
)
implement_on_cuda(
    "lowbit::norm_quantize_backward",
    "lowbit_kernels.norm.norm_quantize_kernel.norm_quantize_backward_triton",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, bias, residual, _, ctx.has_y, lengths, ctx.activation, _, _, first, *_ = inputs
    if first is not None:
        raise NotImplementedError("norm_of_norm has no gradient: call it under torch.no_grad()")
    h, _, q, scale, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(h if ctx.has_residual else x, weight, bias, mean, rstd, lengths)
    ctx.mark_non_differentiable(q, scale, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_h: Tensor | None, grad_y: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    grad_h = grad_h if ctx.has_residual else None
    *saved, lengths = ctx.saved_tensors
    if grad_y is None or not ctx.has_y:
        dh, dweight, dbias = None if grad_h is None else zero_padding(grad_h, lengths), None, None
    else:
        dh, dweight, dbias = torch.ops.lowbit.norm_quantize_backward.default(
            grad_y, grad_h, *saved, lengths, ctx.activation
        )
    return dh, dweight, dbias, dh if ctx.has_residual else None, *(None,) * 9


torch.library.register_autograd("lowbit::norm_quantize", _backward, setup_context=_setup_context)


def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    lengths: Tensor | None = None,
    scale: Tensor | None = None,
    return_normalized: bool = False,
) -> tuple[Tensor, ...]:
    """Add a residual, apply LayerNorm and an activation, quantize each row to int8, in one pass.

    Equivalent to ``h = x + residual; y = act(F.layer_norm(h, (N,), weight, bias, eps))`` in fp32,
    and then what a low-bit linear layer with int8 inputs does to its input: ``scale =
    y.abs().amax(-1, keepdim=True) / 127``, at least 2 ** -126; ``q = (y * (1 / scale)).round()``,
    with a static scale clamped to [-127, 127].

    Integers carry no gradient, so q and scale have none.

    Args:
        x: [..., N], fp16, bf16 or fp32 (fp64 on a CPU). Any strides.
        weight: [N], any floating dtype.
        bias: [N], any floating dtype.
        residual: like x, or None.
        eps: added to the variance.
        activation: None, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"relu"``.
        lengths: [B], int32 or int64, the valid frames of x [B, T, N]. The others are not read: h,
            y and q are 0 there, and their gradient is. None: every frame is valid.
        scale: [], fp32: the scale of all rows. None: each row's own.
        return_normalized: also return y, of which q is rounded then, as it is stored: what the next
            block adds to, and q what its first layer would make of it.

    Returns:
        q: [..., N], int8 in [-127, 127], rows a multiple of 32 bytes apart.
        scale: [..., 1], fp32. A row's own is NaN where the row is not finite; its integers mean
            nothing.
        h: [..., N], x + residual in the dtype of x, differentiable; x itself without a residual.
        y: [..., N], in the dtype of x, differentiable. With ``return_normalized``.

    Raises:
        ValueError: on a wrong shape, dtype or device, naming the argument.
        NotImplementedError: on a GPU, for more than 8192 features.
    """
    _check(x, weight, bias, activation, lengths)
    check_like("residual", residual, tuple(x.shape), x.dtype, x)
    check_scale(scale, x)
    h, y, q, row_scale, _, _ = torch.ops.lowbit.norm_quantize.default(
        x, weight, bias, residual, eps, return_normalized, lengths, activation, scale, True
    )
    h = x if residual is None else h
    return (q, row_scale, h, y) if return_normalized else (q, row_scale, h)


def norm_of_norm(
    x: Tensor, first: nn.LayerNorm, second: nn.LayerNorm, *, int8: bool, scale: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The LayerNorm that ends a block, and of its result the one that begins the next, in one pass.

    It has no gradient.

    Args:
        x: [..., N], as in ``norm_quantize``.
        first: over N features, with weight and bias.
        second: the same.
        int8: whether to quantize the rows of the second one.
        scale: as in ``norm_quantize``.

    Returns:
        h: [..., N], the first norm's result, in the dtype of x.
        y: [..., N], the second norm of h, in the dtype of x; or q and scale of ``norm_quantize``.

    Raises:
        ValueError: on a wrong shape, dtype or device, naming the argument.
        NotImplementedError: on a GPU, for more than 8192 features; where a gradient is asked for.
    """
    for norm in (first, second):
        _check(x, norm.weight, norm.bias, None, None)
    check_scale(scale, x)
    h, y, q, row_scale, _, _ = torch.ops.lowbit.norm_quantize.default(
        x, second.weight, second.bias, None, second.eps, not int8, None, None, scale, int8,
        first.weight, first.bias, first.eps,
    )  # fmt: skip
    return (h, q, row_scale) if int8 else (h, y)


def norm_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str | None,
    lengths: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Apply LayerNorm and an activation in one pass, in fp32; 0 beyond the lengths.

    The backward recomputes the normalized values: nothing but x and two numbers a row is kept.

    Args:
        x: as in ``norm_quantize``.
        weight: as in ``norm_quantize``.
        bias: as in ``norm_quantize``.
        activation: as in ``norm_quantize``.
        lengths: as in ``norm_quantize``.
        eps: added to the variance.

    Returns:
        Like x, contiguous. Differentiable.

    Raises:
        ValueError: on a wrong shape, dtype, device or activation, naming the argument.
        NotImplementedError: on a GPU, for more than 8192 features.
    """
    _check(x, weight, bias, activation, lengths)
    y: Tensor = torch.ops.lowbit.norm_quantize.default(
        x, weight, bias, None, eps, True, lengths, activation, None, False
    )[1]
    return y


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, lengths: Tensor | None
) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., N] with N >= 1, got shape {tuple(x.shape)}")
    check_dtype("x", x)
    check_parameter("weight", weight, x, x.shape[-1])
    check_parameter("bias", bias, x, x.shape[-1])
    check_activation(activation)
    if lengths is not None and x.dim() != 3:
        raise ValueError(f"x must be [B, T, N] with lengths, got shape {tuple(x.shape)}")
    check_lengths(lengths, x)
