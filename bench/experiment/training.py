"""Train a model of a cell, keep it, load it, and let it read."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

from bench.experiment.cells import Cell
from bench.experiment.data import Utterance
from bench.experiment.measure import run
from bench.experiment.models import DigitReader, greedy
from bench.experiment.plan import Plan
from ssl_models.training import Recipe, train

# of training in float, and of quantization-aware training, which starts from there
PEAK_RATE, LOW_RATE = 1e-3, 5e-4
SAVE_SECONDS, REPORT_STEPS = 60.0, 25


def keep(model: nn.Module, path: Path) -> None:
    """Write weights, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".partial")
    save_file(model.state_dict(), unfinished)
    unfinished.replace(path)


def fit(
    model: nn.Module,
    objective: Any,
    cell: Cell,
    plan: Plan,
    batches: Dataset[Any],
    steps: int,
    peak_rate: float,
) -> list[float]:
    """Train a model, and leave it in evaluation mode; means of the loss over 25 steps each."""
    recipe = Recipe(steps=steps, seed=cell.seed, peak_rate=peak_rate)
    folder = plan.work / cell.name
    summary = train(
        model, objective, batches, recipe, folder, resume=True,
        save_seconds=SAVE_SECONDS,
    )  # fmt: skip
    model.eval()
    shutil.rmtree(folder)
    parts = [summary.losses[i : i + REPORT_STEPS] for i in range(0, steps, REPORT_STEPS)]
    return [sum(part) / len(part) for part in parts]


def load(cell: Cell, plan: Plan) -> DigitReader:
    """The float model of a cell's model and seed, in evaluation mode."""
    model = DigitReader(cell.model)
    model.load_state_dict(load_file(plan.weights(Cell(cell.model, cell.seed, "float"))))
    return model.to(plan.device).eval()


@torch.inference_mode()
def read(model: nn.Module, strings: Sequence[Utterance]) -> list[list[int]]:
    """The digits that a model reads in each string."""
    model.eval()
    device = next(model.parameters()).device
    return [list(greedy(run(model, each.audio[None].to(device))[0])) for each in strings]
