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
        if x.dim() == 2:
            return self._normalize(x.mT[None], lengths)[0].mT
        return self._normalize(x, lengths)

    def _normalize(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1 / self.num_batches_tracked
        return masked_batch_norm(
            x,
            self.weight if self.affine else x.new_ones(self.num_features),
            self.bias if self.affine else x.new_zeros(self.num_features),
            lengths=lengths,
            eps=self.eps,
            activation=self.activation,
            running_mean=self.running_mean,
            running_var=self.running_var,
            momentum=momentum,
            process_group=self._process_group(),
        )

    def _process_group(self) -> dist.ProcessGroup | None:
        if not (self.sync and self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if group is not None and group.size() > 1 else None
