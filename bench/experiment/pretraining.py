"""Pre-training on read speech without transcripts, and what it is worth to a reader of digits.

HuBERT's masked prediction of clusters of MFCCs (arXiv 2106.07447), then CTC on digits from there
and from random weights, in float and in four bits.

Dimension key: T frames.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from bench.experiment.arms import only, spec_of
from bench.experiment.cells import Cell
from bench.experiment.models import DigitReader
from bench.experiment.objectives import ctc
from bench.experiment.plan import Plan
from bench.experiment.training import PEAK_RATE, fit, keep, read
from lowbit_kernels import convert, prepare_qat
from ssl_models.data import AudioBatches, read_manifest
from ssl_models.data.batches import read_audio
from ssl_models.digits.data import level
from ssl_models.error_propagation.sources import find_sources, modules_of
from ssl_models.objectives import MaskedPrediction
from ssl_models.objectives.kmeans import fit_kmeans, mfcc

CLUSTERS = 100
# of a batch, and of what is cut from an utterance; every tenth utterance is not learned from
BATCH_SECONDS, CROP_SECONDS, HELD_OUT = 40.0, 4.0, 10
# from masked frames alone a model of this size has not begun to learn after 1,500 steps
UNMASKED_WEIGHT = 1.0


def pretrain(cell: Cell, plan: Plan) -> dict[str, Any]:
    """Train an encoder, and judge it by masked frames of utterances that it has not heard.

    Returns:
        ``accuracy`` there, beside ``majority``, the share of the cluster that is most frequent
        there: what a model that has learned nothing could reach.
    """
    utterances = read_manifest(plan.speech).utterances
    learned = [each for i, each in enumerate(utterances) if i % HELD_OUT]
    batches = _batches(learned, cell.seed)
    first = [batches[n] for n in range(batches.batches_per_epoch)]
    targets = fit_kmeans(mfcc, first, min(CLUSTERS, _windows(first)), seed=cell.seed)
    torch.manual_seed(cell.seed)
    model = DigitReader(cell.model).to(plan.device)
    size = model.speech.config.hidden_size
    objective = MaskedPrediction(
        size, len(targets.centers), targets, unmasked_weight=UNMASKED_WEIGHT
    ).to(plan.device)
    losses = fit(model.speech, objective, cell, plan, batches, plan.float_steps, PEAK_RATE)
    keep(model, plan.weights(cell))
    found = _judge(model, objective, _batches(utterances[::HELD_OUT], cell.seed), plan.device)
    return {"losses": losses} | found


def tune(cell: Cell, plan: Plan) -> dict[str, Any]:
    """CTC on digits, from what was pre-trained or from random weights, perhaps in four bits."""
    torch.manual_seed(cell.seed)
    model = DigitReader(cell.model)
    if cell.needs is not None:
        states = load_file(plan.weights(cell.needs))
        # the head has learned nothing
        speech = {name: value for name, value in states.items() if name.startswith("speech.")}
        model.load_state_dict(speech, strict=False)
    model.to(plan.device)
    is_low_bit = cell.stage.endswith("w4a8")
    if is_low_bit:
        prepare_qat(model, only(modules_of(find_sources(model)), spec_of(4)), "lsq")
    batches, steps = plan.training(cell, curriculum=True), max(1, plan.float_steps // 2)
    losses = fit(model, ctc, cell, plan, batches, steps, PEAK_RATE)
    if is_low_bit:
        convert(model)
    strings = plan.held_out(cell)
    return {
        "losses": losses,
        "digits": [each.digits for each in strings],
        "read": {cell.stage: read(model, strings)},
    }


def _read(path: Any) -> NDArray[np.float32]:
    """As loud as digits are."""
    return level(read_audio(path))


def _batches(utterances: Any, seed: int) -> AudioBatches:
    return AudioBatches(
        utterances, seed=seed, seconds=BATCH_SECONDS, max_seconds=CROP_SECONDS, normalize=False,
        read=_read,
    )  # fmt: skip


def _windows(batches: list[Any]) -> int:
    return sum(int(mfcc(each.waveforms, each.lengths)[1].sum()) for each in batches)


@torch.no_grad()
def _judge(
    model: DigitReader, objective: MaskedPrediction, batches: AudioBatches, device: str
) -> dict[str, Any]:
    right = torch.zeros(2, dtype=torch.int64)
    counts = torch.zeros(len(objective.labels), dtype=torch.int64)
    torch.manual_seed(0)
    for n in range(batches.batches_per_epoch):
        batch = batches[n].to(torch.device(device))
        objective(model.speech, batch)
        right += objective.correct.cpu()
        frames: Any = model.speech.feature_extractor.frames(batch.lengths)
        T = int(frames.max())
        targets = objective.targets(batch.waveforms, batch.lengths, T).cpu()
        valid = torch.arange(T) < frames.cpu()[:, None]
        counts += torch.bincount(targets[valid], minlength=len(counts))
    found, masked = right.tolist()
    return {
        "accuracy": found / masked,
        "majority": int(counts.max()) / int(counts.sum()),
        "masked_frames": masked,
    }
