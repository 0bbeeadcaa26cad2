"""low_bit_linear on a CPU.

Dimension key: M rows, K input features, N output features, N_out N / 2 with ``glu`` and N without.
"""

from functools import partial

import torch
from torch import Tensor

from lowbit_kernels.cpu import library as lib
from lowbit_kernels.cpu import portable
from lowbit_kernels.cpu.product import ACTIVATIONS, Finish, Rows, check, multiply, with_slack
from lowbit_kernels.cpu.resident import ZERO_POINT, resident_int8
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
    check(x, weight, epilogue)
    batch, N = x.shape[:-1], weight.N
    x_rows = x.float().contiguous().view(-1, weight.K)
    M, width = x_rows.shape[0], N // 2 if epilogue == "glu" else N
    if M == 0:
        return x.new_empty(*batch, width)
    residual = None if residual is None else residual.reshape(M, width)
    finish = Finish(bias, epilogue, residual)
    if weight.spec.inputs is None:
        layer = partial(multiply, Rows(x_rows, M, weight.K, weight.K), weight, None)
    else:
        layer = partial(_int8, x_rows, weight, x_scale_rows)
    return finish.run(layer).to(x.dtype).view(*batch, width)


def linear_int8_cpu(
    q: Tensor,
    q_scale: Tensor | None,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
) -> Tensor:
    """Like ``linear_cpu`` for an input that is int8 already: fp32 [..., N_out].

    Args:
        q: [..., K] int8.
        q_scale: [..., 1] fp32. None: 1.
        weight, bias, residual, epilogue: as in ``linear_cpu``.
    """
    M, K = q.numel() // weight.K, weight.K
    width = weight.N // 2 if epilogue == "glu" else weight.N
    if M == 0:
        return torch.empty(*q.shape[:-1], width)
    levels = with_slack((M, K), torch.uint8)
    torch.bitwise_xor(q.reshape(M, K).view(torch.uint8), ZERO_POINT, out=levels)
    scale = torch.ones(M, 1) if q_scale is None else q_scale.reshape(M, 1).contiguous()
    finish = Finish(bias, epilogue, None if residual is None else residual.reshape(M, width))
    y = finish.run(partial(multiply, Rows(levels, M, K, K), weight, scale))
    return y.view(*q.shape[:-1], width)


def _int8(
    x: Tensor, weight: QuantizedWeight, x_scale_rows: Tensor | None, finish: Finish
) -> Tensor:
    """[M, N] from x [M, K] fp32.

    One call where our kernels are compiled: in a decoder's step each Python line costs as much as
    the arithmetic.
    """
    (M, K), N = x.shape, weight.N
    library = lib.native_int8()
    if library is None:
        scale = portable.scale_of(x.abs().amax(1)) if x_scale_rows is None else x_scale_rows
        q = (portable.quantize(x, scale.reshape(M, 1)) + ZERO_POINT).to(torch.uint8)
        return multiply(Rows(q, M, K, K), weight, scale.reshape(M, 1), finish)
    row_scale = None if x_scale_rows is None else x_scale_rows.float().contiguous()
    column_scale, out = weight.scale.float().contiguous(), lib.empty(M, N)
    panels, start = resident_int8(weight, "native").tensors
    arguments = lib.Matmul(
        M=M, N=N, K=K, groups=1, a=x.data_ptr(), a_stride=K,
        row_scale=lib.pointer(row_scale), column_scale=column_scale.data_ptr(), scale=1.0,
        activation=ACTIVATIONS[finish.epilogue], bias=lib.pointer(finish.bias),
        residual=lib.pointer(finish.residual), residual_stride=N,
        out=out.data_ptr(), out_stride=N, threads=lib.threads(),
    )  # fmt: skip
    if library.linear_int8(arguments, panels.data_ptr(), start.data_ptr()):
        raise MemoryError("no memory for the int8 input of a linear layer")
    return out
