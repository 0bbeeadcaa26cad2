"""What a low-bit linear layer means, in plain PyTorch.

Dimension key: M rows of the input, N output features, K input features. A ``glu`` epilogue halves
the output: N_out is N / 2 there and N elsewhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.formats import QuantizedWeight

aten = torch.ops.aten

INT8_MAX = 127

# the smallest normal fp32 number: a silent row gets a scale whose reciprocal is finite
MIN_INPUT_SCALE = 2.0**-126


def linear_reference(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    *,
    x_scale_rows: Tensor | None = None,
) -> Tensor:
    """``epilogue(x @ W.T + bias) + residual`` by the arithmetic that ``weight.spec`` names.

    Args:
        x: [M, K], floating point.
        weight: [N, K].
        bias: [N].
        residual: [M, N_out].
        epilogue: ``None``, gelu, gelu_tanh, silu, relu or glu.
        x_scale_rows: [M] fp32, the scale of each row's int8 input. None: a row's own.

    Returns:
        [M, N_out], in the dtype of x.
    """
    y = apply_epilogue(preactivation_reference(x, weight, bias, x_scale_rows), epilogue)
    return y if residual is None else y + residual


def preactivation_reference(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, x_scale_rows: Tensor | None = None
) -> Tensor:
    """``x @ W.T + bias``, [M, N], in the dtype of x [M, K]."""
    if weight.spec.inputs is None:
        return F.linear(x, weight.dequantize(x.dtype), bias)
    if x_scale_rows is None:
        x_scale_rows = input_scale_rows(x, "token", None)
    # integers below 2 ** 53 are exact in float64, and so are their sums
    sums = quantize_rows(x, x_scale_rows).double() @ weight.integers().double().t()
    wide = torch.promote_types(x.dtype, torch.float32)
    z = sums.to(wide) * (x_scale_rows[:, None] * weight.scale).to(wide)
    return (z if bias is None else z + bias.to(wide)).to(x.dtype)


def input_scale_rows(x: Tensor, kind: str, static_scale: Tensor | None) -> Tensor:
    """The scale of the int8 input of each row: fp32 [M], M the rows of x [..., K].

    Args:
        x: [..., K], floating point.
        kind: ``"token"``: each row has its own; ``"utterance"``: the rows of ``x[b]`` share one
            (all rows, where x has fewer than three dimensions); ``"static"``: all have
            ``static_scale``.
        static_scale: [] fp32, for ``"static"``.
    """
    rows = x.shape[:-1]
    if kind == "static":
        assert static_scale is not None, "op.py asks for it"
        return static_scale.float().expand(rows.numel()).contiguous()
    if x.numel() == 0:
        return torch.full((rows.numel(),), MIN_INPUT_SCALE, device=x.device)
    if kind == "token":
        largest = x.abs().amax(-1)
    else:
        largest = x.abs().amax(tuple(range(1 if x.dim() >= 3 else 0, x.dim())), keepdim=True)[
            ..., 0
        ]
    return int8_scale(largest).expand(rows).flatten().contiguous()


def int8_scale(largest: Tensor) -> Tensor:
    """The fp32 scale of int8 values up to the magnitude ``largest``: the same on every device.

    NaN where the magnitude is NaN or infinite: what is computed from such a row is NaN.
    """
    # CUDA divides by a number through its reciprocal, an ulp off, and by a tensor correctly
    divisor = torch.full_like(largest, INT8_MAX, dtype=torch.float32)
    scale = (largest.float() / divisor).clamp_min(MIN_INPUT_SCALE)
    return scale.masked_fill(largest.isinf(), torch.nan)


def quantize_rows(x: Tensor, scale_rows: Tensor) -> Tensor:
    """int8 [M, K] in [-127, 127] of x [M, K]; fp32 arithmetic whatever the dtype of x."""
    q = (x.float() * (1 / scale_rows)[:, None]).round().clamp(-INT8_MAX, INT8_MAX)
    return q.to(torch.int8)


def apply_epilogue(z: Tensor, epilogue: str | None) -> Tensor:
    """The activation of z [M, N]: [M, N_out]."""
    if epilogue == "gelu":
        return F.gelu(z)
    if epilogue == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if epilogue == "silu":
        return F.silu(z)
    if epilogue == "relu":
        return F.relu(z)
    return F.glu(z, dim=-1) if epilogue == "glu" else z


def linear_backward_reference(
    dy: Tensor, z: Tensor | None, weight: QuantizedWeight, epilogue: str | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x [M, K] and of the bias [N]; quantized inputs pass it straight through.

    Args:
        dy: [M, N_out], the gradient of the output.
        z: [M, N], the pre-activation; None without an epilogue.
        weight: [N, K].
        epilogue: as in ``linear_reference``.
    """
    dz = epilogue_backward_reference(dy, z, epilogue)
    return dz @ weight.dequantize(dz.dtype), dz.sum(0)


def epilogue_backward_reference(dy: Tensor, z: Tensor | None, epilogue: str | None) -> Tensor:
    """Gradient of the pre-activation [M, N]."""
    if epilogue is None:
        return dy
    dz: Tensor
    if epilogue in ("gelu", "gelu_tanh"):
        approximate = "none" if epilogue == "gelu" else "tanh"
        dz = aten.gelu_backward(dy, z, approximate=approximate)
    elif epilogue == "silu":
        dz = aten.silu_backward(dy, z)
    elif epilogue == "relu":
        dz = aten.threshold_backward(dy, z, 0)
    else:
        dz = aten.glu_backward(dy, z, -1)
    return dz
