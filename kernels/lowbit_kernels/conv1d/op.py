"""torch.ops.lowbit.conv1d and its training twin: schemas, fakes, backends, gradient.

Dimension key: B batch, C input channels, N output channels (N_out after ``glu``), T input frames,
T_out output frames. Results say [B, N, T_out] and lie in channel-last memory [B, T_out, N].
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.checks import autocast
from lowbit_kernels.conv1d.checks import check_geometry, check_tensors
from lowbit_kernels.conv1d.geometry import Geometry, Padding
from lowbit_kernels.conv1d.layout import channel_first, channel_last, empty_channel_last
from lowbit_kernels.conv1d.reference import conv1d_backward_reference, conv1d_reference
from lowbit_kernels.cpu import conv1d_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.op import PACKED, flatten
from lowbit_kernels.matmul.op import unpack as unpack_weight
from lowbit_kernels.matmul.reference import apply_epilogue

GEOMETRY = "int kernel_size, int stride, int left, int right, int dilation, int groups"
_FORWARD = (
    f"(Tensor x, Tensor? bias, Tensor? residual, Tensor? lengths, str? epilogue, {GEOMETRY}, "
    f"{PACKED})"
)
torch.library.define("lowbit::conv1d", f"{_FORWARD} -> Tensor")
torch.library.define("lowbit::conv1d_train", f"{_FORWARD} -> (Tensor y, Tensor preactivation)")
torch.library.define(
    "lowbit::conv1d_backward",
    "(Tensor grad_y, Tensor? preactivation, Tensor? lengths, str? epilogue, int C, SymInt T, "
    f"bool needs_x, bool needs_bias, {GEOMETRY}, {PACKED}) -> (Tensor dx, Tensor dbias)",
)


def _unpack(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an op, of which the last two become the geometry and the weight."""
    *first, weight = unpack_weight(args)
    return *first[:-6], Geometry(*first[-6:]), weight


@torch.library.register_fake("lowbit::conv1d")
def _fake(*args: Any) -> Tensor:
    x, _, _, _, epilogue, geometry, weight = _unpack(args)
    N = weight.N // 2 if epilogue == "glu" else weight.N
    return empty_channel_last(x, x.shape[0], N, geometry.frames_out(x.shape[2]))


@torch.library.register_fake("lowbit::conv1d_train")
def _fake_train(*args: Any) -> tuple[Tensor, Tensor]:
    x, *_, weight = _unpack(args)
    y = _fake(*args)
    return y, empty_channel_last(x, x.shape[0], weight.N, y.shape[2])


@torch.library.register_fake("lowbit::conv1d_backward")
def _fake_backward(*args: Any) -> tuple[Tensor, Tensor]:
    grad_y, _, _, _, C, T, needs_x, needs_bias, _, weight = _unpack(args)
    dx = empty_channel_last(grad_y, grad_y.shape[0], C, T) if needs_x else grad_y.new_empty(0)
    return dx, grad_y.new_empty(weight.N if needs_bias else 0)


def _cpu_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    epilogue: str | None,
    geometry: Geometry,
    weight: QuantizedWeight,
) -> Tensor:
    """[B, T_out, N_out] from x [B, C, T]."""
    if x.dtype == torch.float64:  # for checking gradients, so nothing but exactness counts
        y = conv1d_reference(x, weight, bias, geometry, epilogue, residual, lengths)
        return y.transpose(1, 2)
    return conv1d_cpu(
        channel_last(x), weight, bias, None if residual is None else residual.transpose(1, 2),
        epilogue, stride=geometry.stride, padding=(geometry.left, geometry.right),
        dilation=geometry.dilation, groups=geometry.groups, lengths=lengths,
    )  # fmt: skip


@torch.library.impl("lowbit::conv1d", "cpu")
def _cpu(*args: Any) -> Tensor:
    return channel_first(_cpu_forward(*_unpack(args)))


@torch.library.impl("lowbit::conv1d_train", "cpu")
def _cpu_train(*args: Any) -> tuple[Tensor, Tensor]:
    x, bias, residual, lengths, epilogue, geometry, weight = _unpack(args)
    z = _cpu_forward(x, bias, None, lengths, None, geometry, weight).contiguous()
    if weight.spec.deterministic:  # the bits of inference, whose activation is the kernel's
        y = _cpu_forward(x, bias, residual, lengths, epilogue, geometry, weight)
        return channel_first(y), channel_first(z)
    y = apply_epilogue(z, epilogue)
    if residual is not None:
        y = y + residual.transpose(1, 2)
    elif epilogue is None:  # the two outputs would be one tensor, which an op must not return
        y = y.clone()
    return channel_first(y), channel_first(z)


@torch.library.impl("lowbit::conv1d_backward", "cpu")
def _cpu_backward(*args: Any) -> tuple[Tensor, Tensor]:
    grad_y, z, lengths, epilogue, _, T, needs_x, needs_bias, geometry, weight = _unpack(args)
    dx, dbias = conv1d_backward_reference(grad_y, z, weight, geometry, T, epilogue, lengths)
    empty = grad_y.new_empty(0)
    dx = channel_first(dx.transpose(1, 2)) if needs_x else empty
    return dx, dbias if needs_bias else empty


