"""``lowbit train``: the tasks of ``ssl_models.training``, followed on a terminal."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lowbit_kernels.cli.errors import CommandError, require
from lowbit_kernels.cli.output import note, progress
from ssl_models.digits import train as digits
from ssl_models.training import Recipe
from ssl_models.training.tasks import Job, Watch, find_encoder

# of the loss that is shown: a mean that forgets
_FORGETTING = 0.98


def run_task(
    task: Callable[..., dict[str, Any]], given: dict[str, Any], *arguments: Any, **options: Any
) -> dict[str, Any]:
    """Run a task with the options of its command; notes on stderr for what was skipped."""
    for module in ("soundfile", "sklearn", *(("yaml",) if given["recipe"] else ())):
        require(module, "train")
    if given["tensorboard"]:
        require("tensorboard", "tensorboard")
    flags = {name: given.pop(name) for name in ("steps", "seed") if given[name] is not None}
    path = given.pop("recipe")
    recipe = Recipe(**flags) if path is None else Recipe.read(path, **flags)
    names = Job.__dataclass_fields__.keys() & given.keys()
    values = {name: given[name] for name in names} | {"encoder": find_encoder(given["encoder"])}
    with follow(recipe.steps) as watch:
        found = task(Job(recipe=recipe, **values), *arguments, watch=watch, **options)
    for line in (*found["first_unreadable"], *found["problems"]):
        note(f"skipped: {line}")
    return found


def run_digits(
    data: Path, out: Path, threads: int, flags: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """``train_digits`` by its recipe, with the flags that were given."""
    for module, extra in (("soundfile", "audio"), ("transformers", "hf")):
        require(module, extra)
    given = {name: value for name, value in flags.items() if value is not None}
    recipe = replace(digits.RECIPE, **given)
    torch.set_num_threads(threads)
    with follow(recipe.steps) as watch:
        try:
            report = lambda step, loss: watch(step, loss, {})  # noqa: E731
            summary = digits.train_digits(data, out, recipe, report=report, **options)
        except RuntimeError as error:
            if "espeak-ng" not in str(error):
                raise
            raise CommandError(str(error)) from None
    return vars(summary) | {"out": str(out / "model"), "recipe": asdict(recipe)}


@contextmanager
def follow(steps: int) -> Iterator[Watch]:
    """A progress bar that is told each step, its loss and measures."""
    with progress("steps") as bar:
        bar_task, smooth, shown = bar.add_task("training", total=steps), math.nan, ""

        def watch(step: int, loss: float, measures: Mapping[str, float]) -> None:
            nonlocal smooth, shown
            if math.isfinite(loss):
                old = loss if math.isnan(smooth) else smooth
                smooth = _FORGETTING * old + (1 - _FORGETTING) * loss
            if measures:
                shown = "".join(f", {name} {value:.1%}" for name, value in measures.items())
            text = f"loss {smooth:.3f}{shown}, {bar.tasks[0].speed or 0.0:.1f} steps/s"
            bar.update(bar_task, completed=step + 1, description=text)

        yield watch


def view_run(found: dict[str, Any]) -> Table:
    """First and last losses, measures, and what was skipped."""
    table, losses = Table(show_header=False, box=None), found["losses"]
    table.add_row("loss", f"{losses[0]:.3f} to {losses[-1]:.3f}" if losses else "none")
    rates = {
        name: f"{found[name]:.1%}" for name in ("accuracy", "majority", "wer") if name in found
    }
    counts = ("utterances", "left_out", "unreadable", "skipped_steps", "skipped_clips")
    rows = rates | {name: str(found[name]) for name in counts if name in found}
    for name, value in (rows | {"saved_in": found["out"]}).items():
        table.add_row(name.replace("_", " "), value)
    return table
