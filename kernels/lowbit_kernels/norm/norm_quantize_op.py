"""torch.ops.lowbit.norm_quantize: schema, validation, fake, backends and gradient.

Dimension key: any leading dimensions, together M rows; N features.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from lowbit_kernels.cpu import norm_quantize_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.norm.checks import check_float_input, check_parameter
from lowbit_kernels.norm.levels import aligned_levels, empty_levels
from lowbit_kernels.norm.reference import quantize_rows_reference

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

torch.library.define(
    "lowbit::norm_quantize",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool return_dequantized) "
    "-> (Tensor h, Tensor y, Tensor q, Tensor scale, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "lowbit::norm_quantize_backward",
    "(Tensor grad_y, Tensor? grad_h, Tensor h, Tensor weight, Tensor bias, Tensor mean, "
    "Tensor rstd) -> (Tensor dh, Tensor dweight, Tensor dbias)",
)


@torch.library.register_fake("lowbit::norm_quantize")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    return_dequantized: bool,
) -> Outputs:
    wide = torch.promote_types(x.dtype, torch.float32)
    statistic = (*x.shape[:-1], 1)
    return (
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(x.shape if return_dequantized else 0),
        empty_levels(x.shape, x.device),
        x.new_empty(statistic, dtype=torch.float32),
        x.new_empty(statistic, dtype=wide),
        x.new_empty(statistic, dtype=wide),
    )


@torch.library.register_fake("lowbit::norm_quantize_backward")
def _fake_backward(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@torch.library.impl("lowbit::norm_quantize", "cpu")
def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    return_dequantized: bool,
) -> Outputs:
    if x.dtype == torch.float32:
        native = norm_quantize_cpu(x, weight, bias, residual, eps, return_dequantized)
        if native is not None:
            h, y, q, scale, mean, rstd = native
            return h, y, aligned_levels(q), scale, mean, rstd
    wide = torch.promote_types(x.dtype, torch.float32)
    h = (x if residual is None else x + residual).contiguous()
    normalized, mean, rstd = torch.native_layer_norm(
        h.to(wide), (h.shape[-1],), weight.to(wide), bias.to(wide), eps
    )
    q, scale = quantize_rows_reference(normalized)
    y = (q * scale).to(x.dtype) if return_dequantized else x.new_empty(0)
    h = x.new_empty(0) if residual is None else h
    return h, y, aligned_levels(q), scale, mean, rstd


@torch.library.impl("lowbit::norm_quantize_backward", "cpu")
def _cpu_backward(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = mean.dtype
    dh, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad_y.to(wide).contiguous(), h.to(wide).contiguous(), (h.shape[-1],), mean, rstd,
        weight.to(wide), bias.to(wide), [True, True, True],
    )  # fmt: skip
    if grad_h is not None:
        dh = dh + grad_h
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
    x, weight, bias, residual, _, _ = inputs
    h, _, q, scale, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(h if ctx.has_residual else x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(q, scale, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_h: Tensor | None,
    grad_y: Tensor | None,
    grad_q: None,
    grad_scale: None,
    grad_mean: None,
    grad_rstd: None,
) -> tuple[Tensor | None, ...]:
    grad_h = grad_h if ctx.has_residual else None
    if grad_y is None or grad_y.numel() == 0:
        return grad_h, None, None, grad_h, None, None
    dh, dweight, dbias = torch.ops.lowbit.norm_quantize_backward.default(
        grad_y, grad_h, *ctx.saved_tensors
    )
    return dh, dweight, dbias, dh if ctx.has_residual else None, None, None


torch.library.register_autograd("lowbit::norm_quantize", _backward, setup_context=_setup_context)


@overload
def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    return_dequantized: Literal[False] = False,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    return_dequantized: Literal[True],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    return_dequantized: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add a residual, apply LayerNorm, and quantize each row to int8, in one pass.

    Equivalent to ``h = x + residual; y = F.layer_norm(h, (N,), weight, bias, eps)`` in fp32, and
    then what a low-bit linear layer with int8 inputs does to its input: ``scale = y.abs().amax(-1,
    keepdim=True) / 127``, at least 2 ** -126; ``q = (y * (1 / scale)).round()``.

    Integers carry no gradient, so q and scale have none. Training uses the fourth result: the
    gradient of y is that of the LayerNorm (straight through the rounding).

    Args:
        x: [..., N], fp16, bf16 or fp32 (fp64 on a CPU). Any strides.
        weight: [N], any floating dtype.
        bias: [N], any floating dtype.
        residual: like x, or None.
        eps: added to the variance.
        return_dequantized: also return y = q * scale.

    Returns:
        q: [..., N], int8 in [-127, 127], rows a multiple of 32 bytes apart.
        scale: [..., 1], fp32. NaN for a row that is not finite; its integers mean nothing.
        h: [..., N], x + residual in the dtype of x, differentiable; x itself without a residual.
        y: [..., N], q * scale in the dtype of x, differentiable. With ``return_dequantized``.

    Raises:
        ValueError: on a wrong shape, dtype or device, naming the argument.
        NotImplementedError: on a GPU, for more than 8192 features.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., N] with N >= 1, got shape {tuple(x.shape)}")
    check_float_input("x", x)
    check_parameter("weight", weight, x, x.shape[-1])
    check_parameter("bias", bias, x, x.shape[-1])
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device
    ):
        raise ValueError(
            f"residual must be like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(residual.shape)} {residual.dtype} on {residual.device}"
        )
    h, y, q, scale, _, _ = torch.ops.lowbit.norm_quantize.default(
        x, weight, bias, residual, eps, return_dequantized
    )
    h = x if residual is None else h
    return (q, scale, h, y) if return_dequantized else (q, scale, h)
