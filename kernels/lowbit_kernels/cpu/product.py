"""Rows times a quantized weight, and what follows the sum: every CPU layer runs on it.

Dimension key: M rows, K the reduction and N output channels, both of one group; G groups.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.cpu import library as lib
from lowbit_kernels.cpu import portable
from lowbit_kernels.cpu.resident import resident_int8
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.formats.weight import TENSORS

ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4}
INPUTS = (None, "int8")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# a row is read in whole words, the last one too
SLACK_BYTES = 64
# up to so many rows, weights are decoded in registers: FEW_ROWS of csrc/few_rows.h
FEW_ROWS = 8
# rows of weight that the PyTorch path unpacks at a time
BLOCK_ROWS = 256


@dataclass(frozen=True)
class Rows:
    """The left operand: G x M rows of K elements inside a flat tensor; rows may overlap.

    Args:
        data: contiguous; fp32, or uint8 with zero point 128 and ``SLACK_BYTES`` behind.
        M: rows.
        K: elements of a row, contiguous.
        stride: elements from a row to the next.
        groups: independent products.
        group_stride: elements from a group to the next.
    """

    data: Tensor
    M: int
    K: int
    stride: int
    groups: int = 1
    group_stride: int = 0

    def of_group(self, group: int) -> Tensor:
        """View [M, K] of one group."""
        offset = self.data.storage_offset() + group * self.group_stride
        return self.data.as_strided((self.M, self.K), (self.stride, 1), offset)


@dataclass(frozen=True)
class Finish:
    """What follows the sum: ``y = epilogue(sum * scales + bias) + residual``.

    Args:
        bias: [G * N] or None.
        epilogue: None, "gelu", "gelu_tanh", "silu", "relu" or "glu".
        residual: [M, width of y] or None.
    """

    bias: Tensor | None
    epilogue: str | None
    residual: Tensor | None

    def prepared(self) -> "Finish":
        """The same with fp32, contiguous tensors."""
        bias = None if self.bias is None else self.bias.detach().float().contiguous()
        residual = None if self.residual is None else self.residual.float().contiguous()
        return Finish(bias, self.epilogue, residual)

    def run(self, layer: Callable[["Finish"], Tensor]) -> Tensor:
        """What ``layer`` gives, which finishes its sums itself, prepared, by all but a ``glu``."""
        finish = self.prepared()
        if finish.epilogue != "glu":
            return layer(finish)
        return finish._glu(layer(Finish(finish.bias, None, None)))

    def _glu(self, y: Tensor) -> Tensor:
        """The output [M, N / 2] of the pre-activation y [M, N], contiguous."""
        library = lib.native()
        if library is None:
            y = F.glu(y)
            return y if self.residual is None else y.add_(self.residual)
        M, width = y.shape[0], y.shape[1] // 2
        out, residual = lib.empty(M, width), lib.pointer(self.residual)
        library.glu(lib.pointer(y), M, width, residual, lib.pointer(out), lib.threads())
        return out


def with_slack(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialized memory of a shape with ``SLACK_BYTES`` behind it."""
    count = math.prod(shape)
    return lib.empty(count + SLACK_BYTES, dtype=dtype)[:count].view(shape)


def check(x: Tensor, weight: QuantizedWeight, epilogue: str | None) -> None:
    """Refuse what no CPU kernel serves."""
    if weight.spec.inputs not in INPUTS:
        raise NotImplementedError(
            f"the CPU serves inputs {INPUTS}, got inputs={weight.spec.inputs!r}"
        )
    assert x.dtype in DTYPES, "op.py sends fp64 to the reference"
    if weight.spec.deterministic:
        portable.check_deterministic(weight, epilogue)


def multiply(
    rows: Rows, weight: QuantizedWeight, input_scale: Tensor | None, finish: Finish
) -> Tensor:
    """``epilogue(rows @ W.T + bias) + residual``.

    Args:
        rows: the input; uint8 where ``input_scale`` is given.
        weight: [G * N, K].
        input_scale: fp32 [M, 1] or []; None for a float input.
        finish: what follows the sum, as ``Finish.run`` hands it out.

    Returns:
        [M, G * N] fp32.
    """
    library = lib.native() if input_scale is None else lib.native_int8()
    if library is not None:
        out = lib.empty(rows.M, weight.N)
        multiply_native(library, rows, weight, input_scale, finish, out)
        return out
    y = torch.empty(rows.M, weight.N)
    if input_scale is None:
        _float_sums(rows, weight, y)
    else:
        _int8_sums(rows, weight, y)
        y.mul_(input_scale * weight.scale)
    if finish.bias is not None:
        y.add_(finish.bias)
    y = portable.activate(y, finish.epilogue)
    return y if finish.residual is None else y.add_(finish.residual)


