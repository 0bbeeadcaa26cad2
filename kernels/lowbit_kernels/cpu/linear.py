"""low_bit_linear on a CPU.

Dimension key: M rows, K input features, N output features, N_out N / 2 with ``glu`` and N without.
"""

import torch
from torch import Tensor

from lowbit_kernels.cpu import library as lib
from lowbit_kernels.cpu import portable
from lowbit_kernels.cpu.product import SLACK_BYTES, Finish, Rows, check, multiply
from lowbit_kernels.cpu.resident import ZERO_POINT
from lowbit_kernels.formats import QuantizedWeight


def linear_cpu(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    epilogue: str | None = None,
    *,
    x_scale_rows: Tensor | None = None,
) -> Tensor:
    """``epilogue(x @ W.T + bias) + residual``, computed in fp32.

    With ``inputs=None`` the weight is unpacked to float a block at a time, never whole. With
    ``inputs="int8"`` x is quantized a row at a time and multiplied, in exact int32, by the weight's
    resident int8 copy.

    Args:
        x: [..., K], fp16, bf16 or fp32.
        weight: [N, K].
        bias: [N] or None.
        residual: [..., N_out] or None.
        epilogue: None, "gelu", "gelu_tanh", "silu", "relu" or "glu".
        x_scale_rows: [M] fp32, the scale of each row's int8 input. None: a row's own.

    Returns:
        [..., N_out], in the dtype of x.

    Raises:
        NotImplementedError: for inputs other than None and "int8".
    """
    check(x, weight)
    K, width = x.shape[-1], weight.N // 2 if epilogue == "glu" else weight.N
    flat = x.reshape(-1, K).float().contiguous()
    M = flat.shape[0]
    if M == 0:
        return x.new_empty(*x.shape[:-1], width)
    finish = Finish(bias, epilogue, None if residual is None else residual.reshape(M, width))
    if weight.spec.inputs is None:
        y = multiply(Rows(flat, M, K, K), weight, None, finish)
    else:
        q, scale = _quantize(flat, x_scale_rows)
        y = multiply(Rows(q, M, K, K), weight, scale, finish)
    return y.to(x.dtype).view(*x.shape[:-1], width)


def _quantize(flat: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows [M, K] to uint8 with zero point 128, flat and with slack, and their scale [M, 1]."""
    M, K = flat.shape
    q = lib.empty(M * K + SLACK_BYTES, dtype=torch.uint8)
    library = lib.native()
    if library is not None:
        own = scale is None
        scale = torch.empty(M, 1) if scale is None else scale.float().reshape(M, 1).contiguous()
        library.quantize_rows(
            lib.pointer(flat), M, K, own, lib.pointer(q), lib.pointer(scale), lib.threads()
        )
        return q, scale
    if scale is None:
        scale = portable.scale_of(flat.abs().amax(1))
    scale = scale.reshape(M, 1)
    q[: M * K].view(M, K).copy_(portable.quantize(flat, scale) + ZERO_POINT)
    return q, scale
