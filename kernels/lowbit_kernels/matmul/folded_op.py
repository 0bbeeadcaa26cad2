"""Ops for a LayerNorm between two linear layers without a pass of its own, for inference.

``lowbit::linear_with_stats`` also returns the statistics of the rows it makes, and
``lowbit::linear_normed`` applies the LayerNorm of its input to the product.

Dimension key: M rows of the input, N output features, K input features, N_out N / 2 with ``glu``
and N without; T tiles of ``STATS_WIDTH`` features.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.checks import check_input, check_like, output_shape
from lowbit_kernels.cpu.linear import linear_cpu
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.op import PACKED, check_weight, empty_output, flatten, unpack
from lowbit_kernels.matmul.reference import (
    InputNorm,
    merge_statistics,
    num_stats_tiles,
    row_statistics,
)

DTYPES = (torch.float16, torch.bfloat16)

torch.library.define(
    "lowbit::linear_with_stats",
    f"(Tensor x, Tensor? bias, Tensor? residual, str? epilogue, {PACKED}) "
    "-> (Tensor y, Tensor stats)",
)
torch.library.define(
    "lowbit::linear_normed",
    "(Tensor x, Tensor stats, Tensor norm_weight, Tensor norm_bias, Tensor columns, float eps, "
    f"Tensor? bias, Tensor? residual, str? epilogue, {PACKED}) -> Tensor",
)


def _empty_stats(x: Tensor, N: int) -> Tensor:
    M = x.shape[:-1].numel()
    return x.new_empty(num_stats_tiles(N), 2, M, dtype=torch.float32)


@torch.library.register_fake("lowbit::linear_with_stats")
def _fake_with_stats(*args: Any) -> tuple[Tensor, Tensor]:
    x, _, _, epilogue, weight = unpack(args)
    return empty_output(x, weight.N, epilogue), _empty_stats(x, weight.N)


@torch.library.register_fake("lowbit::linear_normed")
def _fake_normed(*args: Any) -> Tensor:
    x, *_, epilogue, weight = unpack(args)
    return empty_output(x, weight.N, epilogue)


@torch.library.impl("lowbit::linear_with_stats", "cpu")
def _cpu_with_stats(*args: Any) -> tuple[Tensor, Tensor]:
    x, bias, residual, epilogue, weight = unpack(args)
    y = linear_cpu(x, weight, bias, residual, epilogue)
    return y, row_statistics(y.reshape(-1, y.shape[-1]))


@torch.library.impl("lowbit::linear_normed", "cpu")
def _cpu_normed(*args: Any) -> Tensor:
    x, stats, norm_weight, norm_bias, _, eps, bias, residual, epilogue, weight = unpack(args)
    mean, rstd = merge_statistics(stats, weight.K, eps)
    rows = (x.reshape(-1, weight.K).float() - mean[:, None]) * rstd[:, None]
    rows = torch.addcmul(norm_bias.float(), rows, norm_weight.float())
    return linear_cpu(rows.to(x.dtype).view(x.shape), weight, bias, residual, epilogue)


def _cuda_with_stats(*args: Any) -> tuple[Tensor, Tensor]:
    from lowbit_kernels.matmul.cuda import linear_folded_cuda

    x, bias, residual, epilogue, weight = unpack(args)
    stats = _empty_stats(x, weight.N)
    return linear_folded_cuda(x, weight, bias, residual, epilogue, stats=stats), stats


def _cuda_normed(*args: Any) -> Tensor:
    from lowbit_kernels.matmul.cuda import linear_folded_cuda

    x, stats, norm_weight, _, columns, eps, bias, residual, epilogue, weight = unpack(args)
    norm = InputNorm(stats.contiguous(), norm_weight.contiguous(), columns.contiguous(), eps)
    return linear_folded_cuda(x, weight, bias, residual, epilogue, norm=norm)


implement_on_cuda("lowbit::linear_with_stats", _cuda_with_stats)
implement_on_cuda("lowbit::linear_normed", _cuda_normed)


def _check(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
) -> None:
    """Refuse what is served with neither statistics nor a folded norm."""
    check_weight(weight, epilogue)
    if weight.spec.inputs is not None or not weight.spec.symmetric:
        raise NotImplementedError(
            "a LayerNorm is folded into symmetric weights with inputs=None (norm_quantize serves "
            f"int8 inputs), got {weight.spec}"
        )
    if weight.spec.deterministic and x.device.type == "cpu":
        raise NotImplementedError("deterministic=True is served on CUDA only, got x on a CPU")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be fp16 or bf16, got {x.dtype}")
    check_input(x, weight.K, weight.qweight)
    check_like("bias", bias, (weight.N,), x.dtype, x)
    check_like("residual", residual, output_shape(x, weight.N, epilogue), x.dtype, x)
    tensors = (x, bias, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            "a folded LayerNorm has no gradient: call it under torch.no_grad(), or train with "
            "low_bit_linear after nn.LayerNorm"
        )


def low_bit_linear_with_stats(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    epilogue: str | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``low_bit_linear``, and what a LayerNorm of the result needs to know of its rows.

    Args:
        x: [..., K], fp16 or bf16.
        weight: [N, K], symmetric, its spec with ``inputs=None``.
        bias: [N], like x.
        epilogue: as in ``low_bit_linear``, but not ``"glu"``.
        residual: [..., N], like x.

    Returns:
        y: [..., N], in the dtype of x.
        stats: [T, 2, M] fp32, ``row_statistics`` of y as it is stored. They have no gradient.

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
        NotImplementedError: for ``"glu"``, an asymmetric weight or quantized inputs; where a
            gradient is asked for; for ``deterministic=True`` on a CPU.
    """
    _check(x, weight, bias, residual, epilogue)
    if epilogue == "glu":
        raise NotImplementedError("row statistics are served without epilogue 'glu', got 'glu'")
    y: Tensor
    y, stats = torch.ops.lowbit.linear_with_stats.default(
        x, bias, residual, epilogue, *flatten(weight)
    )
    return y, stats


