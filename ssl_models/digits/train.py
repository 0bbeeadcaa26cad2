"""Train the digits checkpoint: ``lowbit train digits FSDD runs/digits``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_models.digits.batches import StringBatches
from ssl_models.digits.data import load_fsdd, training_clips
from ssl_models.digits.model import VOCABULARY, build_config, build_processor
from ssl_models.digits.synthesis import synthetic_clips
from ssl_models.training import Recipe, Summary, train

# of the checkpoint that comes along
RECIPE = Recipe(steps=5200, peak_rate=1.5e-3, warmup_steps=300, fall=0.4)


def ctc_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a transformers CTC model on audio [B, T] and labels [B, L]."""
    audio, labels = batch
    loss: Tensor = model(audio, labels=labels).loss
    return loss


def train_digits(
    data: Path,
    out: Path,
    recipe: Recipe = RECIPE,
    *,
    synthetic: bool = True,
    resume: bool = False,
    report: Callable[[int, float], None] | None = None,
) -> Summary:
    """Train a wav2vec2 CTC model on strings of spoken digits and export it to ``out/model``.

    Args:
        data: folder of the Free Spoken Digit Dataset.
        out: for the state, the synthetic voices and the model.
        recipe: steps, seed, rates.
        synthetic: add voices of espeak-ng.
        resume: go on from the state in ``out``.
        report: called with each step and its loss.

    Raises:
        ValueError: where ``data`` holds no such recordings, or a state is of another recipe.
        RuntimeError: where espeak-ng is needed and missing.
    """
    from transformers import Wav2Vec2ForCTC

    recorded = training_clips(load_fsdd(data))
    spoken = synthetic_clips(out / "synthetic.npz") if synthetic else []
    batches = StringBatches(recorded, spoken, VOCABULARY, seed=recipe.seed)
    torch.manual_seed(recipe.seed)
    model = Wav2Vec2ForCTC(build_config())
    summary = train(model, ctc_loss, batches, recipe, out, resume=resume, workers=1, report=report)
    export(model, out / "model")
    return summary


def export(model: Any, folder: Path) -> None:
    """Write fp16 safetensors, configuration, vocabulary and preprocessor configuration."""
    model.half().save_pretrained(folder)
    model.float()
    # the dtype to compute in; the file's is the tensors' own
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    build_processor().save_pretrained(folder)
