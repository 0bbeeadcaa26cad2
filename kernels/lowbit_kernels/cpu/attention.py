"""Self-attention on a CPU in fp32, faster than PyTorch's where our kernels are compiled.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.cpu import library as lib


def empty_heads(q: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized [B, H, T, D] in memory order [B, T, H, D]: heads merge without a copy.

    It is no view, so that autograd lets a caller write into it.
    """
    _, H, T, D = q.shape
    strides = (T * H * D, D, H * D, 1)
    return torch.empty_strided(q.shape, strides, dtype=dtype or q.dtype, device=q.device)


def empty_gates(q: Tensor, dtype: torch.dtype, is_packed: bool) -> Tensor:
    """Uninitialized [B, H, T]; of packed utterances in memory order [B, T, H]."""
    if is_packed:
        return empty_heads(q[..., :1], dtype)[..., 0]
    return q.new_empty(q.shape[:3], dtype=dtype)


def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    window: int | None,
    scale: float,
    seed: int = 0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor] | None:
    """``dropout(softmax(q @ k.T * scale + bias)) @ v``; bidirectional, right padding.

    Args:
        q: [B, H, T, D], fp16, bf16 or fp32; computed in fp32.
        k: like q.
        v: like q.
        lengths: [B], the valid frames; later queries give 0, later keys are not seen. None: all.
        bias: broadcastable to [B, H, T, T]; -inf hides a key. None: no bias.
        window: frames a query sees on each side of itself. None: all.
        scale: multiplies the scores.
        seed: of the weights to drop; with the weight's place it decides alone.
        dropout_p: the probability to drop a weight, in [0, 1).

    Returns:
        out [B, H, T, D] in memory order [B, T, H, D], and the logarithm of the softmax's
        denominator [B, H, T] fp32; both 0 for a query that sees nothing. None where our kernels
        are not compiled: PyTorch's own attention serves there.
    """
    library = lib.native()
    if library is None:
        return None
    out, lse = empty_heads(q, torch.float32), torch.empty(q.shape[:3])
    if q.numel():
        arguments, held = _arguments(lse, q, k, v, lengths, bias, window, scale, seed, dropout_p)
        arguments.out = lib.pointer(out)
        if library.attention(arguments):
            raise MemoryError("no memory for the keys of an attention layer")
        del held
    return out.to(q.dtype), lse


def attention_backward_cpu(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    window: int | None,
    scale: float,
    seed: int = 0,
    dropout_p: float = 0.0,
    needs_bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """The gradients of ``attention_cpu``, in memory that grows with T and not with its square.

    Args:
        grad_out: [B, H, T, D], the gradient of out.
        q: as in the forward.
        k: as in the forward.
        v: as in the forward.
        out: as the forward returned it.
        lse: as the forward returned it.
        lengths: as in the forward.
        bias: as in the forward, here [B or 1, H or 1, T or 1, T or 1].
        window: as in the forward.
        scale: as in the forward.
        seed: as in the forward.
        dropout_p: as in the forward.
        needs_bias_grad: whether to compute that of the bias.

    Returns:
        dq, dk and dv in memory order [B, T, H, D], and dbias like bias, or None unless it is
        needed. Instead of all four None where our kernels are not compiled.
    """
    library = lib.native()
    if library is None:
        return None
    dq, dk, dv = (empty_heads(q, torch.float32).zero_() for _ in range(3))
    dbias = torch.zeros(bias.shape) if bias is not None and needs_bias_grad else None
    if q.numel():
        grad_rows = _rows(grad_out)
        delta = (grad_rows * out).sum(-1).contiguous()
        forward, held = _arguments(lse, q, k, v, lengths, bias, window, scale, seed, dropout_p)
        arguments = lib.AttentionGradient(
            forward=forward, grad_out=lib.pointer(grad_rows), grad_strides=grad_rows.stride()[:3],
            delta=lib.pointer(delta), dq=lib.pointer(dq), dk=lib.pointer(dk), dv=lib.pointer(dv),
            dbias=lib.pointer(dbias),
        )  # fmt: skip
        if dbias is not None:
            arguments.bias_sizes = tuple(dbias.shape[:2])
            arguments.dbias_strides = dbias.expand(*q.shape[:3], q.shape[2]).stride()
        if library.attention_backward(arguments):
            raise MemoryError("no memory for the gradient of an attention layer")
        del held
    dq, dk, dv = (grad.to(q.dtype) for grad in (dq, dk, dv))
    return dq, dk, dv, None if dbias is None or bias is None else dbias.to(bias.dtype)


def _arguments(lse: Tensor, *call: Any) -> tuple[lib.Attention, list[Tensor | None]]:
    """Arguments without an output, and the tensors that must live as long as they do."""
    q, k, v, lengths, bias, window, scale, seed, dropout_p = call
    B, H, T, D = q.shape
    q, k, v = (_rows(x) for x in (q, k, v))
    bias = None if bias is None else _rows(bias.expand(*bias.shape[:-1], T)).expand(B, H, T, T)
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    lse = lse.contiguous()
    return lib.Attention(
        B=B, H=H, T=T, D=D, q=lib.pointer(q), k=lib.pointer(k), v=lib.pointer(v),
        q_strides=q.stride()[:3], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        lengths=lib.pointer(lengths),
        bias=lib.pointer(bias), bias_strides=(0, 0, 0) if bias is None else bias.stride()[:3],
        window=-1 if window is None else window, scale=scale, dropout=dropout_p, seed=seed,
        lse=lib.pointer(lse), threads=lib.threads(),
    ), [q, k, v, bias, lengths, lse]  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """fp32 with a contiguous last dimension."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
