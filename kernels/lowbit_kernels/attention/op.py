"""torch.ops.lowbit.flash_attention: schema, validation, fake, backends and gradient.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.attention.checks import check_heads, check_options, check_position
from lowbit_kernels.attention.config import clips_offsets
from lowbit_kernels.attention.dispatch import backend_of, flash_attn, needs_gradient, sdpa
from lowbit_kernels.attention.packed_cpu import (
    attend_packed,
    differentiate_packed,
    empty_lse,
    empty_rows_gradient,
)
from lowbit_kernels.attention.position import Position, Scheme, resolve
from lowbit_kernels.attention.reference import (
    attention_mask,
    flash_attention_backward_reference,
    flash_attention_reference,
)
from lowbit_kernels.checks import check_like
from lowbit_kernels.cpu import attention_backward_cpu, attention_cpu, empty_heads
from lowbit_kernels.device import implement_on_cuda
from lowbit_kernels.matmul.reference import quantize_rows

torch.library.define(
    "lowbit::flash_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? lengths, str? kind, Tensor? table, Tensor? rows, "
    "Tensor? seed, int? window, float? scale, float dropout_p, Tensor? content_bias=None, "
    "Tensor? position_bias=None, Tensor? out_scale=None, int? left=None, SymInt? longest=None) "
    "-> (Tensor out, Tensor lse)",
)
torch.library.define(
    "lowbit::flash_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? lengths, "
    "str? kind, Tensor? table, Tensor? rows, Tensor? seed, int? window, float? scale, "
    "float dropout_p, bool needs_table, SymInt? longest=None) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dtable, Tensor drows)",
)


@torch.library.register_fake("lowbit::flash_attention")
def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    q, _, _, lengths, *_, out_scale, longest = _unpack(*args)
    out = empty_heads(q, None if out_scale is None else torch.int8)
    return out, empty_lse(q, lengths, longest)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.register_fake("lowbit::flash_attention_backward")
def _fake_backward(*args: Any) -> Gradients:
    inputs, longest = _unpack_backward(*args)
    q, scheme, needs_table = inputs[1], inputs[7], inputs[-1]
    drows, dtable = empty_rows_gradient(q, scheme, longest is not None), q.new_empty(0)
    if scheme is not None and needs_table:
        dtable = scheme.table.new_empty(scheme.table.shape)
    return empty_heads(q), empty_heads(q), empty_heads(q), dtable, drows


def _unpack(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, kind: str | None,
    table: Tensor | None, rows: Tensor | None, seed: Tensor | None, window: int | None,
    scale: float | None, dropout_p: float, content_bias: Tensor | None = None,
    position_bias: Tensor | None = None, out_scale: Tensor | None = None, left: int | None = None,
    longest: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the op, of which some become a scheme; the scale is never None."""
    scheme = biases = None
    if content_bias is not None and position_bias is not None:
        biases = content_bias, position_bias
    if kind is not None and table is not None:
        scheme = Scheme(kind, table, rows, biases, left)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return q, k, v, lengths, scheme, seed, window, scale, dropout_p, out_scale, longest


def _unpack_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lengths: Tensor | None, kind: str | None, table: Tensor | None, rows: Tensor | None,
    seed: Tensor | None, window: int | None, scale: float | None, dropout_p: float,
    needs_table: bool, longest: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the gradient's op, likewise; the longest utterance."""
    shared = (lengths, kind, table, rows, seed, window, scale, dropout_p)
    options = _unpack(q, k, v, *shared)[3:9]
    return (grad_out, q, k, v, out, lse, *options, needs_table), longest


def _cpu_native(q: Tensor) -> bool:
    """Whether to ask for our kernels: the same answer in both directions, as dropout needs."""
    return q.dtype != torch.float64