def _cuda(*args: Any, want_preactivation: bool = False) -> tuple[Tensor, Tensor | None]:
    from lowbit_kernels.conv1d.cuda import conv1d_cuda

    x, bias, residual, lengths, epilogue, geometry, weight = _unpack(args)
    return conv1d_cuda(
        x, weight, bias, residual, lengths, geometry, epilogue,
        want_preactivation=want_preactivation,
    )  # fmt: skip


def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from lowbit_kernels.conv1d.cuda import conv1d_backward_cuda

    grad_y, z, lengths, epilogue, C, T, needs_x, needs_bias, geometry, weight = _unpack(args)
    return conv1d_backward_cuda(
        grad_y, z, weight, lengths, geometry, epilogue, C, T, needs_x, needs_bias
    )


implement_on_cuda("lowbit::conv1d", lambda *args: _cuda(*args)[0])
implement_on_cuda("lowbit::conv1d_train", lambda *args: _cuda(*args, want_preactivation=True))
implement_on_cuda("lowbit::conv1d_backward", _cuda_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _, _, lengths, ctx.epilogue, *rest = inputs
    preactivation = None
    if isinstance(output, tuple):
        preactivation = output[1]
        ctx.mark_non_differentiable(preactivation)
    # six of the geometry, five tensors of the weight
    ctx.save_for_backward(preactivation, lengths, *rest[6:11])
    ctx.geometry, ctx.constants, ctx.frames = rest[:6], rest[11:], x.shape[1:]
    ctx.set_materialize_grads(False)  # else backward allocates zeros for the pre-activation


def _backward(ctx: Any, grad_y: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
    needs_x, needs_bias, needs_residual = ctx.needs_input_grad[:3]
    dx = dbias = None
    if grad_y is not None and (needs_x or needs_bias):
        preactivation, lengths, *tensors = ctx.saved_tensors
        if ctx.epilogue is not None and preactivation is None:
            raise RuntimeError("lowbit::conv1d has no gradient with an epilogue: use conv1d_train")
        dx, dbias = torch.ops.lowbit.conv1d_backward.default(
            grad_y, preactivation, lengths, ctx.epilogue, *ctx.frames, needs_x, needs_bias,
            *ctx.geometry, *tensors, *ctx.constants,
        )  # fmt: skip
    return (
        dx if needs_x else None,
        dbias if needs_bias else None,
        grad_y if needs_residual else None,
        *(None,) * (len(ctx.needs_input_grad) - 3),
    )


for _op in ("lowbit::conv1d", "lowbit::conv1d_train"):
    torch.library.register_autograd(_op, _backward, setup_context=_setup_context)


def low_bit_conv1d(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = 0,
    dilation: int = 1,
    groups: int = 1,
    epilogue: str | None = None,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Convolve x with a low-bit weight, fused with bias, activation, padding mask and residual.

    Equivalent to ``epilogue(F.conv1d(x, W, bias, stride, padding, dilation, groups)) + residual``
    with W the dequantized weight and x zeroed from frame ``lengths[b]`` on. The weight's spec
    decides the arithmetic: with ``inputs=None`` it is floating point; with ``inputs="int8"`` the
    input is quantized to int8, one scale an utterance over its valid frames (or the weight's
    static ``input_scale``), and the products are exact integers.

    Memory is channel-last throughout: x is read as ``x.transpose(1, 2)``, copied only if its
    channels are not adjacent, and the result lies in memory [B, T_out, N_out], so chained layers
    never transpose.

    Under autocast x, bias and residual are cast to the autocast dtype, as ``F.conv1d`` does.
    Gradients flow to x, bias and residual; the weight is frozen and the rounding of int8 inputs is
    passed straight through.

    Args:
        x: [B, C, T], fp16, bf16 or fp32 (fp64 on a CPU, for checking gradients); any strides.
        weight: [N, taps * C / groups], tap-major; or depthwise with ``groups == C == N``.
        bias: [N], in the dtype of x.
        stride: input frames between two output frames.
        padding: frames of zeros on both sides, ``(left, right)``, or ``"same"`` (stride 1).
        dilation: input frames between two taps.
        groups: groups of channels; divides C and N.
        epilogue: ``None``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"relu"`` or ``"glu"``
            (channel n gated by channel n + N / 2: N_out = N / 2; elsewhere N_out = N).
        residual: [B, N_out, T_out], in the dtype of x, added last.
        lengths: [B] int32 or int64, valid input frames of each utterance.

    Returns:
        [B, N_out, T_out], in the dtype of x, strides those of channel-last memory.

    Raises:
        ValueError: for an argument of a wrong shape, dtype, device or value.
        NotImplementedError: for weights whose inputs are quantized to something else than int8.
    """
    x, bias, residual = autocast(x, bias, residual)
    geometry = check_geometry(x, weight, stride, padding, dilation, groups)
    check_tensors(x, weight, bias, residual, lengths, geometry, epilogue)
    args = (
        x, bias, residual, lengths, epilogue,
        geometry.kernel_size, stride, geometry.left, geometry.right, dilation, groups,
        *flatten(weight),
    )  # fmt: skip
    y: Tensor
    needs_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    if epilogue is not None and torch.is_grad_enabled() and needs_grad:
        y, _ = torch.ops.lowbit.conv1d_train.default(*args)
    else:
        y = torch.ops.lowbit.conv1d.default(*args)
    return y
