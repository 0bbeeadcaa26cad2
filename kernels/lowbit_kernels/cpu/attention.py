"""Self-attention on a CPU in fp32, faster than PyTorch's where our kernels are compiled.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

import torch
from torch import Tensor

from lowbit_kernels.cpu import library as lib


def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """``softmax(q @ k.T * scale + bias) @ v``; bidirectional, right padding.

    Args:
        q: [B, H, T, D], fp16, bf16 or fp32; computed in fp32.
        k: like q.
        v: like q.
        lengths: [B], the valid frames; later queries give 0, later keys are not seen. None: all.
        bias: broadcastable to [B, H, T, T]; -inf hides a key. None: no bias.
        window: frames a query sees on each side of itself. None: all.
        scale: multiplies the scores.

    Returns:
        out [B, H, T, D], a view of memory [B, T, H, D], and the logarithm of the softmax's
        denominator [B, H, T] fp32; both 0 for a query that sees nothing. None where our kernels
        are not compiled: PyTorch's own attention serves there.
    """
    library = lib.native()
    if library is None:
        return None
    B, H, T, D = q.shape
    out, lse = torch.empty(B, T, H, D), torch.empty(B, H, T)
    if q.numel():
        q_rows, k_rows, v_rows = (_rows(t) for t in (q, k, v))
        bias = None if bias is None else _rows(bias.expand(*bias.shape[:-1], T)).expand(B, H, T, T)
        counts = None if lengths is None else lengths.to(torch.int64).contiguous()
        arguments = lib.Attention(
            B=B, H=H, T=T, D=D,
            q=lib.pointer(q_rows), k=lib.pointer(k_rows), v=lib.pointer(v_rows),
            q_strides=q_rows.stride()[:3], k_strides=k_rows.stride()[:3],
            v_strides=v_rows.stride()[:3], lengths=lib.pointer(counts),
            bias=lib.pointer(bias), bias_strides=(0, 0, 0) if bias is None else bias.stride()[:3],
            window=-1 if window is None else window, scale=scale,
            out=lib.pointer(out), lse=lib.pointer(lse), threads=lib.threads(),
        )  # fmt: skip
        if library.attention(arguments):
            raise MemoryError("no memory for the keys of an attention layer")
    return out.to(q.dtype).transpose(1, 2), lse


def _rows(x: Tensor) -> Tensor:
    """fp32 with a contiguous last dimension."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
