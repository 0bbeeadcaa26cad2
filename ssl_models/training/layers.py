"""What a run does to an encoder's layers: some are passed by, and activations computed again."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_models.error_propagation.sources import find_blocks
from ssl_models.training.recipe import Recipe


@contextlib.contextmanager
def changed_layers(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Pass layers by, or recompute them, as the recipe says, inside the ``with``.

    LayerDrop computes a layer that is passed by, and takes its input instead of its output: all
    parameters have gradients, zeros there, on every process, as DDP and FSDP2 need. It regularizes
    and saves no time.

    Raises:
        ValueError: for a model in which no layer is found.
    """
    needed = recipe.layer_drop or recipe.checkpoint_activations
    blocks = [model.get_submodule(name) for name in find_blocks(model)] if needed else []
    with contextlib.ExitStack() as changes:
        for block in blocks:
            if recipe.checkpoint_activations:
                block.forward = partial(_recomputed, block, block.forward)
                changes.callback(block.__dict__.pop, "forward", None)
            if recipe.layer_drop:
                hook = block.register_forward_hook(partial(_drop, recipe.layer_drop))
                changes.enter_context(hook)
        yield


def _drop(probability: float, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not block.training:
        return None
    # drawn on the CPU, and not read: a GPU need not wait
    is_dropped = (torch.rand(()) < probability).to(args[0].device)
    first = output[0] if isinstance(output, tuple) else output
    chosen: Tensor = torch.where(is_dropped, args[0].to(first.dtype), first)
    return (chosen, *output[1:]) if isinstance(output, tuple) else chosen


def _recomputed(block: nn.Module, forward: Any, *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    contexts = partial(_contexts, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **options)


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _still_statistics(block)


@contextlib.contextmanager
def _still_statistics(block: nn.Module) -> Iterator[None]:
    """Running statistics have seen the batch: the second time they stay."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in momenta:
            norm.momentum, norm.num_batches_tracked = momentum, count