def low_bit_linear_normed(
    x: Tensor,
    stats: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    columns: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    epilogue: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer of a LayerNorm of x.

    Equivalent to ``low_bit_linear(F.layer_norm(x, (K,), norm_weight, norm_bias, eps), weight, bias,
    ...)``. On CUDA, as ``(x - mean) @ V.T = x @ V.T - mean * V.sum(1)``, x is multiplied as it is,
    by V: the weight's integers times the norm's scale, rounded to the dtype of x once they are
    unpacked. The sums, in fp32, are rounded to 16 bits once the mean is taken off.

    In place of the normalized input, V is rounded, so that the result is as exact as that of two
    ops, unless ``abs(mean) / deviation * abs(V.sum(1)) / norm(V)`` is large: the sums' own
    rounding, about 1e-7 of it, then shows.

    Args:
        x: [..., K], fp16 or bf16.
        stats: [T, 2, M] fp32, ``row_statistics`` of x; ``low_bit_linear_with_stats`` gives them.
        norm_weight, norm_bias: [K], like x: the norm's scale, of magnitudes below 512 (V is at most
            128 times as large), and its shift.
        columns: [2, N] fp32, ``norm_columns(weight, norm_weight, norm_bias)``, to be kept.
        weight: [N, K], symmetric, its spec with ``inputs=None``.
        bias: [N], like x.
        eps: added to the variance.
        epilogue: as in ``low_bit_linear``.
        residual: [..., N_out], like x.

    Returns:
        [..., N_out], in the dtype of x. It has no gradient.

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
        NotImplementedError: for an asymmetric weight or quantized inputs; where a gradient is asked
            for; for ``deterministic=True`` on a CPU.
    """
    _check(x, weight, bias, residual, epilogue)
    stats_shape = (num_stats_tiles(weight.K), 2, x.shape[:-1].numel())
    check_like("stats", stats, stats_shape, torch.float32, x)
    check_like("norm_weight", norm_weight, (weight.K,), x.dtype, x)
    check_like("norm_bias", norm_bias, (weight.K,), x.dtype, x)
    check_like("columns", columns, (2, weight.N), torch.float32, x)
    y: Tensor = torch.ops.lowbit.linear_normed.default(
        x, stats, norm_weight, norm_bias, columns, eps, bias, residual, epilogue, *flatten(weight)
    )
    return y
