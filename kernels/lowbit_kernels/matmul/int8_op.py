"""torch.ops.lowbit.linear_int8: a linear layer whose input is int8 already, inside fused blocks.

Dimension key: N output features, K input features, N_out N / 2 with ``glu`` and N without.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.checks import DTYPES, check_like, output_shape
from lowbit_kernels.cpu.linear import linear_int8_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.op import PACKED, check_weight, empty_output, flatten, unpack
from lowbit_kernels.matmul.reference import quantize_rows

torch.library.define(
    "lowbit::linear_int8",
    "(Tensor q, Tensor? q_scale, Tensor? bias, Tensor? residual, str? epilogue, ScalarType dtype, "
    f"Tensor? out_scale, {PACKED}) -> Tensor",
)


@torch.library.register_fake("lowbit::linear_int8")
def _fake(*args: Any) -> Tensor:
    q, _, _, _, epilogue, dtype, out_scale, weight = unpack(args)
    return empty_output(q, weight.N, epilogue, dtype if out_scale is None else torch.int8)


@torch.library.impl("lowbit::linear_int8", "cpu")
def _cpu(*args: Any) -> Tensor:
    q, q_scale, bias, residual, epilogue, dtype, out_scale, weight = unpack(args)
    y = linear_int8_cpu(q, q_scale, weight, bias, residual, epilogue)
    if out_scale is None:
        return y.to(dtype)
    rows = y.reshape(-1, y.shape[-1])
    return quantize_rows(rows, out_scale.expand(len(rows))).reshape(y.shape)


def _cuda(*args: Any) -> Tensor:
    from lowbit_kernels.matmul.cuda import linear_int8_cuda

    q, q_scale, bias, residual, epilogue, dtype, out_scale, weight = unpack(args)
    dtype = dtype if out_scale is None else torch.int8
    return linear_int8_cuda(q, q_scale, weight, bias, residual, epilogue, dtype, out_scale)


implement_on_cuda("lowbit::linear_int8", _cuda)


def low_bit_linear_int8(
    q: Tensor,
    q_scale: Tensor | None,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    epilogue: str | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype,
    out_scale: Tensor | None = None,
) -> Tensor:
    """``low_bit_linear`` of an input that a kernel before it has quantized. It has no gradient.

    What ``norm_quantize`` returns gives the result that ``low_bit_linear`` gives for the rows that
    it quantized.

    Args:
        q: [..., K] int8 in [-127, 127].
        q_scale: [..., 1] fp32, of each row. None: 1, the scale of the input is in the weight's.
        weight: [N, K], its spec with ``inputs="int8"``.
        bias: [N], of ``dtype``.
        epilogue: as in ``low_bit_linear``.
        residual: [..., N_out], of ``dtype``.
        dtype: of the result, fp16, bf16 or fp32.
        out_scale: [] fp32. If given, the result is int8 by this scale, for the next layer.

    Returns:
        [..., N_out] of ``dtype``, or int8 in [-127, 127] with ``out_scale``.

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
    """
    check_weight(weight, epilogue)
    if weight.spec.inputs != "int8":
        raise ValueError(f"weight.spec.inputs must be 'int8', got {weight.spec.inputs!r}")
    if q.dtype != torch.int8 or q.dim() == 0 or q.shape[-1] != weight.K:
        raise ValueError(
            f"q must be int8 [..., K] with K = {weight.K}, got {q.dtype} {list(q.shape)}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    if weight.qweight.device != q.device:
        raise ValueError(f"weight must be on q's device {q.device}, got {weight.qweight.device}")
    check_like("q_scale", q_scale, (*q.shape[:-1], 1), torch.float32, q)
    check_like("bias", bias, (weight.N,), dtype, q)
    check_like("residual", residual, output_shape(q, weight.N, epilogue), dtype, q)
    check_like("out_scale", out_scale, (), torch.float32, q)
    y: Tensor = torch.ops.lowbit.linear_int8.default(
        q, q_scale, bias, residual, epilogue, dtype, out_scale, *flatten(weight)
    )
    return y
