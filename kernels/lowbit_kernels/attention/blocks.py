"""Attention within disjoint blocks of frames, as in the Sparseformer.

Dimension key: B batch, H heads, T frames, D head dimension, N blocks, W frames of a block.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.attention.checks import check_heads, check_options, check_position
from lowbit_kernels.attention.op import flash_attention
from lowbit_kernels.attention.position import BucketedBias, DenseBias, Position


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    lengths: Tensor | None = None,
    position: Position | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    attention: Callable[..., Tensor] = flash_attention,
) -> Tensor:
    """Attend every frame to those of its block: frames 0 to W - 1, W to 2 W - 1, and so on.

    One call of ``attention``, whose batch are the blocks. q, k and v are copied only where T
    is no multiple of W, or frames are not evenly spaced in memory across utterances.

    Args:
        q: [B, H, T, D], and the others, as ``flash_attention`` takes them.
        k: like q.
        v: like q.
        block: W, above 0. T or more: all frames see each other.
        lengths: [B], as in ``flash_attention``.
        position: as in ``flash_attention``, but no ``DenseBias``; offsets below W are enough.
        scale: as in ``flash_attention``.
        dropout_p: as in ``flash_attention``.
        attention: what is called, with ``flash_attention``'s arguments.

    Returns:
        [B, H, T, D], in the dtype of q.

    Raises:
        ValueError: as ``flash_attention``; on a wrong ``block`` or a ``DenseBias``.
    """
    check_heads(q, k, v)
    check_options(q, lengths, None, scale, dropout_p)
    if type(block) is bool or not isinstance(block, int) or block < 1:
        raise ValueError(f"block must be an int >= 1 (frames), got {block}")
    if isinstance(position, DenseBias):
        raise ValueError(
            "position must be None or a scheme of offsets, which all blocks share, got DenseBias"
        )
    B, _, T, _ = q.shape
    check_position(q, position, block - 1)
    if block >= T:
        return attention(
            q, k, v, lengths=lengths, position=position, scale=scale, dropout_p=dropout_p
        )
    if isinstance(position, BucketedBias) and position.gate is not None:
        position = replace(position, gate=_in_blocks(position.gate[..., None], block)[..., 0])
    num_blocks = -(-T // block)
    if lengths is None and T % block:
        lengths = torch.full((B,), T, device=q.device)
    if lengths is not None:
        # beyond a block's end acts as its end
        first = torch.arange(0, T, block, device=q.device)
        lengths = (lengths.clamp(max=T)[:, None] - first).flatten()
    heads = (_in_blocks(x, block) for x in (q, k, v))
    out = attention(*heads, lengths=lengths, position=position, scale=scale, dropout_p=dropout_p)
    frames = out.transpose(1, 2).reshape(B, num_blocks * block, *q.shape[1::2])
    return frames[:, :T].transpose(1, 2)


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, T, D] to [B * N, H, W, D], padded with zeros."""
    B, H, T, D = x.shape
    frames = x.transpose(1, 2)
    if T % block:
        frames = F.pad(frames, (0, 0, 0, 0, 0, -T % block))
    return frames.reshape(B * -(-T // block), block, H, D).transpose(1, 2)
