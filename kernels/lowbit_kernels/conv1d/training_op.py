"""torch.ops.lowbit.training_conv1d: a convolution whose weight is float, or fake-quantized.

Dimension key: B batch, C input channels, N output channels (N_out after ``glu``), T input frames,
T_out output frames. Results say [B, N, T_out] and lie in channel-last memory [B, T_out, N].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.checks import autocast, check_dtype, check_epilogue, check_lengths, check_like
from lowbit_kernels.conv1d.checks import make_geometry
from lowbit_kernels.conv1d.geometry import Geometry, Padding
from lowbit_kernels.conv1d.layout import channel_first, empty_channel_last
from lowbit_kernels.conv1d.reference import (
    conv_weight,
    convolution_gradients,
    convolve,
    mask_frames,
)
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.fake_quant.linear_op import (
    FLOAT,
    fake_backward,
    keeps_rounded,
    register_training_gradient,
    round_weight_reference,
    unpack_weight,
)
from lowbit_kernels.fake_quant.op import PACKED, flatten
from lowbit_kernels.fake_quant.quantizer import Quantizer, check_quantizer
from lowbit_kernels.fake_quant.reference import fake_quantize_backward_reference
from lowbit_kernels.matmul.reference import apply_epilogue, epilogue_backward_reference

_GEOMETRY = "Tensor? lengths, int stride, int left, int right, int dilation, int groups"
torch.library.define(
    "lowbit::training_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? epilogue, bool save, "
    f"{_GEOMETRY}, {PACKED}) -> (Tensor y, Tensor preactivation, Tensor rounded)",
)
torch.library.define(
    "lowbit::training_conv1d_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor? preactivation, Tensor? rounded, "
    "str? epilogue, bool needs_x, bool needs_weight, bool needs_bias, "
    f"{_GEOMETRY}, {PACKED}) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale)",
)

# gradients of x [B, T, C], of the weight [N, taps * C / groups] and of the bias [N]
Gradients = tuple[Tensor, Tensor, Tensor]


def _rows(weight: Tensor) -> Tensor:
    """The tap-major matrix [N, taps * C / groups] of a weight [N, C / groups, taps]."""
    return weight.transpose(1, 2).reshape(weight.shape[0], -1)


@torch.library.register_fake("lowbit::training_conv1d")
def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, _, _, epilogue, save, _, *geometry = args[:12]
    (N, channels, taps), B = weight.shape, x.shape[0]
    T_out = Geometry(taps, *geometry).frames_out(x.shape[2])
    keeps = save and keeps_rounded(x, weight, args[-1])
    return (
        empty_channel_last(x, B, N // 2 if epilogue == "glu" else N, T_out),
        empty_channel_last(x, B, N, T_out) if save and epilogue is not None else x.new_empty(0),
        x.new_empty((N, taps * channels) if keeps else (0,)),
    )


@torch.library.register_fake("lowbit::training_conv1d_backward")
def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    dx, *others = fake_backward(*args)
    return empty_channel_last(dx, *dx.shape) if dx.dim() == 3 else dx, *others


def _forward(
    args: tuple[Any, ...],
    round_weight: Callable[..., Tensor],
    run: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, residual, epilogue, save, lengths, *rest = args
    geometry, packed = Geometry(weight.shape[2], *rest[:5]), rest[5:]
    rounded = round_weight(*unpack_weight(_rows(weight), packed), x.dtype)
    y, z = run(x, rounded, bias, residual, lengths, geometry, epilogue, save)
    return (
        channel_first(y),
        channel_first(z) if save and epilogue is not None else x.new_empty(0),
        rounded if save and keeps_rounded(x, weight, packed[-1]) else x.new_empty(0),
    )


def _backward_op(
    args: tuple[Any, ...],
    run: Callable[..., Gradients],
    quantizer_gradient: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_y, x, weight, z, rounded, epilogue, needs_x, needs_weight, needs_bias, *rest = args
    lengths, geometry, packed = rest[0], Geometry(weight.shape[2], *rest[1:6]), rest[6:]
    rows = _rows(weight)
    dx, dweight, dbias = run(
        grad_y, x, rows if rounded is None else rounded, z, lengths, geometry, epilogue,
        (needs_x, needs_weight, needs_bias),
    )  # fmt: skip
    dscale = x.new_empty(0)
    if not needs_weight:
        dweight = weight.new_empty(0)
    else:
        rows, quantizer = unpack_weight(rows, packed)
        if quantizer is not None and quantizer.method != "ste":
            dweight, dscale = quantizer_gradient(dweight.contiguous(), rows, quantizer)
            dscale = dscale.view(packed[0].shape)
        dweight = conv_weight(dweight.to(weight.dtype), geometry).contiguous()
    return channel_first(dx) if needs_x else dx, dweight, dbias, dscale


def _cpu_run(*args: Any) -> tuple[Tensor, Tensor]:
    x, rounded, bias, residual, lengths, geometry, epilogue, _ = args
    z = convolve(mask_frames(x, lengths), conv_weight(rounded, geometry), bias, geometry).mT
    y = apply_epilogue(z, epilogue)
    return y if residual is None else y + residual.mT, z


@torch.library.impl("lowbit::training_conv1d", "cpu")
def _cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(args, round_weight_reference, _cpu_run)


def _cpu_gradients(*args: Any) -> Gradients:
    grad_y, x, rounded, z, lengths, geometry, epilogue, needs = args
    dz = epilogue_backward_reference(
        grad_y.mT.contiguous(), None if z is None else z.mT, epilogue
    ).mT
    dbias = dz.sum((0, 2)) if needs[2] else x.new_empty(0)
    frames = torch.nn.functional.pad(mask_frames(x, lengths), (geometry.left, geometry.right))
    dx, dweight = convolution_gradients(dz, frames, rounded, geometry, needs[:2])
    if needs[0]:
        dx = mask_frames(dx.narrow(2, geometry.left, x.shape[2]), lengths).mT
    return dx, dweight, dbias


@torch.library.impl("lowbit::training_conv1d_backward", "cpu")
def _cpu_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_op(args, _cpu_gradients, fake_quantize_backward_reference)


def _cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    # imported on first use, so that `import lowbit_kernels` needs no GPU and no Triton
    from lowbit_kernels.conv1d.training_cuda import training_conv1d_cuda
    from lowbit_kernels.fake_quant.linear_cuda import round_weight_cuda

    return _forward(args, round_weight_cuda, training_conv1d_cuda)


def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lowbit_kernels.conv1d.training_cuda import training_gradients_cuda
    from lowbit_kernels.fake_quant.elementwise_kernel import fake_quantize_backward_triton

    def quantizer_gradient(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return fake_quantize_backward_triton(grad[None], *rest)

    return _backward_op(args, training_gradients_cuda, quantizer_gradient)


implement_on_cuda("lowbit::training_conv1d", _cuda)
implement_on_cuda("lowbit::training_conv1d_backward", _cuda_backward)


register_training_gradient("training_conv1d")


def training_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = 0,
    dilation: int = 1,
    groups: int = 1,
    quantizer: Quantizer | None = None,
    epilogue: str | None = None,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """A convolution that trains its weight, fake-quantized or float.

    Equivalent to ``epilogue(F.conv1d(x, fake_quantize(weight, quantizer), bias, stride, padding,
    dilation, groups)) + residual`` with x zeroed from frame ``lengths[b]`` on. Memory is
    channel-last as in ``low_bit_conv1d``; no windows of x are stored, for the gradients neither.

    Args:
        x: [B, C, T], fp16, bf16 or fp32 (fp64 on a CPU); any strides. Under autocast x, bias and
            residual are cast to autocast's dtype.
        weight: [N, C / groups, taps], of any such dtype; an fp32 weight of 16-bit inputs is rounded
            once, to its level, and gets an fp32 gradient.
        bias: [N], like x.
        stride: input frames between two output frames.
        padding: frames of zeros on both sides, ``(left, right)``, or ``"same"`` (stride 1).
        dilation: input frames between two taps.
        groups: groups of channels; divides C and N.
        quantizer: how the weight is fake-quantized, as the tap-major matrix
            [N, taps * C / groups] that ``low_bit_conv1d`` takes; None: not at all. Its scale is one
            for all, one a channel ([N]) or one a group of the matrix's columns.
        epilogue: as in ``low_bit_conv1d``.
        residual: [B, N_out, T_out], like x, added last.
        lengths: [B] int32 or int64, valid input frames of each utterance.

    Returns:
        [B, N_out, T_out], in the dtype of x, strides those of channel-last memory. Differentiable
        in x (0 beyond ``lengths``), weight, bias, residual and, but for ``"ste"``, the scale.

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
    """
    x, bias, residual = autocast(x, bias, residual)
    if weight.dim() != 3 or weight.numel() == 0:
        raise ValueError(
            f"weight must be [N, C / groups, taps] and not empty, got shape {tuple(weight.shape)}"
        )
    N, channels, taps = weight.shape
    check_dtype("x", x)
    check_dtype("weight", weight)
    check_epilogue(epilogue, N)
    geometry = make_geometry(x, N, channels * taps, stride, padding, dilation, groups)
    if geometry.kernel_size != taps or weight.device != x.device:
        raise ValueError(
            f"x must have groups * {channels} channels and weight's device {weight.device}, "
            f"got {x.shape[1]} channels in {groups} groups on {x.device}"
        )
    N_out, T_out = N // 2 if epilogue == "glu" else N, geometry.frames_out(x.shape[2])
    check_like("bias", bias, (N,), x.dtype, x)
    check_like("residual", residual, (x.shape[0], N_out, T_out), x.dtype, x)
    check_lengths(lengths, x)
    scale = None if quantizer is None else quantizer.scale
    if quantizer is not None:
        # the matrix's shape without its values, which would have to be copied
        check_quantizer(quantizer, "weight", weight.detach()[:, 0, :1].expand(-1, channels * taps))
        if scale is None:
            raise ValueError("scale must be given for a weight, got None")
    tensors = (x, weight, bias, residual, scale)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y: Tensor
    y, _, _ = torch.ops.lowbit.training_conv1d.default(
        x, weight, bias, residual, epilogue, save,
        lengths, stride, geometry.left, geometry.right, dilation, groups,
        *(FLOAT if quantizer is None else flatten(quantizer)),
    )  # fmt: skip
    return y
