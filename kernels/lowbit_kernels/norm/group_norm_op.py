"""torch.ops.lowbit.masked_group_norm: schema, validation, fake, backends and gradient.

Dimension key: B batch, C channels, T frames, G groups.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.checks import check_dtype
from lowbit_kernels.cpu import group_norm_backward_cpu, group_norm_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.norm.checks import check_parameter

torch.library.define(
    "lowbit::masked_group_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? lengths, int num_groups, float eps) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "lowbit::masked_group_norm_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
    "Tensor? lengths, int num_groups) -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


@torch.library.register_fake("lowbit::masked_group_norm")
def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, _, _, _, num_groups, _ = args
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.new_empty(x.shape[0], num_groups, dtype=wide)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@torch.library.register_fake("lowbit::masked_group_norm_backward")
def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, x, weight, bias, *_ = args
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _cpu_runs(x: Tensor, lengths: Tensor | None) -> list[tuple[slice, int]]:
    """Rows of the batch and their valid frames: what PyTorch's kernel can take in one call."""
    B, _, T = x.shape
    if x.numel() == 0:
        return []
    if lengths is None:
        return [(slice(0, B), T)]
    frames = lengths.clamp(0, T).tolist()
    return [(slice(b, b + 1), n) for b, n in enumerate(frames) if n > 0]


@torch.library.impl("lowbit::masked_group_norm", "cpu")
def _cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, lengths, num_groups, eps = args
    if x.dtype == torch.float32:
        native = group_norm_cpu(*args)
        if native is not None:
            return native
    B, C, T = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)
    # PyTorch takes 16 bits with fp32 parameters, and computes in fp32
    norm = torch.ops.aten.native_group_norm
    if lengths is None and x.numel():
        whole: tuple[Tensor, Tensor, Tensor] = norm(
            x.contiguous(), weight, bias, B, C, T, num_groups, eps
        )
        return whole
    y = x.new_zeros(x.shape)
    mean = x.new_zeros(B, num_groups, dtype=wide)
    rstd = torch.zeros_like(mean)
    for rows, n in _cpu_runs(x, lengths):
        part = x[rows, :, :n].contiguous()
        y[rows, :, :n], mean[rows], rstd[rows] = norm(
            part, weight, bias, part.shape[0], C, n, num_groups, eps
        )
    return y, mean, rstd


@torch.library.impl("lowbit::masked_group_norm_backward", "cpu")
def _cpu_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, x, weight, bias, mean, rstd, lengths, num_groups = args
    if x.dtype == torch.float32:
        native = group_norm_backward_cpu(grad_y, x, weight, mean, rstd, lengths)
        if native is not None:
            return native[0], native[1].to(weight.dtype), native[2].to(bias.dtype)
    C = x.shape[1]
    wide = mean.dtype
    dx = x.new_zeros(x.shape)
    dweight, dbias = x.new_zeros(C, dtype=wide), x.new_zeros(C, dtype=wide)
    for rows, n in _cpu_runs(x, lengths):
        part = x[rows, :, :n].to(wide).contiguous()
        grad = grad_y[rows, :, :n].to(wide).contiguous()
        dx[rows, :, :n], dweight_part, dbias_part = torch.ops.aten.native_group_norm_backward(
            grad, part, mean[rows], rstd[rows], weight.to(wide),
            part.shape[0], C, n, num_groups, [True, True, True],
        )  # fmt: skip
        dweight += dweight_part
        dbias += dbias_part
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


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
    x, weight, bias, lengths, ctx.num_groups, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd, lengths)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 6
    grads = torch.ops.lowbit.masked_group_norm_backward.default(
        grad_y, *ctx.saved_tensors, ctx.num_groups
    )
    return *grads, None, None, None


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
) -> Tensor:
    """Apply GroupNorm over the valid frames, so that padding changes no utterance.

    Equivalent to ``F.group_norm(x[b : b + 1, :, : lengths[b]], num_groups, weight, bias, eps)``
    for each utterance b, with 0 in the frames beyond; these get gradient 0.

    Args:
        x: [B, C, T], fp16, bf16 or fp32 (fp64 on a CPU). Any strides.
        weight: [C], any floating dtype.
        bias: [C], any floating dtype.
        lengths: [B], int32 or int64, on x's device: the valid frames of each utterance. Below 0
            acts as 0, above T as T. None: every frame is valid.
        num_groups: a divisor of C.
        eps: added to the variance.

    Returns:
        [B, C, T], contiguous, in the dtype of x. Statistics are fp32 (fp64 for fp64 x).

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
    if lengths is not None:
        if lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"lengths must be int32 or int64, got {lengths.dtype}")
        if lengths.shape != x.shape[:1] or lengths.device != x.device:
            raise ValueError(
                f"lengths must be [{x.shape[0]}] on {x.device}, "
                f"got {list(lengths.shape)} on {lengths.device}"
            )
    y: Tensor
    y, _, _ = torch.ops.lowbit.masked_group_norm.default(x, weight, bias, lengths, num_groups, eps)
    return y
