"""torch.ops.lowbit.int8_scores_attention: schema, validation, fake and backends.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.attention.checks import check_heads, check_options, check_position
from lowbit_kernels.attention.dispatch import needs_gradient
from lowbit_kernels.attention.int8_reference import dequantize_heads, quantize_heads_reference
from lowbit_kernels.attention.op import attend_cpu
from lowbit_kernels.attention.position import Position, Scheme, resolve
from lowbit_kernels.checks import autocast
from lowbit_kernels.cpu import empty_heads
from lowbit_kernels.device import implement_on_cuda

torch.library.define(
    "lowbit::int8_scores_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? lengths, str? kind, Tensor? table, Tensor? rows, "
    "int? window, float scale) -> Tensor",
)


@torch.library.register_fake("lowbit::int8_scores_attention")
def _fake(q: Tensor, *_: Any) -> Tensor:
    return empty_heads(q)


def _scheme(kind: str | None, table: Tensor | None, rows: Tensor | None) -> Scheme | None:
    return None if kind is None or table is None else Scheme(kind, table, rows)


@torch.library.impl("lowbit::int8_scores_attention", "cpu")
def _cpu(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, kind: str | None,
    table: Tensor | None, rows: Tensor | None, window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    scheme = _scheme(kind, table, rows)
    if q.numel() == 0:
        return empty_heads(q)
    q8, k8, scales = quantize_heads_reference(q, k, lengths)
    rounded = dequantize_heads(q8, k8, scales)
    out, _ = attend_cpu(*rounded, v.to(scales.dtype), lengths, scheme, None, window, scale, 0.0)
    return empty_heads(q).copy_(out)


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, kind: str | None,
    table: Tensor | None, rows: Tensor | None, window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    # imported on first use, so that `import lowbit_kernels` needs no GPU and no Triton
    from lowbit_kernels.attention.forward_kernel import flash_attention_triton
    from lowbit_kernels.attention.int8_kernel import quantize_heads_triton

    if q.numel() == 0:
        return empty_heads(q)
    q, k, scales = quantize_heads_triton(q, k, lengths)
    scheme = _scheme(kind, table, rows)
    out, _ = flash_attention_triton(
        q, k, v, lengths, scheme, None, window, scale, 0.0, block_scales=scales
    )
    return out


implement_on_cuda("lowbit::int8_scores_attention", _cuda)


def int8_scores_attention(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None, window: int | None = None,
    position: Position | Scheme | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend with scores that are int8 products, for inference.

    ``flash_attention`` whose q, and k less its mean over the utterance, are rounded to int8 with a
    scale for each 64 frames (arXiv 2410.02367); probabilities and v stay as they are. What scores a
    position stays in float, the biases of a ``TransformerXL`` are added to q before it is rounded.

    Args:
        q: [B, H, T, D], and the others, as ``flash_attention`` takes them.
        k: like q.
        v: like q.
        lengths: as in ``flash_attention``.
        window: as in ``flash_attention``.
        position: as in ``flash_attention``.
        scale: as in ``flash_attention``.

    Returns:
        [B, H, T, D], as ``flash_attention``. It has no gradient.

    Raises:
        ValueError: as ``flash_attention``; where an input needs a gradient.
    """
    check_heads(q, k, v)
    check_options(q, lengths, window, scale, 0.0)
    check_position(q, position, window)
    if needs_gradient(position, q, k, v):
        raise ValueError("q: int8 scores have no gradient, which an input needs here")
    q, k, v = autocast(q, k, v)
    scheme = resolve(q, position, window)
    if scheme is not None:
        q, scheme = scheme.with_rows(q)
    of_scheme = (None,) * 3 if scheme is None else (scheme.kind, scheme.table, scheme.rows)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = torch.ops.lowbit.int8_scores_attention.default(
        q, k, v, lengths, *of_scheme, window, scale
    )
    return out
