"""MaskedBatchNorm1d: nn.BatchNorm1d that sees valid frames only, and an activation.

Dimension key: B batch, C channels, T frames.
"""

from typing import Any, Self

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_kernels.matmul.reference import apply_epilogue
from lowbit_kernels.norm import masked_batch_norm
from lowbit_kernels.norm.reference import zero_padding


class MaskedBatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over valid frames, followed by an activation; the same state dict.

    In training padding changes neither the statistics nor any result. With
    ``sync`` the statistics are those of all processes of ``process_group``.

    Args:
        num_features: C.
        activation: as in ``masked_batch_norm``.
        sync: whether processes share their statistics, as ``nn.SyncBatchNorm``'s do.
        process_group: which processes; None: all.
        kwargs: of ``nn.BatchNorm1d``.
    """

    def __init__(
        self,
        num_features: int,
        *,
        activation: str | None = None,
        sync: bool = False,
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, **kwargs)
        self.activation, self.sync, self.process_group = activation, sync, process_group

    @classmethod
    def from_float(
        cls, norm: nn.BatchNorm1d | nn.SyncBatchNorm, activation: str | None = None
    ) -> Self:
        """The same norm, sharing its parameters and buffers."""
        sync = isinstance(norm, nn.SyncBatchNorm)
        self = cls(
            norm.num_features,
            activation=activation,
            sync=sync,
            process_group=norm.process_group if isinstance(norm, nn.SyncBatchNorm) else None,
            eps=norm.eps,
            momentum=norm.momentum,
            affine=norm.affine,
            track_running_stats=norm.track_running_stats,
            device="meta",
        )
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        return self.train(norm.training)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """[B, C, T], or without lengths [B, C], to the same; ``lengths`` [B] counts frames."""
        self._check_input_dim(x)
        if not self.training and self.running_mean is not None:
            y = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
            y = apply_epilogue(y, self.activation)
            return y if lengths is None else zero_padding(y.mT, lengths).mT
        process_group = shared_by(self) if self.sync else None
        if x.dim() == 2:
            rows = normalize_frames(self, x.mT[None], None, self.activation, process_group)
            return rows[0].mT
        return normalize_frames(self, x, lengths, self.activation, process_group)


def shared_by(norm: Any) -> dist.ProcessGroup | None:
    """The processes that share a norm's statistics: its own, or all; None: there is one."""
    return norm.process_group or (dist.group.WORLD if dist.is_available() else None)


def normalize_frames(
    norm: nn.BatchNorm1d | nn.SyncBatchNorm,
    x: Tensor,
    lengths: Tensor | None,
    activation: str | None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """What a norm in training makes of valid frames, as ``masked_batch_norm``; updates the norm."""
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / norm.num_batches_tracked
    is_shared = norm.training and process_group is not None and process_group.size() > 1
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
        process_group=process_group if is_shared else None,
    )
