"""torch.ops.lowbit.masked_batch_norm: schema, validation, fake, backends and gradient.

Dimension key: B batch, C channels, T frames, R processes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_kernels.checks import check_dtype, check_lengths, check_like
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.norm.checks import check_activation, check_parameter
from lowbit_kernels.norm.levels import empty_channels
from lowbit_kernels.norm.reference import (
    channel_moments,
    merge_moments,
    normalize,
    normalize_backward,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]

torch.library.define(
    "lowbit::masked_batch_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? lengths, float eps, str? activation, "
    "str? group) -> (Tensor y, Tensor moments, Tensor mean, Tensor rstd)",
)
torch.library.define(
    "lowbit::masked_batch_norm_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor moments, Tensor mean, "
    "Tensor rstd, Tensor? lengths, str? activation, str? group) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
)


@torch.library.register_fake("lowbit::masked_batch_norm")
def _fake(*args: Any) -> Outputs:
    x, C = args[0], args[0].shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.new_empty(1, C, dtype=wide)
    return empty_channels(x), x.new_empty(2 * C + 1, dtype=wide), mean, torch.empty_like(mean)


@torch.library.register_fake("lowbit::masked_batch_norm_backward")
def _fake_backward(*args: Any) -> Gradients:
    _, x, weight, bias, *_ = args
    return empty_channels(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _gathered(part: Tensor, group: str) -> Tensor:
    """What each process has of a tensor, [R, ...] in the order of their ranks."""
    resolve: Any = torch._C._distributed_c10d._resolve_process_group
    process_group = resolve(group)
    parts = [torch.empty_like(part) for _ in range(process_group.size())]
    dist.all_gather(parts, part.contiguous(), group=process_group)
    return torch.stack(parts)


def _forward(
    moments_of: Callable[..., Tensor],
    merge: Callable[..., tuple[Tensor, Tensor, Tensor]],
    apply: Callable[..., Tensor],
    *args: Any,
) -> Outputs:
    """Statistics, of all processes if there is a group, and one pass that applies them."""
    x, weight, bias, lengths, eps, activation, group = args
    moments, mean, rstd = merge(moments_of(x, lengths), eps)
    if group is not None:
        moments, mean, rstd = merge(_gathered(moments, group).view(1, -1, moments.shape[1]), eps)
    y = apply(x, weight, bias, mean, rstd, lengths, activation)
    return y, moments[0], mean, rstd


def _gradients(backward: Callable[..., Tensor], *args: Any) -> Gradients:
    """Sums over the valid frames, of all processes if there is a group, and one pass for dx."""
    grad_y, x, weight, bias, moments, mean, rstd, lengths, activation, group = args
    arguments = (grad_y, x, weight, bias, mean, rstd, lengths, activation)
    sums = backward(*arguments, None).sum((0, 1))
    dbias, dweight = sums.to(weight.dtype).unbind()
    if group is not None:  # of the parameters' gradients DistributedDataParallel takes care
        sums = _gathered(sums, group).sum(0)
    means = sums * weight.to(sums.dtype) / moments[-1].clamp(min=1)
    return backward(*arguments, means[None]), dweight.clone(), dbias.to(bias.dtype, copy=True)


@torch.library.impl("lowbit::masked_batch_norm", "cpu")
def _cpu(*args: Any) -> Outputs:
    y, moments, mean, rstd = _forward(channel_moments, merge_moments, normalize, *args)
    return empty_channels(args[0]).copy_(y), moments, mean, rstd


@torch.library.impl("lowbit::masked_batch_norm_backward", "cpu")
def _cpu_backward(*args: Any) -> Gradients:
    dx, dweight, dbias = _gradients(normalize_backward, *args)
    return empty_channels(args[1]).copy_(dx), dweight, dbias


def _cuda(*args: Any) -> Outputs:
    # imported on first use, so that `import lowbit_kernels` needs no GPU and no Triton
    from lowbit_kernels.norm import channel_kernel as kernels

    return _forward(
        kernels.channel_moments_triton,
        kernels.merge_moments_triton,
        kernels.normalize_triton,
        *args,
    )


def _cuda_backward(*args: Any) -> Gradients:
    from lowbit_kernels.norm.channel_kernel import normalize_backward_triton

    return _gradients(normalize_backward_triton, *args)


implement_on_cuda("lowbit::masked_batch_norm", _cuda)
implement_on_cuda("lowbit::masked_batch_norm_backward", _cuda_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, bias, lengths, _, ctx.activation, ctx.group = inputs
    _, *statistics = output
    ctx.save_for_backward(x, weight, bias, *statistics, lengths)
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 7
    grads = torch.ops.lowbit.masked_batch_norm_backward.default(
        grad_y, *ctx.saved_tensors, ctx.activation, ctx.group
    )
    return *grads, None, None, None, None


torch.library.register_autograd(
    "lowbit::masked_batch_norm", _backward, setup_context=_setup_context
)


def masked_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    lengths: Tensor | None,
    eps: float = 1e-5,
    activation: str | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float | Tensor = 0.1,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Apply BatchNorm with the statistics of the valid frames of a batch, and an activation.

    Equivalent to ``act(F.batch_norm(frames, ..., training=True))`` of the valid frames of all
    utterances one after the other, [frames, C], with 0 in the other frames; these get gradient 0.

    Args:
        x: [B, C, T], fp16, bf16 or fp32 (fp64 on a CPU). Any strides; not copied where frames or
            channels are adjacent in memory.
        weight: [C], any floating dtype.
        bias: [C], any floating dtype.
        lengths: [B], int32 or int64, on x's device: the valid frames of each utterance. Below 0
            acts as 0, above T as T. None: every frame is valid.
        eps: added to the variance.
        activation: None, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"relu"``.
        running_mean: [C], moved towards the batch's mean by ``momentum``; as it is if no frame is
            valid. None: not kept.
        running_var: [C], the same of the unbiased variance.
        momentum: of running_mean and running_var.
        process_group: the processes of which the statistics are; each must call, forward and
            backward. None: this one.

    Returns:
        [B, C, T], in the dtype of x; channel-last in memory where x is, else contiguous.
        Statistics are fp32 (fp64 for fp64 x).

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, C, T], got shape {tuple(x.shape)}")
    C = x.shape[1]
    check_dtype("x", x)
    check_parameter("weight", weight, x, C)
    check_parameter("bias", bias, x, C)
    check_lengths(lengths, x)
    check_activation(activation)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together, got one")
    if running_mean is not None and running_var is not None:
        check_parameter("running_mean", running_mean, x, C)
        check_like("running_var", running_var, (C,), running_mean.dtype, x)
    group = None if process_group is None else process_group.group_name
    y, moments, _, _ = torch.ops.lowbit.masked_batch_norm.default(
        x, weight, bias, lengths, eps, activation, group
    )
    if running_mean is not None and running_var is not None:
        mean, squares = moments[:-1].to(running_mean.dtype).chunk(2)
        count = moments[-1]
        step = (momentum * (count > 0)).to(mean.dtype)
        running_mean.lerp_(mean, step)
        running_var.lerp_(squares / (count - 1).clamp(min=1).to(mean.dtype), step)
    out: Tensor = y
    return out
