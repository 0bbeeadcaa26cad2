"""What a low-bit linear layer means, in plain PyTorch.

Dimension key: M rows of the input, N output features, K input features. A ``glu`` epilogue halves
the output: N_out is N / 2 there and N elsewhere.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.formats import QuantizedWeight

aten = torch.ops.aten

INT8_MAX = 127

# what an input is quantized to, and the largest magnitude there
INPUT_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
INPUT_MAX = {"int8": INT8_MAX, "fp8": 448}

# features that share statistics for LayerNorm: no tile of a kernel has fewer
STATS_WIDTH = 64

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
        x_scale_rows: [M] fp32, the scale of each row's quantized input. None: a row's own.

    Returns:
        [M, N_out], in the dtype of x.
    """
    y = apply_epilogue(preactivation_reference(x, weight, bias, x_scale_rows), epilogue)
    return y if residual is None else y + residual


def preactivation_reference(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, x_scale_rows: Tensor | None = None
) -> Tensor:
    """``x @ W.T + bias``, [M, N], in the dtype of x [M, K]."""
    inputs = weight.spec.inputs
    if inputs is None:
        return F.linear(x, weight.dequantize(x.dtype), bias)
    if x_scale_rows is None:
        x_scale_rows = input_scale_rows(x, "token", None, inputs)
    levels = weight.integers()
    if inputs == "fp8":
        levels = levels.float().to(INPUT_DTYPES[inputs])
    # integers below 2 ** 53, and fp8's multiples of 2 ** -9 below 2 ** 44, are exact in float64,
    # and so are their sums
    sums = quantize_rows(x, x_scale_rows, inputs).double() @ levels.double().t()
    wide = torch.promote_types(x.dtype, torch.float32)
    z = sums.to(wide) * (x_scale_rows[:, None] * weight.scale).to(wide)
    return (z if bias is None else z + bias.to(wide)).to(x.dtype)


def input_scale_rows(
    x: Tensor, kind: str, static_scale: Tensor | None, inputs: str = "int8"
) -> Tensor:
    """The scale of the quantized input of each row: fp32 [M], M the rows of x [..., K].

    Args:
        x: [..., K], floating point.
        kind: ``"token"``: each row has its own; ``"utterance"``: the rows of ``x[b]`` share one
            (all rows, where x has fewer than three dimensions); ``"static"``: all have
            ``static_scale``.
        static_scale: [] fp32, for ``"static"``.
        inputs: ``"int8"`` or ``"fp8"``.
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
    return int8_scale(largest, INPUT_MAX[inputs]).expand(rows).flatten().contiguous()


def int8_scale(largest: Tensor, limit: int = INT8_MAX) -> Tensor:
    """The fp32 scale of int8 values up to the magnitude ``largest``: the same on every device.

    With another ``limit``, of values that reach that instead of 127.

    NaN where the magnitude is NaN or infinite: what is computed from such a row is NaN.
    """
    # CUDA divides by a number through its reciprocal, an ulp off, and by a tensor correctly
    divisor = torch.full_like(largest, limit, dtype=torch.float32)
    scale = (largest.float() / divisor).clamp_min(MIN_INPUT_SCALE)
    return scale.masked_fill(largest.isinf(), torch.nan)


def quantize_rows(x: Tensor, scale_rows: Tensor, inputs: str = "int8") -> Tensor:
    """int8 [M, K] in [-127, 127], or fp8 (e4m3) in [-448, 448], of x [M, K].

    fp32 arithmetic whatever the dtype of x; rounded half to even, by the cast to fp8 there.
    """
    limit = INPUT_MAX[inputs]
    q = (x.float() * (1 / scale_rows)[:, None]).clamp(-limit, limit)
    return (q.round() if inputs == "int8" else q).to(INPUT_DTYPES[inputs])


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


def row_statistics(h: Tensor) -> Tensor:
    """What LayerNorm needs to know of rows, in tiles of ``STATS_WIDTH`` features.

    Args:
        h: [M, N], floating point.

    Returns:
        [T, 2, M] fp32, T = ceil(N / STATS_WIDTH): of each tile and row the sum, and the sum of
        squared deviations from the tile's mean.
    """
    M, N = h.shape
    T = num_stats_tiles(N)
    tiles = F.pad(h.float(), (0, T * STATS_WIDTH - N)).view(M, T, STATS_WIDTH)
    inside = (torch.arange(T * STATS_WIDTH, device=h.device) < N).view(T, STATS_WIDTH)
    total = tiles.sum(2)
    centered = (tiles - (total / inside.sum(1))[:, :, None]) * inside
    return torch.stack((total, centered.square().sum(2))).permute(2, 0, 1).contiguous()


def num_stats_tiles(num_features: int) -> int:
    """T of ``row_statistics``."""
    return -(-num_features // STATS_WIDTH)


def merge_statistics(stats: Tensor, num_features: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(variance + eps)`` of rows, fp32 [M], without cancellation.

    The formula is that of Chan, Golub and LeVeque, "Algorithms for computing the sample variance"
    (1983).

    Args:
        stats: [T, 2, M] as ``row_statistics`` gives them.
        num_features: N.
        eps: added to the variance.
    """
    total, squares = stats.unbind(1)
    start = torch.arange(len(stats), device=stats.device)[:, None] * STATS_WIDTH
    count = (num_features - start).clamp(max=STATS_WIDTH)
    mean = total.sum(0) / num_features
    variance = (squares + count * (total / count - mean).square()).sum(0) / num_features
    return mean, (variance + eps).rsqrt()


@dataclass(frozen=True)
class InputNorm:
    """A LayerNorm of a layer's input x that is applied to the product with the weight.

    Args:
        stats: [T, 2, M] fp32, ``row_statistics`` of x.
        weight: [K], the norm's scale, in the dtype of x.
        columns: [2, N] fp32, ``norm_columns``.
        eps: added to the variance.
    """

    stats: Tensor
    weight: Tensor
    columns: Tensor
    eps: float


def norm_columns(weight: QuantizedWeight, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    """What a mean of 1, and the norm's shift, add to a product with the weight's integers.

    Args:
        weight: [N, K], symmetric.
        norm_weight, norm_bias: [K], of the dtype that the integers are multiplied in.

    Returns:
        [2, N] fp32: the sum over K of the integers times the norm's scale, rounded as the kernel
        rounds them, and that of the integers times its shift.
    """
    integers = weight.integers()
    scaled = integers.to(norm_weight.dtype) * norm_weight.detach()
    shift = integers.double() @ norm_bias.detach().double()
    return torch.stack((scaled.double().sum(1), shift)).float()
