"""torch.ops.lowbit.masked_group_norm: schema, validation, fake, backends and gradient.

Dimension key: B batch, C channels, T frames, G groups.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.checks import check_dtype, check_lengths
from lowbit_kernels.cpu import group_norm_backward_cpu, group_norm_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.matmul.reference import apply_epilogue
from lowbit_kernels.norm.checks import check_activation, check_parameter
from lowbit_kernels.norm.levels import empty_channels, is_channel_last
from lowbit_kernels.norm.reference import (
    group_norm_backward,
    group_statistics,
    normalize,
    normalize_backward,
    per_channel,
)

torch.library.define(
    "lowbit::masked_group_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? lengths, int num_groups, float eps, "
    "str? activation) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "lowbit::masked_group_norm_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
    "Tensor? lengths, int num_groups, str? activation) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
)


@torch.library.register_fake("lowbit::masked_group_norm")
def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, _, _, _, num_groups, *_ = args
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.new_empty(x.shape[0], num_groups, dtype=wide)
    return empty_channels(x), mean, torch.empty_like(mean)


@torch.library.register_fake("lowbit::masked_group_norm_backward")
def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, x, weight, bias, *_ = args
    return empty_channels(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@torch.library.impl("lowbit::masked_group_norm", "cpu")
def _cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, lengths, num_groups, eps, activation = args
    native = group_norm_cpu(*args[:-1]) if x.dtype == torch.float32 else None
    if native is None:
        mean, rstd = group_statistics(x, lengths, num_groups, eps)
        channels = (per_channel(mean, x.shape[1]), per_channel(rstd, x.shape[1]))
        y = normalize(x, weight, bias, *channels, lengths, activation)
    else:
        y, mean, rstd = native
        # of 0, beyond the lengths, every activation is 0
        y = apply_epilogue(y, activation)
    return empty_channels(x).copy_(y) if is_channel_last(x) else y, mean, rstd


@torch.library.impl("lowbit::masked_group_norm_backward", "cpu")
def _cpu_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, x, weight, bias, mean, rstd, lengths, _, activation = args
    if x.dtype == torch.float32 and activation is None:
        native = group_norm_backward_cpu(grad_y, x, weight, mean, rstd, lengths)
        if native is not None:
            dx, dweight, dbias = native
            dx = empty_channels(x).copy_(dx) if is_channel_last(x) else dx
            return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)
    dx, dweight, dbias = group_norm_backward(normalize_backward, *args)
    return empty_channels(x).copy_(dx), dweight, dbias


implement_on_cuda(
    "lowbit::masked_group_norm",
    "lowbit_kernels.norm.group_norm_kernel.masked_group_norm_triton",
)
implement_on_cuda(
    "lowbit::masked_group_norm_backward",
    "lowbit_kernels.norm.group_norm_kernel.masked_group_norm_backward_triton",
)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, bias, lengths, ctx.num_groups, _, ctx.activation = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd, lengths)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 7
    grads = torch.ops.lowbit.masked_group_norm_backward.default(
        grad_y, *ctx.saved_tensors, ctx.num_groups, ctx.activation
    )
    return *grads, None, None, None, None


torch.library.register_autograd(
    "lowbit::masked_group_norm", _backward, setup_context=_setup_context
)


def masked_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    lengths: Tensor | None,
    num_groups: int,
    eps: float = 1e-5,
    activation: str | None = None,
) -> Tensor:
    """Apply GroupNorm over the valid frames and an activation: padding changes no utterance.

    Equivalent to ``act(F.group_norm(x[b : b + 1, :, : lengths[b]], num_groups, weight, bias,
    eps))`` for each utterance b, with 0 in the frames beyond; these get gradient 0.

    Args:
        x: [B, C, T], fp16, bf16 or fp32 (fp64 on a CPU). Any strides; not copied on a GPU where
            frames or channels are adjacent in memory.
        weight: [C], any floating dtype.
        bias: [C], any floating dtype.
        lengths: [B], int32 or int64, on x's device: the valid frames of each utterance. Below 0
            acts as 0, above T as T. None: every frame is valid.
        num_groups: a divisor of C.
        eps: added to the variance.
        activation: None, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"relu"``.

    Returns:
        [B, C, T], in the dtype of x; channel-last in memory where x is, else contiguous.
        Statistics are fp32 (fp64 for fp64 x).

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, C, T], got shape {tuple(x.shape)}")
    check_dtype("x", x)
    check_parameter("weight", weight, x, x.shape[1])
    check_parameter("bias", bias, x, x.shape[1])
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"num_groups must divide the {x.shape[1]} channels, got {num_groups}")
    check_lengths(lengths, x)
    check_activation(activation)
    y: Tensor = torch.ops.lowbit.masked_group_norm.default(
        x, weight, bias, lengths, num_groups, eps, activation
    )[0]
    return y
