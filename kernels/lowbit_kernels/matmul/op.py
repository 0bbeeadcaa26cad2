"""torch.ops.lowbit.linear: schema, validation, fakes, backends and gradient.

Dimension key: M rows of the input, N output features, K input features, N_out N / 2 with ``glu``
and N without.

Tensors of a quantized weight travel flat through the schemas, as ``PACKED`` lists them.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.checks import (
    autocast,
    check_dtype,
    check_epilogue,
    check_input,
    check_like,
    check_weight_inputs,
    output_shape,
)
from lowbit_kernels.cpu.linear import linear_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.formats import QuantizedWeight, QuantSpec
from lowbit_kernels.matmul.reference import (
    apply_epilogue,
    input_scale_rows,
    linear_backward_reference,
    linear_reference,
)

INPUTS = (None, "int8", "fp8")

PACKED = (
    "Tensor qweight, Tensor scale, Tensor? group_scale, Tensor? zero_point, Tensor? input_scale, "
    "int K, int bits, int group_size, str? inputs, str input_scale_kind, bool deterministic"
)
_INPUTS = "Tensor x, Tensor? bias, Tensor? residual, str? epilogue, "

torch.library.define("lowbit::linear", f"({_INPUTS}{PACKED}) -> Tensor")
torch.library.define(
    "lowbit::linear_train", f"({_INPUTS}{PACKED}) -> (Tensor y, Tensor preactivation)"
)
torch.library.define(
    "lowbit::linear_backward",
    "(Tensor grad_y, Tensor? preactivation, str? epilogue, bool needs_bias_grad, "
    f"{PACKED}) -> (Tensor dx, Tensor dbias)",
)


def flatten(weight: QuantizedWeight) -> tuple[Any, ...]:
    """The arguments that ``PACKED`` lists."""
    spec = weight.spec
    return (
        weight.qweight, weight.scale, weight.group_scale, weight.zero_point, weight.input_scale,
        weight.K, spec.bits, spec.group, spec.inputs, spec.input_scale, spec.deterministic,
    )  # fmt: skip


@functools.cache
def _spec(
    bits: int, group_size: int, symmetric: bool, inputs: str | None, input_scale: str, fixed: bool
) -> QuantSpec:
    return QuantSpec(bits, group_size or None, symmetric, inputs, input_scale, fixed)


def unpack(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an op, of which the last becomes the weight that ``flatten`` took apart."""
    (
        qweight, scale, group_scale, zero_point, input_scale,
        K, bits, group_size, inputs, input_scale_kind, deterministic,
    ) = args[-11:]  # fmt: skip
    spec = _spec(bits, group_size, zero_point is None, inputs, input_scale_kind, deterministic)
    weight = QuantizedWeight(qweight, scale, group_scale, zero_point, K, spec, input_scale)
    return *args[:-11], weight


