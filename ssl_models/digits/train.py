"""Train the digits checkpoint: ``python -m ssl_models.digits.train --data FSDD --out runs/digits``.

A run is a function of its seed: a batch depends on the seed and the step alone, and the random
state is set at each step. A run that was killed therefore resumes exactly from its last state file.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssl_models.digits.batches import StringBatches
from ssl_models.digits.data import load_fsdd, training_clips
from ssl_models.digits.model import VOCABULARY, build_config, build_processor
from ssl_models.digits.synthesis import synthetic_clips


@dataclass(frozen=True)
class Recipe:
    """What a run is made of. A state file of another recipe is refused."""

    steps: int = 5200
    seed: int = 0
    peak_rate: float = 1.5e-3
    warmup_steps: int = 300
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = False

    def rate(self, step: int) -> float:
        """Learning rate: a linear warm-up, a plateau, and a linear fall to 0 over the last 40 %."""
        warm_up = (step + 1) / self.warmup_steps
        fall = (self.steps - step) / (0.4 * self.steps)
        return self.peak_rate * min(1.0, warm_up, fall)


def train(
    model: nn.Module,
    batches: Dataset[tuple[Tensor, Tensor]],
    recipe: Recipe,
    state_path: Path,
    *,
    resume: bool = False,
    save_seconds: float = 180.0,
    workers: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train a CTC model in place, saving a state every few minutes and at the end.

    Args:
        model: called as ``model(audio, labels=labels).loss``.
        batches: ``batches[step]`` is (audio [B, T], labels [B, L]).
        recipe: steps, seed and optimizer settings.
        state_path: the state file.
        resume: continue from ``state_path`` where it exists.
        save_seconds: time between two states.
        workers: processes that prepare batches ahead.
        report: called with each step and its loss.

    Raises:
        ValueError: the state file is of another recipe.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
    )
    first = 0
    if resume and state_path.exists():
        first = _load_state(state_path, model, optimizer, recipe)
    loader = DataLoader(
        batches, batch_size=None, sampler=range(first, recipe.steps), num_workers=workers
    )
    model.train()
    saved = time.monotonic()
    for step, (audio, labels) in enumerate(loader, start=first):
        _seed_step(recipe.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            loss = model(audio, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        report(step, loss.item())
        if step + 1 == recipe.steps or time.monotonic() - saved > save_seconds:
            _save_state(state_path, model, optimizer, recipe, step + 1)
            saved = time.monotonic()


def _seed_step(seed: int, step: int) -> None:
    state = np.random.SeedSequence([seed, step]).generate_state(2)
    torch.manual_seed(int(state[0]))
    np.random.seed(int(state[1]))  # transformers draws its time and feature masks from it


def _save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "recipe": asdict(recipe),
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> int:
    state = torch.load(path, weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise ValueError(
            f"recipe must be the one of {path} to resume it, {state['recipe']}, "
            f"got {asdict(recipe)}"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def export(model: Any, folder: Path) -> None:
    """Write fp16 safetensors, configuration, vocabulary and preprocessor configuration."""
    model.half().save_pretrained(folder)
    model.float()
    # the dtype to compute in; the file's is the tensors' own
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    build_processor().save_pretrained(folder)


def main(
    data: Annotated[
        Path, typer.Option(help="folder of the Free Spoken Digit Dataset", exists=True)
    ],
    out: Annotated[Path, typer.Option(help="folder for the state and the model")],
    steps: int = Recipe.steps,
    seed: int = Recipe.seed,
    resume: Annotated[bool, typer.Option(help="continue a run that was stopped")] = False,
    synthetic: Annotated[bool, typer.Option(help="add voices of espeak-ng")] = True,
    bf16: Annotated[bool, typer.Option(help="autocast: faster where a CPU has bf16")] = False,
    threads: int = 2,
) -> None:
    """Train a wav2vec2 CTC model on strings of spoken digits and export it to OUT/model."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import Wav2Vec2ForCTC

    torch.set_num_threads(threads)
    recipe = Recipe(steps=steps, seed=seed, bf16=bf16)
    try:
        recorded = training_clips(load_fsdd(data))
        spoken = synthetic_clips(out / "synthetic.npz") if synthetic else []
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    batches = StringBatches(recorded, spoken, VOCABULARY, seed=seed)
    torch.manual_seed(seed)
    model = Wav2Vec2ForCTC(build_config())

    columns = (TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), *columns) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        smooth = math.nan

        def report(step: int, loss: float) -> None:
            nonlocal smooth
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            progress.update(task, completed=step + 1, loss=smooth)
            if not progress.console.is_terminal and (step + 1) % 50 == 0:
                print(f"step {step + 1} of {steps}, loss {smooth:.3f}", flush=True)

        train(
            model,
            batches,
            recipe,
            out / "state.pt",
            resume=resume,
            workers=1,
            report=report,
        )
    export(model, out / "model")


if __name__ == "__main__":
    typer.run(main)
