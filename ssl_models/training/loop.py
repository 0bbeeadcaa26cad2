"""train(): one loop for every objective and every engine, which resumes exactly.

A run is a function of its batches and its recipe: the random state is set for each batch. A run
that was killed therefore goes on from its last state as if nothing had been.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssl_models.training import state as states
from ssl_models.training.engine import Engine, clip_gradients, make_engine
from ssl_models.training.layers import changed_layers
from ssl_models.training.recipe import Recipe
from ssl_models.training.scales import set_scales

Objective = Callable[[Any, Any], Tensor]
Report = Callable[[int, float], None]
_KEPT_PROBLEMS = 20


@dataclass
class Summary:
    """What became of a run.

    Attributes:
        losses: of each step, NaN where it was skipped; means over batches and processes.
        skipped_steps: without a finite loss and gradients.
        skipped_clips: audio that batches left out, on the first process.
        problems: what was said of the first ones.
    """

    losses: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    skipped_clips: int = 0
    problems: list[str] = field(default_factory=list)


class TrainingStep(nn.Module):
    """A model and what it learns, as one module: engines wrap it, optimizers see all of it."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self.objective(self.model, batch)


def train(
    model: nn.Module,
    objective: Objective,
    batches: Dataset[Any],
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    engine: str | None = None,
    save_seconds: float = 180.0,
    workers: int = 0,
    report: Report | None = None,
) -> Summary:
    """Train a model in place, saving a state every few minutes and at the end.

    ``recipe.accumulate`` batches make a step, divided among the processes: a run on two processes
    has the losses of one that computes both batches itself. Only statistics of batch norms differ.
    A step whose loss or gradients are not finite is skipped and counted.

    Args:
        model: on its device for one process; engines with several move it. FSDP2 leaves it
            sharded: the state file has all of it.
        objective: gives the loss of a model and a batch; where it is a module, it learns, too.
        batches: ``batches[n]`` is a tensor, a tuple, or has ``to(device)``; a function of n alone.
        recipe: steps, seed, rates.
        folder: for the state file.
        resume: go on from the state in ``folder``, if there is one.
        engine: ``"plain"``, ``"ddp"``, ``"fsdp"`` or ``"accelerate"``; None: DDP where
            ``torchrun`` started several processes, else plain.
        save_seconds: time between two states.
        workers: processes that prepare batches ahead.
        report: called on the first process with each step and its loss.

    Raises:
        ValueError: for a state of another recipe; batches that the processes cannot divide; or
            ``recipe.max_bad_steps`` steps in a row without a finite loss.
    """
    runs = make_engine(engine, model)
    if recipe.accumulate % runs.world:
        raise ValueError(
            f"accumulate must be a multiple of {runs.world} processes, got {recipe.accumulate}"
        )
    module, stored = TrainingStep(model, objective), None
    if resume:
        stored = states.read(folder, recipe)
    if stored is not None:
        module.load_state_dict(stored["model"])
    module.to(runs.device)
    if stored is None:
        _set_scales(module, batches, recipe, runs)
    with changed_layers(model, recipe):
        run = _Run(module, recipe, runs, folder, stored, report)
        run.go(batches, save_seconds, workers)
    return run.summary


