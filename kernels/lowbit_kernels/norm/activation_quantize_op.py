"""torch.ops.lowbit.activation_quantize: schema, validation, fake, backends and gradient.

Dimension key: any leading dimensions, together M rows; N features of the output, of which the input
has 2 N with ``glu``.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.checks import EPILOGUES, check_dtype, output_shape
from lowbit_kernels.cpu import activation_quantize_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.matmul.reference import epilogue_backward_reference
from lowbit_kernels.norm.checks import check_scale
from lowbit_kernels.norm.levels import aligned_levels, empty_levels
from lowbit_kernels.norm.reference import activation_quantize_reference

ACTIVATIONS = EPILOGUES[1:]

torch.library.define(
    "lowbit::activation_quantize",
    "(Tensor x, str activation, Tensor? static_scale, bool return_dequantized) "
    "-> (Tensor y, Tensor q, Tensor scale)",
)
torch.library.define(
    "lowbit::activation_quantize_backward", "(Tensor grad_y, Tensor x, str activation) -> Tensor"
)


@torch.library.register_fake("lowbit::activation_quantize")
def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, activation, _, return_dequantized = args
    shape = output_shape(x, x.shape[-1], activation)
    return (
        x.new_empty(shape if return_dequantized else 0),
        empty_levels(shape, x.device),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


@torch.library.register_fake("lowbit::activation_quantize_backward")
def _fake_backward(grad_y: Tensor, x: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("lowbit::activation_quantize", "cpu")
def _cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, activation, static_scale, return_dequantized = args
    if x.dtype == torch.float32:
        native = activation_quantize_cpu(*args)
        if native is not None:
            y, q, scale = native
            return y, aligned_levels(q), scale
    q, scale, _ = activation_quantize_reference(x, activation, static_scale)
    y = (q * scale).to(x.dtype) if return_dequantized else x.new_empty(0)
    return y, aligned_levels(q), scale


@torch.library.impl("lowbit::activation_quantize_backward", "cpu")
def _cpu_backward(grad_y: Tensor, x: Tensor, activation: str) -> Tensor:
    return epilogue_backward_reference(grad_y.contiguous(), x.contiguous(), activation)


implement_on_cuda(
    "lowbit::activation_quantize",
    "lowbit_kernels.norm.activation_quantize_kernel.activation_quantize_triton",
)
implement_on_cuda(
    "lowbit::activation_quantize_backward",
    "lowbit_kernels.norm.activation_quantize_kernel.activation_quantize_backward_triton",
)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, ctx.activation, _, _ = inputs
    _, q, scale = output
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(q, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None, None
    (x,) = ctx.saved_tensors
    if grad_y.numel() == 0:
        return torch.zeros_like(x), None, None, None
    dx = torch.ops.lowbit.activation_quantize_backward.default(grad_y, x, ctx.activation)
    return dx, None, None, None


torch.library.register_autograd(
    "lowbit::activation_quantize", _backward, setup_context=_setup_context
)


def activation_quantize(
    x: Tensor,
    activation: str,
    *,
    scale: Tensor | None = None,
    return_dequantized: bool = False,
) -> tuple[Tensor, ...]:
    """Apply an activation and quantize each row to int8, in one pass.

    Equivalent to ``y = F.gelu(x)`` (or another activation) in fp32, and then what a low-bit linear
    layer with int8 inputs does to its input: ``scale = y.abs().amax(-1, keepdim=True) / 127``, at
    least 2 ** -126; ``q = (y * (1 / scale)).round().clamp(-127, 127)``.

    Integers carry no gradient, so q and scale have none. Training uses the third result: the
    gradient of y is that of the activation (straight through rounding and clamp).

    Args:
        x: [..., N], fp16, bf16 or fp32 (fp64 on a CPU); [..., 2 N] with ``"glu"``. Any strides.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"relu"`` or ``"glu"``; the last
            multiplies feature n by the sigmoid of feature n + N.
        scale: [], fp32: the scale of all rows. None: each row's own.
        return_dequantized: also return y = q * scale.

    Returns:
        q: [..., N], int8 in [-127, 127], rows a multiple of 32 bytes apart.
        scale: [..., 1], fp32. A row's own is NaN where the row is not finite; its integers mean
            nothing.
        y: [..., N], q * scale in the dtype of x, differentiable. With ``return_dequantized``.

    Raises:
        ValueError: on a wrong shape, dtype, device or activation, naming the argument.
        NotImplementedError: on a GPU, for more than 8192 features.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., N] with N >= 1, got shape {tuple(x.shape)}")
    if activation == "glu" and x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2 N] with 'glu', got shape {tuple(x.shape)}")
    check_dtype("x", x)
    check_scale(scale, x)
    y, q, row_scale = torch.ops.lowbit.activation_quantize.default(
        x, activation, scale, return_dequantized
    )
    return (q, row_scale, y) if return_dequantized else (q, row_scale)
