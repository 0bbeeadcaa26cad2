"""torch.ops.lowbit.low_bit_attention: schema, fakes, backends and gradient.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.attention.checks import check_heads, check_options, check_position
from lowbit_kernels.attention.dispatch import backend_of, needs_gradient
from lowbit_kernels.attention.low_bit_reference import (
    low_bit_attention_backward_reference,
    low_bit_attention_reference,
)
from lowbit_kernels.attention.op import dropout_keep, scheme_gradients, scheme_scores
from lowbit_kernels.attention.position import Position, Scheme, resolve
from lowbit_kernels.checks import autocast, check_like
from lowbit_kernels.cpu import empty_heads
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.fake_quant import Levels, Quantizer, fake_quantize
from lowbit_kernels.fake_quant.quantizer import check_quantizer

BITS = (1, 2, 4, 8)

_OPTIONS = (
    "Tensor? lengths, str? kind, Tensor? table, Tensor? rows, Tensor? seed, Tensor step, "
    "int? window, float scale, float dropout_p, int high"
)
torch.library.define(
    "lowbit::low_bit_attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "lowbit::low_bit_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor lse, {_OPTIONS}, bool needs_table) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dtable, Tensor drows, Tensor dstep)",
)


@torch.library.register_fake("lowbit::low_bit_attention")
def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return empty_heads(q), lse


@torch.library.register_fake("lowbit::low_bit_attention_backward")
def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, lengths: Tensor | None,
    kind: str | None, table: Tensor | None, rows: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    step, needs_table = rest[1], rest[-1]
    nothing = q.new_empty(0)
    drows = nothing if rows is None else rows.new_empty(rows.shape)
    drows = empty_heads(q) if kind == "relative" else drows
    dtable = table.new_empty(table.shape) if table is not None and needs_table else nothing
    return empty_heads(q), empty_heads(q), empty_heads(q), dtable, drows, torch.empty_like(step)


def _unpack(
    lengths: Tensor | None, kind: str | None, table: Tensor | None, rows: Tensor | None,
    seed: Tensor | None, step: Tensor, window: int | None, scale: float, dropout_p: float,
    high: int,
) -> tuple[tuple[Any, ...], Tensor, int]:  # fmt: skip
    """What ``flash_attention`` has too, of which some become a scheme; the step; highest level."""
    scheme = None if kind is None or table is None else Scheme(kind, table, rows)
    return (lengths, scheme, seed, window, scale, dropout_p), step, high


def _on_cpu(
    q: Tensor, options: tuple[Any, ...], step: Tensor, high: int
) -> tuple[torch.dtype, tuple[Any, ...]]:
    """In which dtype the reference computes, and its arguments from the lengths on."""
    lengths, scheme, seed, window, scale, dropout_p = options
    bias, keep = scheme_scores(q, scheme, scale), dropout_keep(q, seed, dropout_p)
    wide = torch.promote_types(q.dtype, torch.float32)
    return wide, (lengths, bias, window, scale, step, high, keep)


@torch.library.impl("lowbit::low_bit_attention", "cpu")
def _cpu(q: Tensor, k: Tensor, v: Tensor, *packed: Any) -> tuple[Tensor, Tensor]:
    wide, arguments = _on_cpu(q, *_unpack(*packed))
    out, lse = low_bit_attention_reference(q.to(wide), k.to(wide), v.to(wide), *arguments)
    return empty_heads(q).copy_(out), lse


@torch.library.impl("lowbit::low_bit_attention_backward", "cpu")
def _cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *packed: Any
) -> tuple[Tensor, ...]:
    *packed, needs_table = packed  # type: ignore[assignment]
    options, step, high = _unpack(*packed)
    wide, arguments = _on_cpu(q, options, step, high)
    *gradients, grad_scores, dstep = low_bit_attention_backward_reference(
        grad_out.to(wide), q.to(wide), k.to(wide), v.to(wide), *arguments
    )
    dq, dk, dv = (empty_heads(q).copy_(gradient) for gradient in gradients)
    _, scheme, *_, scale, _ = options
    of_scheme = scheme_gradients(q, grad_scores, scheme, scale, needs_table)
    return dq, dk, dv, *of_scheme, dstep.to(step.dtype).view(step.shape)


def _cuda(q: Tensor, k: Tensor, v: Tensor, *packed: Any) -> tuple[Tensor, Tensor]:
    # imported on first use, so that `import lowbit_kernels` needs no GPU and no Triton
    from lowbit_kernels.attention.low_bit_kernel import low_bit_attention_triton

    options, *rounding = _unpack(*packed)
    return low_bit_attention_triton(q, k, v, *options, *rounding)


def _cuda_backward(*args: Any) -> tuple[Tensor, ...]:
    from lowbit_kernels.attention.low_bit_kernel import low_bit_attention_backward_triton

    *saved, needs_table = args
    options, step, high = _unpack(*saved[5:])
    call: list[Any] = [*saved[:5], *options, step, high, needs_table]
    gradients, dstep = low_bit_attention_backward_triton(*call)
    return *gradients, dstep.to(step.dtype).view(step.shape)


implement_on_cuda("lowbit::low_bit_attention", _cuda)
implement_on_cuda("lowbit::low_bit_attention_backward", _cuda_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, ctx.kind, table, rows, seed, step, *ctx.options = inputs
    _, lse = output
    ctx.save_for_backward(q, k, v, lse, lengths, table, rows, seed, step)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 13
    q, k, v, lse, lengths, table, rows, seed, step = ctx.saved_tensors
    needs_table, needs_rows, _, needs_step = ctx.needs_input_grad[5:9]
    dq, dk, dv, dtable, drows, dstep = torch.ops.lowbit.low_bit_attention_backward.default(
        grad_out, q, k, v, lse, lengths, ctx.kind, table, rows, seed, step, *ctx.options,
        needs_table,
    )  # fmt: skip
    of_scheme = dtable if needs_table else None, drows if needs_rows else None
    step_grad = dstep if needs_step else None
    return dq, dk, dv, None, None, *of_scheme, None, step_grad, None, None, None, None


torch.library.register_autograd(
    "lowbit::low_bit_attention", _backward, setup_context=_setup_context
)


def low_bit_attention(
    q: Tensor, k: Tensor, v: Tensor, step: Tensor, *, bits: int,
    input_steps: tuple[Tensor, Tensor, Tensor] | None = None, method: str = "lsq",
    lengths: Tensor | None = None, window: int | None = None,
    position: Position | Scheme | None = None, scale: float | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attend with operands that are rounded to few bits, with a gradient to train through.

    ``flash_attention`` whose probabilities, after the softmax, become ``step`` times the nearest of
    the levels 0 to ``2 ** bits - 1`` before dropout and the product with v: BiT's quantizer of
    what is not negative (arXiv 2205.13016). With ``input_steps`` q, k and v are fake-quantized,
    too, so that both products of attention are low-bit ones (arXiv 2301.00652); the biases of a
    ``TransformerXL`` are added before, and what scores its positions stays in float. The gradient
    passes straight through up to the highest level and is 0 above; that of the step is LSQ's (arXiv
    1902.08153), ``sum(g (level - p / step)) / sqrt(B H T T (2 ** bits - 1))``, with the level alone
    above the highest. On a GPU no probability is stored.

    Args:
        q: [B, H, T, D], fp16, bf16 or fp32 (fp64 on a CPU), D at most 256; and the others, as
            ``flash_attention`` takes them.
        k: like q.
        v: like q.
        step: one element, floating point, above 0 (2^-24 at least is used). Differentiable.
        bits: 1, 2, 4 or 8.
        input_steps: the scales of q, k and v, like ``step``; see ``Quantizer``. None: they stay.
        method: ``"lsq"`` or ``"elastic"``, of ``input_steps``.
        lengths: as in ``flash_attention``.
        window: as in ``flash_attention``.
        position: as in ``flash_attention``.
        scale: as in ``flash_attention``.
        dropout_p: as in ``flash_attention``.

    Returns:
        [B, H, T, D], in the dtype of q, in ``flash_attention``'s layout.

    Raises:
        ValueError: as ``flash_attention``; on a wrong ``step`` or ``bits``.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}")
    check_heads(q, k, v)
    check_options(q, lengths, window, scale, dropout_p)
    check_position(q, position, window)
    if not step.is_floating_point():
        raise ValueError(f"step must be floating point, got {step.dtype}")
    check_like("step", step.reshape(-1), (1,), step.dtype, q)
    q, k, v = autocast(q, k, v)
    quantizers = [
        Quantizer(Levels.of_input(bits), input_step, method) for input_step in input_steps or ()
    ]
    for name, x, quantizer in zip("qkv", (q, k, v), quantizers, strict=False):
        check_quantizer(quantizer, name, x)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scheme = resolve(q, position, window)
    if scheme is not None:
        q, scheme = scheme.with_rows(q)
        trains = needs_gradient(position, q, k, v)
        if backend_of(q, position=scheme, trains=trains).name == "triton_dense":
            scheme = Scheme("dense", scheme.scores(q.shape[2], scale))
    if quantizers:
        # in the order of memory that a linear layer leaves
        q, k, v = (
            fake_quantize(x.transpose(1, 2), quantizer).transpose(1, 2)
            for x, quantizer in zip((q, k, v), quantizers, strict=True)
        )
    of_scheme = (None,) * 3 if scheme is None else (scheme.kind, scheme.table, scheme.rows)
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
    out: Tensor
    out, _ = torch.ops.lowbit.low_bit_attention.default(
        q, k, v, lengths, *of_scheme, seed, step, window, scale, dropout_p, 2**bits - 1
    )
    return out
