"""Engines: one process, DDP, FSDP2, or Accelerate. Launched by ``torchrun`` or ``accelerate``."""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ssl_models.error_propagation.sources import find_blocks
from ssl_models.training.recipe import Recipe
from ssl_models.training.scales import is_scale

ENGINES = ("plain", "ddp", "fsdp", "accelerate")


class Engine:
    """One process; the others change what they must.

    Attributes:
        rank: of this process.
        world: how many there are.
        device: where it computes.
    """

    rank, world = 0, 1

    def __init__(self, model: nn.Module) -> None:
        self.device = next(model.parameters()).device

    def wrap(self, module: nn.Module, recipe: Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What is called in training, and an optimizer of its parameters."""
        return module, make_optimizer(module, recipe)

    def backward(self, module: nn.Module, loss: Tensor) -> None:
        """Add to the gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def apart(self, module: nn.Module, is_last: bool) -> Iterator[None]:
        """Gradients are shared among processes after a step's last batch alone."""
        yield

    def finish_gradients(self, module: nn.Module) -> None:
        """Share what the engine has not."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values


class DDPEngine(Engine):
    """``DistributedDataParallel``; each process has the whole model."""

    def __init__(self, model: nn.Module) -> None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        has_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", local) if has_gpu else torch.device("cpu")
        if has_gpu:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if has_gpu else "gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def wrap(self, module: nn.Module, recipe: Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Buffers are means over processes in the state file, not the first one's."""
        with warnings.catch_warnings():
            # its new name is not in every torch that is served
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
        return wrapped, make_optimizer(module, recipe)

    @contextlib.contextmanager
    def apart(self, module: Any, is_last: bool) -> Iterator[None]:
        """``no_sync`` but for the last."""
        with contextlib.nullcontext() if is_last else module.no_sync():
            yield


class FSDPEngine(DDPEngine):
    """FSDP2's ``fully_shard``: a group a layer of the encoder, and one for the rest.

    It cannot shard scalars, which the scales of inputs are: each process has them.
    """

    def wrap(self, module: nn.Module, recipe: Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model is sharded in place."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        scalars = {p for p in module.parameters() if p.dim() == 0}
        for name in find_blocks(module):
            block = module.get_submodule(name)
            # a table in the first layer that the encoder reads
            if not any(isinstance(part, nn.Embedding) for part in block.modules()):
                fully_shard(block, mesh=mesh, ignored_params=scalars)
        fully_shard(module, mesh=mesh, ignored_params=scalars)
        return module, make_optimizer(module, recipe)

    @contextlib.contextmanager
    def apart(self, module: Any, is_last: bool) -> Iterator[None]:
        """Gradients stay whole until the last."""
        module.set_requires_gradient_sync(is_last)
        yield

    def finish_gradients(self, module: nn.Module) -> None:
        """Means of the gradients of what is not sharded."""
        for parameter in module.parameters():
            if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
                self.mean(parameter.grad)


class AccelerateEngine(Engine):
    """Accelerate's, as its own launcher and configuration say."""

    def __init__(self, model: nn.Module) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes

    def wrap(self, module: nn.Module, recipe: Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both prepared; the optimizer is the bare one, whose steps the loop decides on."""
        wrapped = self.accelerator.prepare(module)
        return wrapped, make_optimizer(wrapped, recipe)

    def backward(self, module: nn.Module, loss: Tensor) -> None:
        """Accelerate's."""
        self.accelerator.backward(loss)

    @contextlib.contextmanager
    def apart(self, module: nn.Module, is_last: bool) -> Iterator[None]:
        """``no_sync`` but for the last."""
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(module):
            yield


_KINDS = {"plain": Engine, "ddp": DDPEngine, "fsdp": FSDPEngine, "accelerate": AccelerateEngine}


def make_engine(name: str | None, model: nn.Module) -> Engine:
    """An engine by its name; None: DDP where ``torchrun`` started several processes.

    Raises:
        ValueError: for an unknown name.
    """
    if name is None:
        name = "ddp" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "plain"
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {name!r}")
    return _KINDS[name](model)


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; norms, biases and learned scales have no weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and not is_scale(name)
            # one call computes sharded parameters, or others, but not both
            groups.setdefault((decays, isinstance(parameter, DTensor)), []).append(parameter)
    if not groups:
        raise ValueError("model must have parameters that learn, got none")
    decay = recipe.weight_decay
    options = [
        {"params": chosen, "weight_decay": decay if decays else 0.0, "fused": not is_sharded}
        for (decays, is_sharded), chosen in sorted(groups.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(options, lr=recipe.peak_rate, betas=(0.9, 0.98))


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to ``max_norm``, those of sharded parameters and of others together.

    Returns:
        Their norm before.
    """
    graded = [p for p in parameters if p.grad is not None]
    kinds = [
        [p for p in graded if isinstance(p.grad, DTensor) == is_sharded]
        for is_sharded in (False, True)
    ]
    norms = []
    for chosen in kinds:
        norm = nn.utils.get_total_norm([p.grad for p in chosen if p.grad is not None])
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
    total = math.hypot(*norms)
    if math.isfinite(total):
        for chosen in kinds:
            nn.utils.clip_grads_with_norm_(chosen, max_norm, torch.tensor(total))
    return total