def multiply_native(
    library: ctypes.CDLL,
    rows: Rows,
    weight: QuantizedWeight,
    input_scale: Tensor | None,
    finish: Finish,
    out: Tensor,
    largest: Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """``multiply`` into out, by our kernels.

    Args:
        library: the kernels.
        rows: as in ``multiply``.
        weight: as in ``multiply``.
        input_scale: as in ``multiply``.
        finish: as in ``multiply``.
        out: [M, G * N] fp32, contiguous.
        largest: [] fp32, raised to the largest magnitude of out - offset; NaN stays.
        offset: [G * N] fp32. None: zero.
    """
    column_scale = weight.scale.float().contiguous() if weight.spec.symmetric else None
    shared = input_scale is None or input_scale.numel() == 1
    arguments = lib.Matmul(
        M=rows.M, N=weight.N // rows.groups, K=rows.K, groups=rows.groups,
        a=lib.pointer(rows.data), a_stride=rows.stride, a_group_stride=rows.group_stride,
        row_scale=None if shared else lib.pointer(input_scale),
        column_scale=lib.pointer(column_scale),
        scale=1.0 if input_scale is None or not shared else float(input_scale),
        activation=ACTIVATIONS[finish.epilogue],
        bias=lib.pointer(finish.bias), residual=lib.pointer(finish.residual),
        residual_stride=weight.N, out=lib.pointer(out), out_stride=weight.N,
        largest=lib.pointer(largest), offset=lib.pointer(offset), threads=lib.threads(),
    )  # fmt: skip
    if input_scale is None:
        _native_float(library, arguments, weight)
    else:
        resident = resident_int8(weight, "native", rows.groups)
        library.matmul_int8(arguments, *map(lib.pointer, resident.tensors))


def _native_float(library: ctypes.CDLL, arguments: lib.Matmul, weight: QuantizedWeight) -> None:
    zero, multiplier = weight.zero_point, weight.group_scale
    if zero is not None:
        zero, multiplier = zero.float().contiguous(), weight.scale
    multiplier = None if multiplier is None else multiplier.float().contiguous()
    qweight = weight.qweight.contiguous()
    packed = lib.PackedWeight(
        bytes=lib.pointer(qweight), pitch=qweight.shape[1], bits=weight.spec.bits,
        asymmetric=zero is not None, group_size=weight.spec.group,
        scale_groups=0 if multiplier is None else multiplier.shape[1],
        multiplier=lib.pointer(multiplier), zero=lib.pointer(zero),
    )  # fmt: skip
    few = arguments.M <= FEW_ROWS and arguments.groups == 1 and not weight.spec.deterministic
    run = library.matmul_few_rows if few else library.matmul_float
    if run(arguments, packed):
        raise MemoryError("no memory for a block of unpacked weights")


def _int8_sums(rows: Rows, weight: QuantizedWeight, total: Tensor) -> None:
    layout = "onednn" if portable.has_exact_onednn() else "float"
    resident = resident_int8(weight, layout, rows.groups)
    N = weight.N // rows.groups
    for group in range(rows.groups):
        sums = portable.matmul_int8(rows.of_group(group), resident, group, N)
        total[:, group * N : (group + 1) * N] = sums


def _float_sums(rows: Rows, weight: QuantizedWeight, total: Tensor) -> None:
    N = weight.N // rows.groups
    for group in range(rows.groups):
        x = rows.of_group(group)
        for n in range(group * N, (group + 1) * N, BLOCK_ROWS):
            end = min(n + BLOCK_ROWS, (group + 1) * N)
            total[:, n:end] = x @ _channels(weight, n, end).dequantize().t()


def _channels(weight: QuantizedWeight, start: int, end: int) -> QuantizedWeight:
    """Output channels [start, end) of a weight."""
    stored = {name: getattr(weight, name) for name in TENSORS}
    cut: dict[str, Any] = {k: None if t is None else t[start:end] for k, t in stored.items()}
    return replace(weight, **cut)
