"""Learned scales of inputs: set by the first batches of all processes together."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit_kernels.modules.low_bit_matmuls import LowBitMatmuls
from lowbit_kernels.modules.qat_base import QATModule


def is_scale(name: str) -> bool:
    """Whether a parameter is a quantizer's, by its dotted name."""
    return name.rpartition(".")[2] in (
        "weight_step", "input_step", "q_step", "k_step", "v_step", "prob_step"
    )  # fmt: skip


@torch.no_grad()
def set_scales(model: nn.Module, run: Callable[[Any], Any], batches: Iterable[Any]) -> bool:
    """Set the scales of inputs that nothing has set: means over batches and processes.

    Before a model is wrapped by an engine: FSDP2 loses what a forward writes into a parameter. The
    model runs in evaluation mode, so dropout and running statistics play no part.

    Args:
        model: from ``prepare_qat``; with no such scales nothing happens.
        run: runs the model on a batch.
        batches: of this process, as many and as large as those of the others.

    Returns:
        Whether all are set: not where a batch was not finite, which leaves them as they were.
    """
    unset = _unset(model)
    if not unset:
        return True
    was_training, sums = model.training, [torch.zeros_like(scale) for _, _, scale in unset]
    model.eval()
    count = 0
    for batch in batches:
        run(batch)
        count += 1
        for total, (module, flag, scale) in zip(sums, unset, strict=True):
            total += scale
            _reset(module, flag, scale)
    model.train(was_training)
    if dist.is_initialized():
        for total in sums:
            dist.all_reduce(total)
        count *= dist.get_world_size()
    if not all(bool(total.isfinite()) for total in sums):
        return False
    for total, (module, flag, scale) in zip(sums, unset, strict=True):
        scale.copy_(total / count)
        setattr(module, flag, bool(scale != 0))
    return True


def _unset(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Scales that are 0, with their modules and the flags that say they are set."""
    found: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules():
        if isinstance(module, QATModule) and module.input_step is not None:
            found.append((module, "_input_is_set", module.input_step))
        elif isinstance(module, LowBitMatmuls):
            steps = (module.q_step, module.k_step, module.v_step, module.prob_step)
            found += [(module, "_is_set", step) for step in steps]
    return [entry for entry in found if not entry[2].any()]


def _reset(module: nn.Module, flag: str, scale: Tensor) -> None:
    scale.zero_()
    setattr(module, flag, False)
