"""The state file of a run: whole or not there, and read without running what is in it."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ssl_models.training.recipe import Recipe

STATE_FILE = "state.pt"
_WHOLE = StateDictOptions(full_state_dict=True)


def collect(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole tensors of model and optimizer by name, the same from every engine; all ranks call."""
    return {
        "model": get_model_state_dict(module, options=_WHOLE),
        "optimizer": get_optimizer_state_dict(module, optimizer, options=_WHOLE),
    }


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the optimizer's part of a state into what an engine has wrapped."""
    set_optimizer_state_dict(module, optimizer, state["optimizer"], options=_WHOLE)


def write(folder: Path, recipe: Recipe, state: dict[str, Any]) -> None:
    """Write a state beside the old one, then put it in its place."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{STATE_FILE}.partial"
    torch.save(state | {"recipe": asdict(recipe)}, unfinished)
    os.replace(unfinished, folder / STATE_FILE)


def read(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The state in a folder; None where there is none.

    Raises:
        ValueError: where it is of another recipe.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise ValueError(
            f"recipe must be the one of {path} to resume it, {state['recipe']}, "
            f"got {asdict(recipe)}"
        )
    return state