def empty_output(
    x: Tensor, N: int, epilogue: str | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Uninitialized [..., N_out] for x [..., K]."""
    return x.new_empty(output_shape(x, N, epilogue), dtype=dtype)


@torch.library.register_fake("lowbit::linear")
def _fake(*args: Any) -> Tensor:
    x, _, _, epilogue, weight = unpack(args)
    return empty_output(x, weight.N, epilogue)


@torch.library.register_fake("lowbit::linear_train")
def _fake_train(*args: Any) -> tuple[Tensor, Tensor]:
    x, _, _, epilogue, weight = unpack(args)
    return empty_output(x, weight.N, epilogue), empty_output(x, weight.N, None)


@torch.library.register_fake("lowbit::linear_backward")
def _fake_backward(*args: Any) -> tuple[Tensor, Tensor]:
    grad_y, _, _, needs_bias_grad, weight = unpack(args)
    dx = grad_y.new_empty(*grad_y.shape[:-1], weight.K)
    return dx, grad_y.new_empty(weight.N if needs_bias_grad else 0)


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


def _cpu_forward(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
) -> Tensor:
    """[..., N_out], or its rows, from x [..., K]."""
    spec, scale_rows = weight.spec, None
    if spec.inputs is not None and spec.input_scale != "token":
        scale_rows = input_scale_rows(x, spec.input_scale, weight.input_scale, spec.inputs)
    is_fp8 = spec.inputs == "fp8"
    if is_fp8 and spec.deterministic and epilogue not in (None, "relu"):
        raise NotImplementedError(
            "deterministic=True with inputs='fp8' serves epilogues None and 'relu' on a CPU, "
            f"got {epilogue!r}: use inputs='int8'"
        )
    # no processor multiplies fp8, and fp64 is for checking gradients: nothing but exactness counts
    if is_fp8 or x.dtype == torch.float64:
        rows, residual = x.reshape(-1, x.shape[-1]), _rows(residual)
        return linear_reference(rows, weight, bias, residual, epilogue, x_scale_rows=scale_rows)
    return linear_cpu(x, weight, bias, residual, epilogue, x_scale_rows=scale_rows)


@torch.library.impl("lowbit::linear", "cpu")
def _cpu(*args: Any) -> Tensor:
    x, bias, residual, epilogue, weight = unpack(args)
    y = _cpu_forward(x, weight, bias, residual, epilogue)
    # a view would refuse to be written into by whoever gets it
    out: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
    return out


@torch.library.impl("lowbit::linear_train", "cpu")
def _cpu_train(*args: Any) -> tuple[Tensor, Tensor]:
    x, bias, residual, epilogue, weight = unpack(args)
    z = _cpu_forward(x, weight, bias, None, None).view(*x.shape[:-1], weight.N)
    if weight.spec.deterministic:  # the bits of inference, whose activation is the kernel's
        y = _cpu_forward(x, weight, bias, residual, epilogue)
        return y.view(*x.shape[:-1], y.shape[-1]), z
    # without an epilogue the two outputs would be one tensor, which an op must not return
    y = z.clone() if epilogue is None else apply_epilogue(z, epilogue)
    return y if residual is None else y + residual, z


@torch.library.impl("lowbit::linear_backward", "cpu")
def _cpu_backward(*args: Any) -> tuple[Tensor, Tensor]:
    grad_y, preactivation, epilogue, needs_bias_grad, weight = unpack(args)
    dy = grad_y.reshape(-1, grad_y.shape[-1])
    dx, dbias = linear_backward_reference(dy, _rows(preactivation), weight, epilogue)
    dbias = dbias if needs_bias_grad else grad_y.new_empty(0)
    return dx.view(*grad_y.shape[:-1], weight.K), dbias


def _cuda(*args: Any) -> Tensor:
    # imported on first use, so that `import lowbit_kernels` needs no GPU and no Triton
    from lowbit_kernels.matmul.cuda import linear_cuda

    x, bias, residual, epilogue, weight = unpack(args)
    return linear_cuda(x, weight, bias, residual, epilogue)[0]


def _cuda_train(*args: Any) -> tuple[Tensor, Tensor]:
    from lowbit_kernels.matmul.cuda import linear_cuda

    x, bias, residual, epilogue, weight = unpack(args)
    y, z = linear_cuda(x, weight, bias, residual, epilogue, want_preactivation=True)
    assert z is not None, "asked for"
    return y, z


def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from lowbit_kernels.matmul.cuda import linear_backward_cuda

    grad_y, preactivation, epilogue, needs_bias_grad, weight = unpack(args)
    return linear_backward_cuda(grad_y, preactivation, weight, epilogue, needs_bias_grad)


implement_on_cuda("lowbit::linear", _cuda)
implement_on_cuda("lowbit::linear_train", _cuda_train)
implement_on_cuda("lowbit::linear_backward", _cuda_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.epilogue, packed = inputs[3], inputs[4:]
    # linear has no pre-activation to save; without an epilogue its gradient needs none
    preactivation = None
    if isinstance(output, tuple):
        preactivation = output[1]
        ctx.mark_non_differentiable(preactivation)
    ctx.save_for_backward(preactivation, *packed[:5])
    ctx.constants = packed[5:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
    frozen = (None,) * 12
    if grad_y is None:
        return (None, None, None, *frozen)
    needs_x, needs_bias, needs_residual = ctx.needs_input_grad[:3]
    dx = dbias = None
    if needs_x or needs_bias:
        preactivation, *tensors = ctx.saved_tensors
        if ctx.epilogue is not None and preactivation is None:
            raise RuntimeError("lowbit::linear has no gradient with an epilogue: use linear_train")
        dx, dbias = torch.ops.lowbit.linear_backward.default(
            grad_y, preactivation, ctx.epilogue, needs_bias, *tensors, *ctx.constants
        )
    return (
        dx if needs_x else None,
        dbias if needs_bias else None,
        grad_y if needs_residual else None,
        *frozen,
    )


for _op in ("lowbit::linear", "lowbit::linear_train"):
    torch.library.register_autograd(_op, _backward, setup_context=_setup_context)


def check_weight(weight: QuantizedWeight, epilogue: str | None) -> None:
    """Refuse a weight, or an epilogue, that no linear layer computes with."""
    if not isinstance(weight, QuantizedWeight):
        raise ValueError(f"weight must be a QuantizedWeight, got {type(weight).__name__}")
    if weight.is_depthwise:
        raise ValueError(
            "weight must be packed [N, K], got a depthwise convolution's "
            f"{list(weight.qweight.shape)} levels (low_bit_conv1d takes them)"
        )
    check_weight_inputs(weight, INPUTS)
    check_epilogue(epilogue, weight.qweight.shape[0])


def low_bit_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    epilogue: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiply x by a quantized weight, then add a bias, apply an activation, add a residual.

    Equivalent to ``epilogue(F.linear(x, weight.dequantize(x.dtype), bias)) + residual``, without
    storing the dequantized weight. Where ``weight.spec.inputs`` is ``"int8"`` the rows of x are
    quantized first and the products are exact integers.

    With ``"fp8"`` the rows of x, scaled to a largest magnitude of 448, and the weight's integers
    are rounded to float8 e4m3: integers up to 16 exactly, so all of ungrouped weights of 4, 2 and 1
    bits, others by at most 1/16 of themselves. Needs an NVIDIA GPU of capability 8.9 or later. On
    8.9 and 9.0 a sum keeps about 14 bits as it grows over K: in a model of that arithmetic its
    error was 0.1 % of the largest output at K = 1024 and 0.3 % at 4096: a tenth of what rounding x
    costs, but more than fp16 results (from about K = 3000) and fp32 results hold. A CPU computes
    the exact sums in fp64, slowly.

    Args:
        x: [..., K], fp16, bf16 or fp32 (fp64 on a CPU). Under autocast x, bias and residual are
            cast to autocast's dtype.
        weight: [N, K]; its spec decides the arithmetic. The scale of quantized inputs is one a row
            (``"token"``), one an utterance ``x[b]`` (``"utterance"``; a matrix is one utterance),
            or ``weight.input_scale`` (``"static"``).
        bias: [N], like x.
        epilogue: None, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"relu"`` or ``"glu"``; the last
            multiplies feature n by the sigmoid of feature n + N / 2.
        residual: [..., N] ([..., N / 2] with ``"glu"``), like x.

    Returns:
        [..., N] ([..., N / 2] with ``"glu"``), in the dtype of x. Differentiable in x, bias and
        residual; quantized inputs pass the gradient straight through.

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
        NotImplementedError: where ``weight.spec.inputs`` is none of None, ``"int8"`` and
            ``"fp8"``, or ``"fp8"`` on a GPU without it.
    """
    check_weight(weight, epilogue)
    x, bias, residual = autocast(x, bias, residual)
    check_dtype("x", x)
    check_input(x, weight.K, weight.qweight)
    N = weight.qweight.shape[0]
    check_like("bias", bias, (N,), x.dtype, x)
    if residual is not None:
        check_like("residual", residual, output_shape(x, N, epilogue), x.dtype, x)
    y: Tensor
    if (
        epilogue is not None
        and torch.is_grad_enabled()
        and (x.requires_grad or (bias is not None and bias.requires_grad))
    ):
        y, _ = torch.ops.lowbit.linear_train.default(x, bias, residual, epilogue, *flatten(weight))
    else:
        y = torch.ops.lowbit.linear.default(x, bias, residual, epilogue, *flatten(weight))
    return y
