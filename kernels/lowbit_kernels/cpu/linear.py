"""low_bit_linear on a CPU.

Dimension key: M rows, K input features, N output features.
"""

import torch
from torch import Tensor

from lowbit_kernels.cpu import library as lib
from lowbit_kernels.cpu import portable
from lowbit_kernels.cpu.product import Finish, Rows, check_inputs, multiply
from lowbit_kernels.formats import QuantizedWeight

# the last row is read in whole words
SLACK_BYTES = 64


def linear_cpu(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: str | None = None,
    *,
    lengths: Tensor | None = None,
) -> Tensor:
    """``epilogue(x @ W.T + bias) + residual``.

    With ``inputs=None`` the weight is unpacked to float a block at a time, never whole. With
    ``inputs="int8"`` x is quantized by a scale a row, an utterance or static, as the spec says, and
    multiplied in exact int32 by the weight's resident int8 copy.

    Args:
        x: [..., K], fp16, bf16, fp32 or fp64; computed in fp32 (fp64 for fp64).
        weight: [N, K].
        bias: [N] or None.
        residual: [..., N] ([..., N / 2] for ``glu``) or None.
        epilogue: None, "gelu", "gelu_tanh", "silu", "relu" or "glu".
        lengths: [B], the valid rows of each x[b], for ``input_scale="utterance"``; the scale ignores
            the rest. None: all of them.

    Returns:
        [..., N] ([..., N / 2] for ``glu``), in the dtype of x.

    Raises:
        NotImplementedError: for inputs other than None and "int8".
    """
    check_inputs(weight)
    K = x.shape[-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = x.reshape(-1, K).to(wide).contiguous()
    M = flat.shape[0]
    width = weight.N // 2 if epilogue == "glu" else weight.N
    if M == 0:
        return x.new_empty(*x.shape[:-1], width)
    flat_residual = None if residual is None else residual.reshape(M, width)
    finish = Finish(bias, epilogue, flat_residual)
    if weight.spec.inputs is None:
        y = multiply(Rows(flat, M, K, K), weight, None, finish, wide)
    else:
        q, scale = _quantize(flat, _input_scale(x, flat, weight, lengths))
        y = multiply(Rows(q, M, K, K), weight, scale, finish, wide)
    return y.to(x.dtype).view(*x.shape[:-1], width)


def _input_scale(
    x: Tensor, flat: Tensor, weight: QuantizedWeight, lengths: Tensor | None
) -> Tensor | None:
    """Scale [M, 1] of the rows; None where each row's own is to be found."""
    if weight.spec.input_scale == "static":
        assert weight.input_scale is not None, "a static spec has its scale"
        return weight.input_scale.float().expand(flat.shape[0], 1).contiguous()
    if weight.spec.input_scale == "token":
        return None
    if x.dim() < 3:
        return portable.scale_of(flat.abs().amax()).expand(flat.shape[0], 1).contiguous()
    largest = x.abs().flatten(2).amax(-1)  # [B, rows of an utterance]
    if x.dim() > 3:
        raise NotImplementedError(
            f"input_scale='utterance' serves x of 1 to 3 dimensions, got {x.dim()}"
        )
    if lengths is not None:
        padding = torch.arange(x.shape[1]) >= lengths[:, None]
        largest = largest.masked_fill(padding, 0.0)
    scale = portable.scale_of(largest.amax(1, keepdim=True))
    return scale.expand(x.shape[:2]).reshape(-1, 1)


def _quantize(flat: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows [M, K] to uint8 with zero point 128, and their scale [M, 1] fp32."""
    M, K = flat.shape
    library = lib.native() if flat.dtype == torch.float32 else None
    if library is not None and scale is None:
        q = torch.empty(M * K + SLACK_BYTES, dtype=torch.uint8)
        found = torch.empty(M, 1)
        library.quantize_rows(
            lib.pointer(flat), K, M, K, lib.pointer(q), lib.pointer(found), torch.get_num_threads()
        )
        return q, found
    if scale is None:
        scale = portable.scale_of(flat.abs().amax(1, keepdim=True))
    q = torch.empty(M * K + SLACK_BYTES, dtype=torch.uint8)
    q[: M * K].view(M, K).copy_(portable.quantize(flat, scale) + portable.ZERO_POINT)
    return q, scale
