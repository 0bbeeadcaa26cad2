"""torch.ops.lowbit.depthwise_conv1d_norm: the middle of a Conformer's convolution module.

Dimension key: B batch, C channels, T input frames, T_out output frames. All tensors are
channel-last, [B, T, C].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.checks import check_dtype, check_lengths, check_like
from lowbit_kernels.conv1d.geometry import Geometry, Padding, resolve_padding
from lowbit_kernels.conv1d.reference import mask_frames
from lowbit_kernels.cpu import conv1d_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.formats import QuantizedWeight, QuantSpec
from lowbit_kernels.matmul.reference import apply_epilogue, int8_scale, quantize_rows
from lowbit_kernels.norm.checks import check_activation, check_parameter

# channels that one program of the GPU's kernel holds, where the end needs all of a frame
MAX_CHANNELS = 1024

torch.library.define(
    "lowbit::depthwise_conv1d_norm",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, Tensor? lengths, Tensor? input_scale, Tensor? out_scale, "
    "int left, int right, str? epilogue, bool int8_inputs, bool int8_rows, ScalarType dtype) "
    "-> (Tensor y, Tensor y_scale)",
)


def _outputs(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    x, weight, left, right, int8_rows, dtype = *args[:2], *args[10:12], *args[14:]
    T_out = Geometry(weight.shape[0], 1, left, right).frames_out(x.shape[1])
    out_dtype = torch.int8 if int8_rows or args[9] is not None else dtype
    y = x.new_empty(x.shape[0], T_out, x.shape[2], dtype=out_dtype)
    shape = (x.shape[0], T_out, 1) if int8_rows else (0,)
    return y, x.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("lowbit::depthwise_conv1d_norm")
def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return _outputs(args)


def depthwise_conv1d_norm_reference(*args: Any) -> tuple[Tensor, Tensor]:
    """What the op means, in the order of its schema; fp32 arithmetic, fp64 for fp64."""
    (
        x, weight, scale, bias, norm_weight, norm_bias, eps, lengths, input_scale, out_scale,
        left, right, epilogue, int8_inputs, int8_rows, dtype,
    ) = args  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    normed = norm_weight is not None
    if not x.is_floating_point():
        x = x.to(wide) * input_scale.view(x.shape[0], -1, 1)
    if not weight.is_floating_point() and wide == torch.float32:
        static = int8_inputs and input_scale is not None
        spec = QuantSpec(8, None, inputs="int8" if int8_inputs else None,
                         input_scale="static" if static else "utterance")  # fmt: skip
        packed = QuantizedWeight(
            weight, scale, None, None, weight.shape[0], spec, input_scale if static else None
        )
        z = conv1d_cpu(
            x.float(), packed, bias, None, None if normed else epilogue, padding=(left, right),
            groups=x.shape[2], lengths=lengths,
        )  # fmt: skip
    else:
        z = mask_frames(x.to(wide).transpose(1, 2), lengths)
        z = F.conv1d(F.pad(z, (left, right)), weight.to(wide).t()[:, None], groups=x.shape[2])
        z = z.transpose(1, 2) if scale is None else z.transpose(1, 2) * scale
        z = z if bias is None else z + bias
        z = z if normed else apply_epilogue(z, epilogue)
    if normed:
        z = F.layer_norm(z, z.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), eps)
        z = apply_epilogue(z, epilogue)
    y, y_scale = z.to(dtype), z.new_empty(0, dtype=torch.float32)
    rows = y.flatten(0, 1)
    if int8_rows:
        y_scale = int8_scale(rows.abs().amax(-1)).view(*y.shape[:2], 1)
        y = quantize_rows(rows, y_scale.flatten()).view(y.shape)
    elif out_scale is not None:
        y = quantize_rows(rows, out_scale.expand(len(rows))).view(y.shape)
    return y.contiguous(), y_scale


torch.library.impl("lowbit::depthwise_conv1d_norm", "cpu", depthwise_conv1d_norm_reference)


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from lowbit_kernels.conv1d.kernels.depthwise import depthwise_conv1d_triton
    from lowbit_kernels.conv1d.kernels.frames import quantize_frames_triton

    (
        x, weight, scale, bias, norm_weight, norm_bias, eps, lengths, input_scale, out_scale,
        left, right, epilogue, int8_inputs, int8_rows, dtype,
    ) = args  # fmt: skip
    geometry = Geometry(weight.shape[0], 1, left, right, 1, x.shape[2])
    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    if int8_inputs:
        x, input_scale = quantize_frames_triton(x, input_scale, lengths, geometry, pad=False)
        lengths = None  # the padded integers are zeros already
    y, y_scale = _outputs(args)
    depthwise_conv1d_triton(
        x, weight, bias, None, lengths, geometry, epilogue, y, None, input_scale, scale=scale,
        norm=None if norm_weight is None else (norm_weight, norm_bias, eps), dtype=dtype,
        out_scale=out_scale, y_scale=y_scale if int8_rows else None,
    )  # fmt: skip
    return y, y_scale


implement_on_cuda("lowbit::depthwise_conv1d_norm", _cuda)


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("lowbit::depthwise_conv1d_norm has no gradient: it is for inference")


torch.library.register_autograd("lowbit::depthwise_conv1d_norm", _no_backward)


def depthwise_conv1d_norm(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    bias: Tensor | None = None,
    *,
    padding: Padding = "same",
    scale: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    epilogue: str | None = None,
    lengths: Tensor | None = None,
    input_scale: Tensor | None = None,
    int8_rows: bool = False,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution, normalization, activation and quantization in one pass.

    Equivalent to ``epilogue(layer_norm(conv1d(x) * scale + bias))`` with x zeroed from frame
    ``lengths[b]`` on. A BatchNorm in inference is in ``scale`` and ``bias``. For inference: it has
    no gradient. Where a quantized weight's spec says ``inputs="int8"``, a floating-point x is
    quantized first, by one scale an utterance or the weight's static one (on a GPU by kernels of
    their own).

    Args:
        x: [B, T, C], fp16, bf16 or fp32 (fp64 on a CPU), or int8 with ``input_scale``.
        weight: depthwise, of C channels; or a tensor [taps, C] of any floating dtype.
        bias: [C], fp32.
        padding: frames of zeros on both sides, ``(left, right)``, or ``"same"``.
        scale: [C] fp32, in place of a quantized weight's own, or a factor of the result.
        norm: weight [C], bias [C] and eps of a LayerNorm over channels. None: none.
        epilogue: None, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"relu"``.
        lengths: [B] int32 or int64, the valid input frames.
        input_scale: fp32, of an int8 x, whose padding holds any integers: [B], or [B, T].
        int8_rows: the result is quantized as ``quantize_rows`` quantizes its rounding to
            ``dtype``, by a scale a frame.
        out_scale: [] fp32: the same by one scale of all.
        dtype: of the result, that of a floating-point x by default.

    Returns:
        y: [B, T_out, C] of ``dtype``, or int8 in [-127, 127].
        y_scale: [B, T_out, 1] fp32 with ``int8_rows``, NaN for a frame that is not finite; else
            [0].

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
        NotImplementedError: on a GPU, for ``norm`` or ``int8_rows`` with more than 1024 channels.
        RuntimeError: where a gradient is asked for.
    """
    quantized = isinstance(weight, QuantizedWeight)
    levels = weight.qweight if isinstance(weight, QuantizedWeight) else weight
    if x.dim() != 3 or levels.dim() != 2 or levels.shape[1] != x.shape[-1] or x.shape[-1] == 0:
        raise ValueError(
            "x must be [B, T, C] and weight [taps, C] with C >= 1, "
            f"got {list(x.shape)} and {list(levels.shape)}"
        )
    C, int8_inputs = x.shape[2], False
    if isinstance(weight, QuantizedWeight):
        if not weight.is_depthwise:
            raise ValueError("weight must be depthwise, got one that is packed")
        scale = weight.scale if scale is None else scale
        int8_inputs = weight.spec.inputs is not None and x.is_floating_point()
        if int8_inputs and weight.spec.input_scale == "static":
            input_scale = weight.input_scale
    elif not levels.is_floating_point():
        raise ValueError(f"weight must be quantized or floating point, got {levels.dtype}")
    if x.dtype == torch.int8:
        if input_scale is None or input_scale.shape not in ((x.shape[0],), x.shape[:2]):
            raise ValueError(
                f"input_scale must be [B] or [B, T] for x of {list(x.shape)}, got "
                f"{None if input_scale is None else list(input_scale.shape)}"
            )
    else:
        check_dtype("x", x)
        if input_scale is not None and not int8_inputs:
            raise ValueError(f"input_scale is for an int8 x, got one with x of {x.dtype}")
    dtype = x.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    check_activation(epilogue)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in (("scale", scale), ("bias", bias)):
        check_like(name, tensor, (C,), torch.float32 if quantized else wide, x)
    check_like("weight", levels, tuple(levels.shape), levels.dtype, x)
    check_like("out_scale", out_scale, (), torch.float32, x)
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    for name, tensor in (("norm's weight", norm_weight), ("norm's bias", norm_bias)):
        if tensor is not None:
            check_parameter(name, tensor, x, C)
    if int8_rows and out_scale is not None:
        raise ValueError("out_scale must be None with int8_rows, got both")
    check_lengths(lengths, x)
    if x.is_cuda and C > MAX_CHANNELS and (norm is not None or int8_rows):
        raise NotImplementedError(
            f"on a GPU, norm and int8_rows serve up to {MAX_CHANNELS} channels, got {C}"
        )
    left, right = resolve_padding(padding, levels.shape[0], 1, 1)
    if x.shape[1] + left + right < levels.shape[0]:
        raise ValueError(
            f"x must have at least {levels.shape[0]} frames, padding included, "
            f"got {x.shape[1]} + {left} + {right}"
        )
    y, y_scale = torch.ops.lowbit.depthwise_conv1d_norm.default(
        x, levels, scale, bias, norm_weight, norm_bias, eps, lengths, input_scale, out_scale,
        left, right, epilogue, int8_inputs, int8_rows, dtype,
    )  # fmt: skip
    return y, y_scale
