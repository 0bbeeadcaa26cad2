"""Attention of utterances that lie one after the other, without padding.

Dimension key: B utterances, H heads, D head dimension; total the frames of all of them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lowbit_kernels.attention.op import attend
from lowbit_kernels.attention.position import BucketedBias, DenseBias, Position


def flash_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window: int | None = None,
    position: Position | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend every frame to those of its utterance; nothing is padded, nor computed for padding.

    The convention is that of flash-attn's ``flash_attn_varlen_func``, the kernels are those of
    ``flash_attention``. The parts ``qkv.unbind(1)`` of a joined [total, 3, H, D] are not copied.

    Args:
        q: [total, H, D], fp16, bf16 or fp32 (fp64 on a CPU), D at most 256. Any strides.
        k: like q.
        v: like q.
        cu_seqlens: [B + 1] int32 on q's device: where each utterance begins, and total. An
            utterance may be empty. Its values are checked on a CPU alone, as a GPU would have to be
            waited for: wrong ones give undefined results there.
        max_seqlen: the frames of the longest utterance, or more: a number of the host.
        window: as in ``flash_attention``.
        position: as in ``flash_attention``, shared by the utterances: no ``DenseBias``; the gate of
            a ``BucketedBias`` is [total, H]; a ``TransformerXL``'s R at least max_seqlen - 1, or
            the window.
        scale: as in ``flash_attention``.
        dropout_p: as in ``flash_attention``.

    Returns:
        [total, H, D], contiguous, in the dtype of q.

    Raises:
        ValueError: on a wrong shape, dtype, device or value, naming the argument.
        NotImplementedError: for gradients with a position in fp32 with D above 64, on a GPU.
    """
    _check(q, cu_seqlens, max_seqlen)
    if isinstance(position, DenseBias):
        raise ValueError(
            "position must be None or a scheme of offsets, which all utterances share (a bias of "
            "their own is served by flash_attention on a padded batch), got DenseBias"
        )
    if isinstance(position, BucketedBias) and position.gate is not None:
        if position.gate.shape != q.shape[:2]:
            wanted, got = list(q.shape[:2]), list(position.gate.shape)
            raise ValueError(f"position.gate must be [total, H] = {wanted}, got {got}")
        position = replace(position, gate=position.gate.t()[None])
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name} must have q's shape {list(q.shape)}, got {list(x.shape)}")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    starts = cu_seqlens.contiguous()
    out = attend(q, k, v, starts, window, position, scale, dropout_p, longest=max_seqlen)
    return out[0].transpose(0, 1)


def _check(q: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    if q.dim() != 3:
        raise ValueError(f"q must be [total, H, D], got shape {list(q.shape)}")
    if type(max_seqlen) is bool or not isinstance(max_seqlen, int) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be an int >= 0 (frames), got {max_seqlen!r}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens must be an int32 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens must be [B + 1] on {q.device}, "
            f"got {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    most = (cu_seqlens.shape[0] - 1) * max_seqlen
    if q.shape[0] > most:
        raise ValueError(
            f"max_seqlen must hold q's {q.shape[0]} frames in {cu_seqlens.shape[0] - 1} "
            f"utterances, got {max_seqlen}"
        )
