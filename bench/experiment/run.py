"""Run one cell: train, or measure, and write its file."""

import copy
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.experiment.arms import only, spec_of, storage
from bench.experiment.cells import TRAINED, Cell
from bench.experiment.data import (
    DigitBatches,
    Utterance,
    read_speech,
    test_strings,
)
from bench.experiment.measure import make_subject, measure, run
from bench.experiment.models import DigitReader, greedy
from bench.experiment.objectives import ctc
from bench.experiment.record import columns, write
from bench.record import environment
from lowbit_kernels import convert, prepare_qat
from ssl_models.digits.data import Clip, level, load_fsdd
from ssl_models.error_propagation.measures import decibels, noise_to_signal
from ssl_models.error_propagation.sources import find_blocks, find_sources, modules_of
from ssl_models.error_propagation.trace import trace
from ssl_models.objectives.distill import Distillation
from ssl_models.training import Recipe, train

# of training in float, and of quantization-aware training, which starts from there
PEAK_RATE, LOW_RATE = 1e-3, 5e-4
SAVE_SECONDS, REPORT_STEPS = 60.0, 25
# gains take as long as all other measures: of every third utterance
GAIN_EVERY = 3


@dataclass(frozen=True)
class Plan:
    """What every cell has in common.

    Args:
        digits: folder of the Free Spoken Digit Dataset.
        speech: folder of read speech in FLAC.
        out: for the results, a JSON file a cell.
        work: for checkpoints.
        float_steps: of training in float.
        qat_steps: of quantization-aware training.
        strings: how many of the held-out speaker's strings are used; None: all.
        speeches: how many utterances of read speech.
        device: where all runs.
    """

    digits: Path
    speech: Path
    out: Path
    work: Path
    float_steps: int = 1500
    qat_steps: int = 500
    strings: int | None = None
    speeches: int = 50
    device: str = "cpu"

    @cached_property
    def clips(self) -> list[Clip]:
        """All recorded digits."""
        return load_fsdd(self.digits)

    def training(self, cell: Cell) -> DigitBatches:
        """Batches of all speakers but the held-out one, the same for every model of a replicate."""
        return DigitBatches([c for c in self.clips if c.speaker != cell.speaker], cell.seed)

    def held_out(self, cell: Cell) -> list[Utterance]:
        """Strings of the held-out speaker."""
        return test_strings([c for c in self.clips if c.speaker == cell.speaker])[: self.strings]

    def path(self, cell: Cell) -> Path:
        """The cell's result."""
        return self.out / f"{cell.name}.json"

    def weights(self, cell: Cell) -> Path:
        """The float model of the cell's model and seed."""
        return self.work / f"{cell.model}-{cell.seed}.safetensors"


def run_cell(cell: Cell, plan: Plan) -> None:
    """Run a cell, unless its file is there, and write the file.

    Raises:
        ValueError: where the float model that the cell needs has not been trained.
    """
    if plan.path(cell).exists():
        return
    if cell.needs is not None and not plan.weights(cell).exists():
        raise ValueError(f"{cell.name} needs {plan.weights(cell)}, which {cell.needs.name} makes")
    started = time.monotonic()
    stages: Mapping[str, Callable[[Cell, Plan], dict[str, Any]]] = {"float": _float, "ptq": _ptq}
    found = stages.get(cell.stage, _trained)(cell, plan)
    about = {"cell": asdict(cell) | {"speaker": cell.speaker}, "plan": _shown(plan)}
    about |= environment(plan.device, torch.get_num_threads(), "python -m bench.experiment run")
    write(plan.path(cell), about | found | {"seconds": round(time.monotonic() - started, 1)})


def _shown(plan: Plan) -> dict[str, Any]:
    names = ("float_steps", "qat_steps", "strings", "speeches")
    return {name: getattr(plan, name) for name in names}


def _float(cell: Cell, plan: Plan) -> dict[str, Any]:
    torch.manual_seed(cell.seed)
    model = DigitReader(cell.model).to(plan.device)
    losses = _fit(model, ctc, cell, plan, plan.float_steps, PEAK_RATE)
    plan.work.mkdir(parents=True, exist_ok=True)
    unfinished = plan.weights(cell).with_suffix(".partial")
    save_file(model.state_dict(), unfinished)
    unfinished.replace(plan.weights(cell))
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
    losses = _fit(student, objective, cell, plan, plan.qat_steps, LOW_RATE)
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


def _fit(
    model: DigitReader, objective: Any, cell: Cell, plan: Plan, steps: int, peak_rate: float
) -> list[float]:
    """Train a model, and leave it in evaluation mode; means of the loss over 25 steps each."""
    recipe = Recipe(steps=steps, seed=cell.seed, peak_rate=peak_rate)
    folder = plan.work / cell.name
    summary = train(
        model, objective, plan.training(cell), recipe, folder, resume=True,
        save_seconds=SAVE_SECONDS,
    )  # fmt: skip
    model.eval()
    shutil.rmtree(folder)
    parts = [summary.losses[i : i + REPORT_STEPS] for i in range(0, steps, REPORT_STEPS)]
    return [sum(part) / len(part) for part in parts]


def load(cell: Cell, plan: Plan) -> DigitReader:
    """The float model of a cell's model and seed, in evaluation mode."""
    model = DigitReader(cell.model)
    model.load_state_dict(load_file(plan.weights(cell)))
    return model.to(plan.device).eval()


@torch.inference_mode()
def read(model: nn.Module, strings: Sequence[Utterance]) -> list[list[int]]:
    """The digits that a model reads in each string."""
    model.eval()
    device = next(model.parameters()).device
    return [list(greedy(run(model, each.audio[None].to(device))[0])) for each in strings]
