"""torch.ops.lowbit.conv1d and its training twin: schemas, fakes, backends, gradient.

Dimension key: B batch, C input channels, N output channels (N_out after ``glu``), T input frames,
T_out output frames. Results say [B, N, T_out] and lie in channel-last memory [B, T_out, N].
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.conv1d.checks import check_geometry, check_tensors
from lowbit_kernels.conv1d.geometry import Geometry, Padding
from lowbit_kernels.conv1d.layout import channel_first, channel_last, empty_channel_last
from lowbit_kernels.conv1d.reference import conv1d_backward_reference, conv1d_reference
from lowbit_kernels.cpu import conv1d_cpu
from lowbit_kernels.device import on_device
from lowbit_kernels.formats import QuantizedWeight, QuantSpec
from lowbit_kernels.matmul.reference import apply_epilogue

_WEIGHT = "Tensor qweight, Tensor scale, Tensor? group_scale, Tensor? zero_point"
_FORMAT = "int bits, int group_size, str? inputs, bool deterministic"
_GEOMETRY = "int kernel_size, int stride, int left, int right, int dilation, int groups"
_FORWARD = (
    f"(Tensor x, {_WEIGHT}, Tensor? input_scale, Tensor? bias, Tensor? residual, "
    f"Tensor? lengths, {_FORMAT}, {_GEOMETRY}, str? epilogue)"
)
torch.library.define("lowbit::conv1d", f"{_FORWARD} -> Tensor")
torch.library.define("lowbit::conv1d_train", f"{_FORWARD} -> (Tensor y, Tensor preactivation)")
torch.library.define(
    "lowbit::conv1d_backward",
    f"(Tensor grad_y, Tensor? preactivation, {_WEIGHT}, Tensor? lengths, {_FORMAT}, {_GEOMETRY}, "
    "str? epilogue, int C, SymInt T, bool needs_x, bool needs_bias) -> (Tensor dx, Tensor dbias)",
)


@cache
def _spec(
    bits: int,
    group_size: int,
    symmetric: bool,
    inputs: str | None,
    deterministic: bool,
    static: bool,
) -> QuantSpec:
    input_scale = "static" if static else "utterance"
    return QuantSpec(bits, group_size or None, symmetric, inputs, input_scale, deterministic)


def _weight(
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    zero_point: Tensor | None,
    input_scale: Tensor | None,
    K: int,
    bits: int,
    group_size: int,
    inputs: str | None,
    deterministic: bool,
) -> QuantizedWeight:
    """The weight whose tensors travelled through the op's flat schema."""
    symmetric, static = zero_point is None, input_scale is not None
    spec = _spec(bits, group_size, symmetric, inputs, deterministic, static)
    return QuantizedWeight(qweight, scale, group_scale, zero_point, K, spec, input_scale)


