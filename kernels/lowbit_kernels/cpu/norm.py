"""GroupNorm over valid frames; LayerNorm and activations to int8 rows; on a CPU in fp32.

Dimension key: B batch, C channels, T frames, G groups; M rows of N features.
"""

import torch
from torch import Tensor

from lowbit_kernels.cpu import library as lib


def group_norm_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Normalize each group of channels over its valid frames.

    Args:
        x: [B, C, T], fp32.
        weight: [C], any floating dtype.
        bias: [C], any floating dtype.
        lengths: [B], the valid frames, clamped to [0, T]. None: all.
        num_groups: G, a divisor of C.
        eps: added to the variance.

    Returns:
        y [B, C, T] contiguous, 0 beyond the lengths; mean and rstd [B, G], 0 where no frame is
        valid. None where our kernels are not compiled.
    """
    library = lib.native()
    if library is None:
        return None
    y = lib.empty(*x.shape)
    mean, rstd = (torch.zeros(x.shape[0], num_groups) for _ in range(2))
    if x.numel():
        arguments, held = _group_arguments(x, weight, lengths, mean, rstd)
        bias = bias.detach().float().contiguous()
        arguments.bias, arguments.eps, arguments.out = lib.pointer(bias), eps, lib.pointer(y)
        library.group_norm(arguments)
        del held
    return y, mean, rstd


def group_norm_backward_cpu(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients of ``group_norm_cpu``.

    Args:
        grad_y: [B, C, T], fp32.
        x: as in the forward.
        weight: as in the forward.
        mean: as the forward returned it.
        rstd: as the forward returned it.
        lengths: as in the forward.

    Returns:
        dx [B, C, T] contiguous, dweight and dbias [C] fp32. None where our kernels are not
        compiled.
    """
    library = lib.native()
    if library is None:
        return None
    dx = lib.empty(*x.shape)
    dweight, dbias = (torch.zeros(x.shape[:2]) for _ in range(2))
    if x.numel():
        grad = grad_y if grad_y.stride(-1) == 1 else grad_y.contiguous()
        arguments, held = _group_arguments(x, weight, lengths, mean, rstd)
        arguments.grad, arguments.grad_strides = lib.pointer(grad), grad.stride()[:2]
        arguments.dweight, arguments.dbias = lib.pointer(dweight), lib.pointer(dbias)
        arguments.out = lib.pointer(dx)
        library.group_norm(arguments)
        del held
    return dx, dweight.sum(0), dbias.sum(0)


def _group_arguments(
    x: Tensor, weight: Tensor, lengths: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[lib.GroupNorm, list[Tensor | None]]:
    """What both directions share, and the tensors that must live as long as it."""
    B, C, T = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight, mean, rstd = weight.detach().float().contiguous(), mean.contiguous(), rstd.contiguous()
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    return lib.GroupNorm(
        B=B, C=C, T=T, groups=mean.shape[1], x=lib.pointer(x), x_strides=x.stride()[:2],
        lengths=lib.pointer(lengths), weight=lib.pointer(weight),
        mean=lib.pointer(mean), rstd=lib.pointer(rstd), threads=lib.threads(),
    ), [x, weight, mean, rstd, lengths]  # fmt: skip


def norm_quantize_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    return_normalized: bool,
    static_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Add a residual, apply LayerNorm, and quantize each row to int8, in one pass.

    Args:
        x: [..., N], fp32.
        weight: [N], any floating dtype.
        bias: [N], any floating dtype.
        residual: like x, or None.
        eps: added to the variance.
        return_normalized: whether to write what is quantized too.
        static_scale: [], fp32: the scale of all rows. None: each row's own.

    Returns:
        h, empty without a residual; y, normalized, empty unless asked for; q int8; scale, mean
        and rstd [..., 1]. None where our kernels are not compiled.
    """
    library = lib.native()
    if library is None:
        return None
    N = x.shape[-1]
    h = torch.empty(0 if residual is None else x.shape)
    y = torch.empty(x.shape if return_normalized else 0)
    q = torch.empty(x.shape, dtype=torch.int8)
    scale, mean, rstd = (torch.empty(*x.shape[:-1], 1) for _ in range(3))
    x, weight, bias = x.contiguous(), weight.detach().float(), bias.detach().float()
    weight, bias = weight.contiguous(), bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    arguments = lib.NormQuantize(
        rows=x.numel() // N, columns=N, x=lib.pointer(x), residual=lib.pointer(residual),
        weight=lib.pointer(weight), bias=lib.pointer(bias), eps=eps,
        static_scale=lib.pointer(static_scale), h=lib.pointer(h),
        y=lib.pointer(y) if return_normalized else None, q=lib.pointer(q),
        scale=lib.pointer(scale), mean=lib.pointer(mean), rstd=lib.pointer(rstd),
        threads=lib.threads(),
    )  # fmt: skip
    if library.norm_quantize(arguments):
        raise MemoryError("no memory for the rows of a LayerNorm")
    return h, y, q, scale, mean, rstd