def dropout_keep(q: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """The dropout mask of this seed, divided by the probability to keep."""
    if seed is None:
        return None
    B, H, T, _ = q.shape
    generator = torch.Generator().manual_seed(int(seed))
    return (torch.rand(B, H, T, T, generator=generator) >= dropout_p) / (1 - dropout_p)


def _cpu_bias(
    q: Tensor, lengths: Tensor | None, bias: Tensor | None, window: int | None
) -> Tensor | None:
    """The bias with -inf wherever a key is not to be seen, broadcastable to [B, H, T, T]."""
    T, dtype = q.shape[2], q.dtype
    if bias is not None:
        bias = bias.to(dtype)
    if window is not None:
        allowed = attention_mask(T, lengths, window, q.device)
    elif lengths is not None:
        # a mask of the keys is enough: the rows of padded queries are zeroed afterwards
        allowed = (torch.arange(T) < lengths[:, None])[:, None, None]
    else:
        return bias
    if bias is None:
        bias = torch.zeros((), dtype=dtype)
    return torch.where(allowed, bias, -torch.inf)


@torch.library.impl("lowbit::flash_attention", "cpu")
def _cpu(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, out_scale, longest = _unpack(*args)
    if longest is None:
        out, lse = attend_cpu(*inputs)
    else:
        out, lse = attend_packed(attend_cpu, *inputs, longest=longest)
    if out_scale is None:
        return out, lse
    rows = out.transpose(1, 2)
    levels = quantize_rows(rows.flatten(0, 2), out_scale.expand(lse.numel())).view(rows.shape)
    return empty_heads(out, torch.int8).copy_(levels.transpose(1, 2)), lse


def attend_cpu(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scheme: Scheme | None,
    seed: Tensor | None, window: int | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0:
        return empty_heads(q), q.new_empty(q.shape[:3], dtype=wide)
    if scheme is not None:
        q, scheme = scheme.expanded(q.shape[2] - 1).with_rows(q)
    bias = scheme_scores(q, scheme, scale)
    if _cpu_native(q):
        drop: tuple[int, float] = (0, 0.0) if seed is None else (int(seed), dropout_p)
        native = attention_cpu(q, k, v, lengths, bias, window, scale, *drop)
        if native is not None:
            return native
    out = empty_heads(q)
    if seed is not None:
        result, lse = flash_attention_reference(
            q.to(wide), k.to(wide), v.to(wide), lengths, bias, window, scale,
            dropout_keep(q, seed, dropout_p),
        )  # fmt: skip
        return out.copy_(result), lse
    # what F.scaled_dot_product_attention runs on a CPU, called by name for its second output
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=_cpu_bias(q, lengths, bias, window), scale=scale
    )
    lse = lse.contiguous()
    if lengths is not None:
        padded = (torch.arange(q.shape[2]) >= lengths[:, None])[:, None]  # [B, 1, T]
        result.masked_fill_(padded[..., None], 0.0)
        lse.masked_fill_(padded, 0.0)
    return out.copy_(result), lse


@torch.library.impl("lowbit::flash_attention_backward", "cpu")
def _cpu_backward(*args: Any) -> Gradients:
    inputs, longest = _unpack_backward(*args)
    if longest is None:
        return _differentiate_cpu(*inputs)
    return differentiate_packed(_differentiate_cpu, *inputs, longest=longest)


def _differentiate_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lengths: Tensor | None, scheme: Scheme | None, seed: Tensor | None, window: int | None,
    scale: float, dropout_p: float, needs: bool,
) -> Gradients:  # fmt: skip
    """The gradients of ``attend_cpu``."""
    bias = scheme_scores(q, scheme, scale)
    needs_scores = scheme is not None and (needs or scheme.rows is not None)
    if _cpu_native(q):
        drop: tuple[int, float] = (0, 0.0) if seed is None else (int(seed), dropout_p)
        native = attention_backward_cpu(
            grad_out, q, k, v, out, lse, lengths, bias, window, scale, *drop, needs_scores
        )
        if native is not None:
            dq, dk, dv, grad_scores = native
            return dq, dk, dv, *scheme_gradients(q, grad_scores, scheme, scale, needs)
    wide = torch.promote_types(q.dtype, torch.float32)
    *grads, grad_scores = flash_attention_backward_reference(
        grad_out.to(wide), q.to(wide), k.to(wide), v.to(wide), out.to(wide),
        lengths, bias, window, scale, dropout_keep(q, seed, dropout_p),
    )  # fmt: skip
    dq, dk, dv = (empty_heads(q).copy_(grad) for grad in grads)
    return dq, dk, dv, *scheme_gradients(q, grad_scores, scheme, scale, needs)


def scheme_scores(q: Tensor, scheme: Scheme | None, scale: float) -> Tensor | None:
    """What the scheme adds to the scores, materialized, in fp32 unless it is a tensor already."""
    if scheme is None or scheme.kind == "dense":
        return None if scheme is None else scheme.table
    return scheme.to(torch.promote_types(q.dtype, torch.float32)).scores(q.shape[2], scale)


def scheme_gradients(
    q: Tensor, grad_scores: Tensor | None, scheme: Scheme | None, scale: float, needs_table: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the scheme's table and rows; [0] where there is none, or it is not needed."""
    dtable, drows = q.new_empty(0), q.new_empty(0)
    if scheme is None:
        return dtable, drows
    if grad_scores is not None:
        of_table, of_rows = scheme.gradients(grad_scores, scale)
        if needs_table:
            dtable = of_table.to(scheme.table.dtype)
        if of_rows is not None and scheme.rows is not None:
            drows = of_rows.to(scheme.rows.dtype)
            drows = empty_heads(q).copy_(drows) if scheme.kind == "relative" else drows
    return dtable, drows


def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    # imported on first use, so that `import lowbit_kernels` needs no GPU and no Triton
    from lowbit_kernels.attention.forward_kernel import flash_attention_triton

    *inputs, longest = _unpack(*args)
    return flash_attention_triton(*(*inputs, None, longest))


def _cuda_backward(*args: Any) -> Gradients:
    from lowbit_kernels.attention.backward_kernel import flash_attention_backward_triton

    inputs, longest = _unpack_backward(*args)
    return flash_attention_backward_triton(*(*inputs, None, longest))


implement_on_cuda("lowbit::flash_attention", _cuda)
implement_on_cuda("lowbit::flash_attention_backward", _cuda_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, ctx.kind, table, rows, seed, *options = inputs
    assert options[3:7] == [None] * 4, "what serves inference alone has no gradient"
    ctx.options, ctx.longest, (out, lse) = options[:3], options[7], output
    ctx.save_for_backward(q, k, v, out, lse, lengths, table, rows, seed)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 16
    *tensors, table, rows, seed = ctx.saved_tensors
    needs_table, needs_rows = ctx.needs_input_grad[5:7]
    dq, dk, dv, dtable, drows = torch.ops.lowbit.flash_attention_backward.default(
        grad_out, *tensors, ctx.kind, table, rows, seed, *ctx.options, needs_table, ctx.longest
    )
    table_grad, rows_grad = dtable if needs_table else None, drows if needs_rows else None
    return dq, dk, dv, None, None, table_grad, rows_grad, *(None,) * 9


torch.library.register_autograd("lowbit::flash_attention", _backward, setup_context=_setup_context)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    window: int | None = None,
    position: Position | Scheme | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend every frame to every other in both directions, without storing the scores.

    Equivalent to ``F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, scale=scale)``
    with an ``attn_mask`` that holds the bias, and -inf for keys beyond ``lengths`` or ``window``.
    A query with nothing to attend to, as those of padding frames, gives 0 and has gradient 0.
    ``lowbit_kernels.attention.backend_of`` says which backend serves a call, and why.

    Args:
        q: [B, H, T, D], fp16, bf16 or fp32 (fp64 on a CPU), D at most 256. Any strides. Under
            autocast q, k and v are cast to autocast's dtype.
        k: like q.
        v: like q.
        lengths: [B], int32 or int64, on q's device: the valid frames of each utterance, the rest
            being padding (of finite numbers) on the right. Below 0 acts as 0, above T as T.
        window: frames that a query sees on each side of itself. None: all of them.
        position: what is added to the scores: None, or a ``DenseBias``, ``BucketedBias``,
            ``RelativeKey`` or ``TransformerXL``. On a GPU only a ``DenseBias`` and its gradient
            take memory that grows with the square of T, and gradients of the others in fp32 with
            D above 64; on a CPU each of them does.
        scale: multiplies q @ k, above 0. None: 1 / sqrt(D).
        dropout_p: the probability to drop an attention weight, in [0, 1). The mask is drawn from
            PyTorch's generator of q's device, anew at every replay of a CUDA graph.

    Returns:
        [B, H, T, D], in the dtype of q, laid out so that ``.transpose(1, 2)`` is contiguous.

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
    """
    return attend(q, k, v, lengths, window, position, scale, dropout_p)


def attend_int8(
    q: Tensor, k: Tensor, v: Tensor, out_scale: Tensor, *, lengths: Tensor | None = None,
    window: int | None = None, position: Position | Scheme | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend, and quantize the result for a linear layer with static int8 inputs.

    Equal, bit by bit, to what such a layer makes of ``flash_attention``'s result; in one launch,
    always of the kernels here.

    Args:
        q: [B, H, T, D], and the others, as ``flash_attention`` takes them.
        k: like q.
        v: like q.
        out_scale: [] fp32, what a unit of the result stands for.
        lengths: as in ``flash_attention``.
        window: as in ``flash_attention``.
        position: as in ``flash_attention``.
        scale: as in ``flash_attention``.

    Returns:
        [B, H, T, D] int8, ``round(out / out_scale)`` in [-127, 127], in ``flash_attention``'s
        layout. It has no gradient.

    Raises:
        ValueError: as ``flash_attention``; on a wrong ``out_scale``; where an input needs a
            gradient.
    """
    check_like("out_scale", out_scale, (), torch.float32, q)
    return attend(q, k, v, lengths, window, position, scale, 0.0, out_scale)


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window: int | None,
    position: Position | Scheme | None, scale: float | None, dropout_p: float,
    out_scale: Tensor | None = None, longest: int | None = None,
) -> Tensor:  # fmt: skip
    """``flash_attention``; with ``longest`` of packed utterances [1, H, total, D].

    ``lengths`` are where they begin, then, and the end: [B + 1].
    """
    check_heads(q, k, v)
    check_options(q, lengths if longest is None else None, window, scale, dropout_p)
    reach = window
    if longest is not None:
        reach = longest - 1 if window is None else min(window, longest - 1)
    check_position(q, position, reach)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    trains = needs_gradient(position, q, k, v)
    backend = backend_of(q, lengths=lengths, position=position, trains=trains)
    if trains and out_scale is not None:
        raise ValueError("out_scale: an int8 result has no gradient, which an input needs here")
    if backend.name == "flash_attn" and out_scale is None:
        return flash_attn(q, k, v, window, scale, dropout_p)
    is_dense = backend.name in ("sdpa", "triton_dense")
    if is_dense and longest is not None:
        raise NotImplementedError(f"no kernel serves such packed utterances: {backend.reason}")
    compact = not trains and not is_dense and clips_offsets(q.shape[-1], q.dtype)
    scheme = resolve(q, position, reach, compact=compact)
    if scheme is not None and (trains or is_dense):
        q, scheme = scheme.with_rows(q)
    if scheme is not None and is_dense:
        scheme = Scheme("dense", scheme.scores(q.shape[2], scale or q.shape[-1] ** -0.5))
    if backend.name == "sdpa" and out_scale is None:
        bias = None if scheme is None else scheme.table
        return sdpa(q, k, v, lengths, bias, window, scale, dropout_p)
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
    out: Tensor
    of_scheme = (None,) * 3 if scheme is None else (scheme.kind, scheme.table, scheme.rows)
    biases = (None, None) if scheme is None or scheme.biases is None else scheme.biases
    out, _ = torch.ops.lowbit.flash_attention.default(
        q, k, v, lengths, *of_scheme, seed, window, scale, dropout_p, *biases, out_scale,
        None if scheme is None else scheme.left, longest,
    )  # fmt: skip
    return out
