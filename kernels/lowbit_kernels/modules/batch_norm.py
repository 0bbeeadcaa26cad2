"""BatchNorm in training, over the valid frames of a batch and followed by an activation.

Dimension key: B batch, C channels, T frames.
"""

import torch.distributed as dist
from torch import Tensor, nn

from lowbit_kernels.norm import masked_batch_norm


def normalize_frames(
    norm: nn.BatchNorm1d | nn.SyncBatchNorm,
    x: Tensor,
    lengths: Tensor | None,
    activation: str | None,
) -> Tensor:
    """What a norm in training makes of valid frames; it updates the norm's running statistics.

    Padding changes neither the statistics nor any result. Those of an ``nn.SyncBatchNorm`` are
    shared by its processes.

    Args:
        norm: with or without parameters and running statistics.
        x: [B, C, T], as in ``masked_batch_norm``.
        lengths: [B], the valid frames; None: all.
        activation: as in ``masked_batch_norm``.

    Returns:
        [B, C, T], 0 beyond the lengths.
    """
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / norm.num_batches_tracked
    group = None
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available():
        group = norm.process_group or dist.group.WORLD
    return masked_batch_norm(
        x,
        norm.weight if norm.affine else x.new_ones(norm.num_features),
        norm.bias if norm.affine else x.new_zeros(norm.num_features),
        lengths=lengths,
        eps=norm.eps,
        activation=activation,
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        momentum=momentum,
        process_group=group if group is not None and group.size() > 1 else None,
    )