def _unpack_forward(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The flat arguments as x, weight, bias, residual, lengths, geometry, epilogue."""
    x, qweight, scale, group_scale, zero_point, input_scale, bias, residual, lengths = args[:9]
    format_args, geometry, epilogue = args[9:13], Geometry(*args[13:19]), args[19]
    K = geometry.kernel_size * (x.shape[1] // geometry.groups)
    weight = _weight(qweight, scale, group_scale, zero_point, input_scale, K, *format_args)
    return x, weight, bias, residual, lengths, geometry, epilogue


def _unpack_backward(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The flat arguments as grad_y, preactivation, weight, lengths, geometry, and the last five."""
    grad_y, preactivation, qweight, scale, group_scale, zero_point, lengths = args[:7]
    format_args, geometry = args[7:11], Geometry(*args[11:17])
    epilogue, C, T, needs_x, needs_bias = args[17:]
    K = geometry.kernel_size * (C // geometry.groups)
    weight = _weight(qweight, scale, group_scale, zero_point, None, K, *format_args)
    return (
        grad_y, preactivation, weight, lengths, geometry, epilogue, C, T, needs_x, needs_bias,
    )  # fmt: skip


@torch.library.register_fake("lowbit::conv1d")
def _fake(*args: Any) -> Tensor:
    x, weight, _, _, _, geometry, epilogue = _unpack_forward(args)
    N = weight.N // 2 if epilogue == "glu" else weight.N
    return empty_channel_last(x, x.shape[0], N, geometry.frames_out(x.shape[2]))


@torch.library.register_fake("lowbit::conv1d_train")
def _fake_train(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, *_ = _unpack_forward(args)
    y = _fake(*args)
    return y, empty_channel_last(x, x.shape[0], weight.N, y.shape[2])


@torch.library.register_fake("lowbit::conv1d_backward")
def _fake_backward(*args: Any) -> tuple[Tensor, Tensor]:
    grad_y, _, weight, *_, C, T, needs_x, needs_bias = _unpack_backward(args)
    dx = empty_channel_last(grad_y, grad_y.shape[0], C, T) if needs_x else grad_y.new_empty(0)
    return dx, grad_y.new_empty(weight.N if needs_bias else 0)


def _cpu_forward(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    geometry: Geometry,
    epilogue: str | None,
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
    return channel_first(_cpu_forward(*_unpack_forward(args)))


@torch.library.impl("lowbit::conv1d_train", "cpu")
def _cpu_train(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, bias, residual, lengths, geometry, epilogue = _unpack_forward(args)
    z = _cpu_forward(x, weight, bias, None, lengths, geometry, None).contiguous()
    if weight.spec.deterministic:  # the bits of inference, whose activation is the kernel's
        y = _cpu_forward(x, weight, bias, residual, lengths, geometry, epilogue)
        return channel_first(y), channel_first(z)
    y = apply_epilogue(z, epilogue)
    if residual is not None:
        y = y + residual.transpose(1, 2)
    elif epilogue is None:  # the two outputs would be one tensor, which an op must not return
        y = y.clone()
    return channel_first(y), channel_first(z)


@torch.library.impl("lowbit::conv1d_backward", "cpu")
def _cpu_backward(*args: Any) -> tuple[Tensor, Tensor]:
    (
        grad_y, preactivation, weight, lengths, geometry, epilogue, _, T, needs_x, needs_bias,
    ) = _unpack_backward(args)  # fmt: skip
    dx, dbias = conv1d_backward_reference(
        grad_y, preactivation, weight, geometry, T, epilogue, lengths
    )
    empty = grad_y.new_empty(0)
    dx = channel_first(dx.transpose(1, 2)) if needs_x else empty
    return dx, dbias if needs_bias else empty


@torch.library.impl("lowbit::conv1d", "cuda")
def _cuda(*args: Any) -> Tensor:
    y: Tensor
    # imported on first use, so that `import lowbit_kernels` needs no GPU and no Triton
    from lowbit_kernels.conv1d.cuda import conv1d_cuda

    with on_device(args[0]):
        y, _ = conv1d_cuda(*_unpack_forward(args))
    return y


@torch.library.impl("lowbit::conv1d_train", "cuda")
def _cuda_train(*args: Any) -> tuple[Tensor, Tensor]:
    from lowbit_kernels.conv1d.cuda import conv1d_cuda

    with on_device(args[0]):
        y, preactivation = conv1d_cuda(*_unpack_forward(args), want_preactivation=True)
    assert preactivation is not None, "it was asked for"
    return y, preactivation


@torch.library.impl("lowbit::conv1d_backward", "cuda")
def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from lowbit_kernels.conv1d.cuda import conv1d_backward_cuda

    with on_device(args[0]):
        dx, dbias = conv1d_backward_cuda(*_unpack_backward(args))
    return dx, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, qweight, scale, group_scale, zero_point, _, _, _, lengths, *rest = inputs
    preactivation = None
    if isinstance(output, tuple):
        preactivation = output[1]
        ctx.mark_non_differentiable(preactivation)
    ctx.save_for_backward(preactivation, qweight, scale, group_scale, zero_point, lengths)
    ctx.set_materialize_grads(False)  # else backward allocates zeros for the pre-activation
    ctx.epilogue, ctx.options = rest[-1], (*rest, x.shape[1], x.shape[2])


def _backward(ctx: Any, grad_y: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 20
    needs_x, needs_bias, needs_residual = (ctx.needs_input_grad[i] for i in (0, 6, 7))
    if grad_y is not None and (needs_x or needs_bias):
        if ctx.epilogue is not None and ctx.saved_tensors[0] is None:
            raise RuntimeError("lowbit::conv1d has no gradient with an epilogue: use conv1d_train")
        dx, dbias = torch.ops.lowbit.conv1d_backward.default(
            grad_y, *ctx.saved_tensors, *ctx.options, needs_x, needs_bias
        )
        grads[0], grads[6] = dx if needs_x else None, dbias if needs_bias else None
    grads[7] = grad_y if needs_residual else None
    return tuple(grads)


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
    x, bias, residual = _autocast(x, bias, residual)
    geometry = check_geometry(x, weight, stride, padding, dilation, groups)
    check_tensors(x, weight, bias, residual, lengths, geometry, epilogue)
    spec = weight.spec
    args = (
        x, weight.qweight, weight.scale, weight.group_scale, weight.zero_point,
        weight.input_scale if spec.input_scale == "static" else None,
        bias, residual, lengths, spec.bits, spec.group, spec.inputs, spec.deterministic,
        geometry.kernel_size, stride, geometry.left, geometry.right, dilation, groups, epilogue,
    )  # fmt: skip
    y: Tensor
    needs_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    if epilogue is not None and torch.is_grad_enabled() and needs_grad:
        y, _ = torch.ops.lowbit.conv1d_train.default(*args)
    else:
        y = torch.ops.lowbit.conv1d.default(*args)
    return y


def _autocast(
    x: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, bias, residual
    dtype = torch.get_autocast_dtype(device)
    bias = None if bias is None else bias.to(dtype)
    return x.to(dtype), bias, None if residual is None else residual.to(dtype)