class _Run:
    def __init__(
        self,
        module: TrainingStep,
        recipe: Recipe,
        engine: Engine,
        folder: Path,
        stored: dict[str, Any] | None,
        report: Report | None,
    ) -> None:
        self.recipe, self.engine, self.folder, self.report = recipe, engine, folder, report
        self.bare = module
        self.wrapped, self.optimizer = engine.wrap(module, recipe)
        self.summary, self.first, self.bad_in_a_row = Summary(), 0, 0
        if stored is not None:
            states.restore(self.wrapped, self.optimizer, stored)
            self.summary = Summary(**stored["summary"])
            self.first, self.bad_in_a_row = stored["step"], stored["bad_in_a_row"]

    def go(self, batches: Dataset[Any], save_seconds: float, workers: int) -> None:
        recipe = self.recipe
        own = [
            n
            for step in range(self.first, recipe.steps)
            for n in _own_batches(step, recipe, self.engine)
        ]
        loader = DataLoader(batches, batch_size=None, sampler=own, num_workers=workers)
        prepared = zip(own, loader, strict=True)
        saved = time.monotonic()
        for step in range(self.first, recipe.steps):
            wants_save = time.monotonic() - saved > save_seconds
            wants_save = self._step(step, prepared, wants_save) or step + 1 == recipe.steps
            if wants_save:
                self._save(step + 1)
                saved = time.monotonic()

    def _step(self, step: int, prepared: Iterator[tuple[int, Any]], wants_save: bool) -> bool:
        """Returns whether the first process wants to save: all must."""
        recipe, engine = self.recipe, self.engine
        self.wrapped.train()
        before = [each.clone() for each in _statistics(self.bare)]
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        count = recipe.accumulate // engine.world
        # of all processes after the sum: the loss, and the first one's wish
        shared = torch.zeros(2, dtype=torch.float64)
        shared[1] = wants_save and engine.rank == 0
        for i in range(count):
            number, batch = next(prepared)
            self._note(batch)
            _seed(recipe.seed, number)
            with engine.apart(self.wrapped, i + 1 == count):
                with torch.autocast(engine.device.type, torch.bfloat16, enabled=recipe.bf16):
                    loss = self.wrapped(to_device(batch, engine.device)) / count
                engine.backward(self.wrapped, loss)
            shared[0] += loss.detach().double().cpu()
        engine.finish_gradients(self.wrapped)
        mean, wish = engine.mean(shared.to(engine.device)).tolist()
        norm = clip_gradients(list(self.wrapped.parameters()), recipe.max_grad_norm)
        if math.isfinite(mean) and math.isfinite(norm):
            self.optimizer.step()
            self.bad_in_a_row = 0
        else:
            self._skip(step, mean, norm, before)
        self.optimizer.zero_grad()
        self.summary.losses.append(mean if self.bad_in_a_row == 0 else math.nan)
        if self.report is not None and engine.rank == 0:
            self.report(step, self.summary.losses[-1])
        return bool(wish > 0)

    def _skip(self, step: int, loss: float, norm: float, before: list[Tensor]) -> None:
        for statistic, value in zip(_statistics(self.bare), before, strict=True):
            statistic.copy_(value)
        self.summary.skipped_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.recipe.max_bad_steps:
            raise ValueError(
                f"loss and gradients must be finite, got {loss:g} and a norm of {norm:g}, "
                f"the last of {self.bad_in_a_row} such steps in a row, at step {step}; "
                "the last state is kept"
            )

    def _note(self, batch: Any) -> None:
        self.summary.skipped_clips += getattr(batch, "skipped", 0)
        room = _KEPT_PROBLEMS - len(self.summary.problems)
        fresh = [p for p in getattr(batch, "problems", ()) if p not in self.summary.problems]
        self.summary.problems += fresh[:room]

    def _save(self, step: int) -> None:
        for statistic in _statistics(self.bare):
            self.engine.mean(statistic)
        state = states.collect(self.wrapped, self.optimizer)
        more = {"step": step, "bad_in_a_row": self.bad_in_a_row, "summary": vars(self.summary)}
        if self.engine.rank == 0:
            states.write(self.folder, self.recipe, state | more)


def _set_scales(
    module: TrainingStep, batches: Dataset[Any], recipe: Recipe, engine: Engine
) -> None:
    """By the first step's batches; by the next step's where those are not finite."""

    def prepared(step: int) -> Iterator[Any]:
        for n in _own_batches(step, recipe, engine):
            batch = to_device(batches[n], engine.device)
            _seed(recipe.seed, n)
            yield batch

    for step in range(recipe.max_bad_steps):
        if set_scales(module, module, prepared(step)):
            return
    raise ValueError(
        f"batches must be finite to set scales, got none in {recipe.max_bad_steps} steps"
    )


def _statistics(module: nn.Module) -> list[Tensor]:
    """Running statistics of batch norms, which forwards write."""
    return [x for name, x in module.named_buffers() if name.endswith(("_mean", "_var"))]


def _own_batches(step: int, recipe: Recipe, engine: Engine) -> range:
    first = step * recipe.accumulate
    return range(first + engine.rank, first + recipe.accumulate, engine.world)


def _seed(seed: int, number: int) -> None:
    numbers = np.random.SeedSequence([seed, number]).generate_state(2)
    torch.manual_seed(int(numbers[0]))
    # transformers draws its masks from it
    np.random.seed(int(numbers[1]))


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch, or each part of a tuple, on a device."""
    if isinstance(batch, tuple | list):
        return tuple(to_device(part, device) for part in batch)
    return batch.to(device) if hasattr(batch, "to") else batch
