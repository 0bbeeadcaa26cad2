"""Run one cell: train, or measure, and write its file."""

import copy
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from bench.experiment.arms import only, spec_of, storage
from bench.experiment.cells import NEEDED, PRETRAINED, TRAINED, TUNED, Cell
from bench.experiment.data import (
    Utterance,
    read_speech,
)
from bench.experiment.measure import make_subject, measure, run
from bench.experiment.models import DigitReader
from bench.experiment.objectives import ctc
from bench.experiment.plan import Plan
from bench.experiment.pretraining import pretrain, tune
from bench.experiment.record import columns, write
from bench.experiment.training import LOW_RATE, PEAK_RATE, fit, keep, load, read
from bench.record import environment
from lowbit_kernels import convert, prepare_qat
from ssl_models.digits.data import level
from ssl_models.error_propagation.measures import decibels, noise_to_signal
from ssl_models.error_propagation.sources import find_blocks, find_sources, modules_of
from ssl_models.error_propagation.trace import trace
from ssl_models.objectives.distill import Distillation

# gains take as long as all other measures: of every third utterance
GAIN_EVERY = 3


def run_cell(cell: Cell, plan: Plan) -> None:
    """Run a cell, unless its file is there, and write the file.

    A cell that others need runs as well where its weights are not there; a file stays as it is.

    Raises:
        ValueError: where the model that the cell needs has not been trained.
    """
    weights = plan.weights(cell.needs or cell)
    if cell.needs is not None and not weights.exists():
        raise ValueError(f"{cell.name} needs {weights}, which {cell.needs.name} makes")
    has_file = plan.path(cell).exists()
    if has_file and (weights.exists() or cell.stage not in NEEDED):
        return
    started = time.monotonic()
    stages: Mapping[str, Callable[[Cell, Plan], dict[str, Any]]] = {
        "float": _float, "ptq": _ptq, PRETRAINED: pretrain, **dict.fromkeys(TUNED, tune),
    }  # fmt: skip
    found = stages.get(cell.stage, _trained)(cell, plan)
    about: dict[str, Any] = {"cell": asdict(cell) | {"speaker": cell.speaker}, "plan": _shown(plan)}
    about |= environment(plan.device, torch.get_num_threads(), "python -m bench.experiment run")
    if has_file:
        return
    if weights.exists():
        about["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    write(plan.path(cell), about | found | {"seconds": round(time.monotonic() - started, 1)})


def _shown(plan: Plan) -> dict[str, Any]:
    names = ("float_steps", "qat_steps", "strings", "speeches")
    return {name: getattr(plan, name) for name in names}


def _float(cell: Cell, plan: Plan) -> dict[str, Any]:
    torch.manual_seed(cell.seed)
    model = DigitReader(cell.model).to(plan.device)
    batches = plan.training(cell, curriculum=True)
    losses = fit(model, ctc, cell, plan, batches, plan.float_steps, PEAK_RATE)
    keep(model, plan.weights(cell))
    strings = plan.held_out(cell)
    return {
        "losses": losses,
        "storage_mb": storage(model),
        "digits": [each.digits for each in strings],
        "read": {"float": read(model, strings)},
    }


def _ptq(cell: Cell, plan: Plan) -> dict[str, Any]:
    model, strings = load(cell, plan), plan.held_out(cell)
    speech = read_speech(plan.speech, plan.speeches)
    # as loud as what the model has learned from
    audios = [torch.from_numpy(level(each.audio.numpy())) for each in speech]
    utterances = [*strings, *(Utterance(audio, None) for audio in audios)]
    utterances = [Utterance(each.audio.to(plan.device), each.digits) for each in utterances]
    subject = make_subject(model, utterances[0])
    rows = [
        measure(subject, each, seed=cell.seed, gains=index % GAIN_EVERY == 0)
        for index, each in enumerate(utterances)
    ]
    return columns(rows) | {
        "sources_of": [source.name for source in subject.sources],
        "kinds": [source.kind for source in subject.sources],
        "blocks_of": list(subject.blocks),
    }


def _trained(cell: Cell, plan: Plan) -> dict[str, Any]:
    """Quantization-aware training from the float model, which teaches; then packed, and judged."""
    teacher, strings = load(cell, plan), plan.held_out(cell)
    weight_bits, input_bits = TRAINED[cell.stage]
    student = copy.deepcopy(teacher)
    names = modules_of(find_sources(student))
    # BiT's binary quantizer, with its scales, is the elastic one
    quantizer = "elastic" if weight_bits == 1 else "lsq"
    prepare_qat(student, only(names, spec_of(weight_bits, input_bits)), quantizer)
    # maps of attention would teach some of the models only
    objective = Distillation(
        teacher, attention_weight=0.0, relative=True, forward=lambda m, batch: m(batch.waveforms)
    )
    batches = plan.training(cell, curriculum=False)
    losses = fit(student, objective, cell, plan, batches, plan.qat_steps, LOW_RATE)
    trained = read(student, strings)
    convert(student)
    blocks = find_blocks(teacher)
    errors = []
    for each in strings:
        audio = each.audio[None].to(plan.device)
        a, b = (trace(model, run, audio, blocks).outputs for model in (student, teacher))
        errors.append([noise_to_signal(a[name][0] - b[name][0], b[name][0]) for name in blocks])
    means = torch.tensor(errors, dtype=torch.float64).mean(0).tolist()
    return {
        "losses": losses,
        "digits": [each.digits for each in strings],
        "read": {
            "float": read(teacher, strings), "before convert": trained,
            cell.stage: read(student, strings),
        },
        "blocks_nsr_db": [decibels(each) for each in means],
    }  # fmt: skip
