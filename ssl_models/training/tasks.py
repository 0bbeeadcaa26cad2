"""What ``lowbit train`` runs: pre-training, fine-tuning and distillation of a ``SpeechEncoder``."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbit_kernels import QuantConfig, QuantSpec, convert, prepare_qat
from lowbit_kernels.checkpoint import save_quantized
from ssl_models.config import SpeechEncoderConfig
from ssl_models.data import AudioBatches, Manifest, read_manifest
from ssl_models.encoder import SpeechEncoder
from ssl_models.objectives import CTC, Distillation, MaskedPrediction
from ssl_models.objectives.ctc import word_error_rate
from ssl_models.objectives.kmeans import Features, KMeansTargets, fit_kmeans, layer_features, mfcc
from ssl_models.presets import PRESETS, preset
from ssl_models.training.loop import Summary, train
from ssl_models.training.recipe import Recipe
from ssl_models.training.state import STATE_FILE

CONFIG_FILE, ENCODER_FILE, HEAD_FILE = "config.json", "encoder.safetensors", "head.safetensors"
LOW_BIT_FOLDER = "low-bit"
# batches whose frames are clustered, and steps between two looks at what is not the loss
_CLUSTERED_BATCHES, _MEASURE_STEPS = 50, 25

# called with each step, its loss, and now and then with measures
Watch = Callable[[int, float, Mapping[str, float]], None]


@dataclass(frozen=True)
class Job:
    """What the three tasks have in common.

    Attributes:
        data: a manifest or a folder, see ``read_manifest``.
        out: folder for the state, and for the encoder in the end.
        recipe: steps, seed, rates.
        encoder: a config of a new one, or a folder that a task has written.
        bits: of weights in quantization-aware training; None: float.
        inputs: of layers then: ``"int8"``, ``"int4"``, ``"int2"``, ``"int1"`` or None, float.
        quantizer: ``"ste"``, ``"lsq"`` or ``"elastic"``.
        seconds: of audio in a batch.
        max_seconds: of an utterance: longer ones are cropped, in fine-tuning left out.
        engine: see ``train``.
        resume: go on from the state in ``out``.
        workers: processes that prepare batches.
        device: where one process computes.
        tensorboard: write its files to ``out``.
    """

    data: Path
    out: Path
    recipe: Recipe
    encoder: SpeechEncoderConfig | Path
    bits: int | None = None
    inputs: str | None = None
    quantizer: str = "lsq"
    seconds: float = 87.5
    max_seconds: float = 15.625
    engine: str | None = None
    resume: bool = False
    workers: int = 0
    device: str = "cpu"
    tensorboard: bool = False


def pretrain(
    job: Job,
    watch: Watch | None = None,
    *,
    clusters: int = 100,
    features: Path | None = None,
    layer: str | None = None,
) -> dict[str, Any]:
    """HuBERT's masked prediction of clusters of MFCCs, or of a layer of an earlier encoder.

    Args:
        job: data, recipe, encoder.
        watch: follows the run; measures are the accuracy on masked frames.
        clusters: of k-means.
        features: folder of an encoder whose layer's outputs are clustered; None: MFCCs.
        layer: its dotted name, such as ``"encoder.layers.5"``.

    Returns:
        What became of the run, JSON-able. ``majority`` is the share of the largest cluster.

    Raises:
        ValueError: for wrong data or options, before any file is written.
    """
    if (features is None) != (layer is None):
        raise ValueError(f"features and layer must come together, got {features} and {layer}")
    manifest, model = _prepare(job)
    batches = AudioBatches(manifest.utterances, **_batch_options(job))
    extract: Features = mfcc
    if features is not None and layer is not None:
        extract = layer_features(load_encoder(features), layer)
    first = [batches[n] for n in range(min(_CLUSTERED_BATCHES, batches.batches_per_epoch))]
    targets = fit_kmeans(extract, first, clusters, seed=job.recipe.seed)
    objective = MaskedPrediction(model.config.hidden_size, clusters, targets)
    found = _train(job, model, objective, batches, watch, lambda: {"accuracy": objective.accuracy})
    return found | _about(manifest, batches) | {"majority": _majority(targets, first)}


def finetune(job: Job, watch: Watch | None = None, *, test: Path | None = None) -> dict[str, Any]:
    """CTC on transcripts.

    Args:
        job: data with texts, recipe, encoder.
        watch: follows the run; measures are the word error rate of a test batch.
        test: a manifest to be judged by.

    Returns:
        What became of the run, JSON-able, with the word error rate on ``test``.

    Raises:
        ValueError: for wrong data or options, before any file is written.
    """
    manifest, model = _prepare(job)
    _check_texts(manifest)
    batches = AudioBatches(manifest.utterances, **_batch_options(job), crop=False)
    objective = CTC(model.config.hidden_size)
    for each in batches.utterances:
        objective.encode(each.text or "")
    judged = None
    if test is not None:
        held_out = read_manifest(test)
        _check_texts(held_out)
        judged = AudioBatches(held_out.utterances, **_batch_options(job), crop=False)
    measure = None
    # a sharded model runs on all processes or on none
    if judged is not None and job.engine != "fsdp":
        measure = lambda: {"wer": _error_rate(objective, model, judged, 1)}  # noqa: E731
    found = _train(job, model, objective, batches, watch, measure) | _about(manifest, batches)
    if judged is not None and _is_first():
        whole, reader = _build(job), CTC(model.config.hidden_size)
        state = _read_state(job)
        whole.load_state_dict(_part(state, "model."))
        reader.load_state_dict(_part(state, "objective."))
        found["wer"] = _error_rate(reader, whole, judged, judged.batches_per_epoch)
    return found


def distill(
    job: Job, teacher: Path, watch: Watch | None = None, *, attention: bool = True
) -> dict[str, Any]:
    """Learn the outputs, layers and attention maps of a float encoder, from its weights on.

    Args:
        job: data, recipe; its encoder is usually the teacher's folder, with ``bits``.
        teacher: folder of the float encoder.
        watch: follows the run.
        attention: whether attention maps count, which are materialized for that.

    Returns:
        What became of the run, JSON-able.

    Raises:
        ValueError: for wrong data or options, before any file is written.
    """
    manifest, model = _prepare(job)
    objective = Distillation(load_encoder(teacher), attention_weight=float(attention))
    batches = AudioBatches(manifest.utterances, **_batch_options(job))
    return _train(job, model, objective, batches, watch, None) | _about(manifest, batches)


def find_encoder(source: str) -> SpeechEncoderConfig | Path:
    """The config that a preset's name or a JSON file means, or the folder that a task has written.

    Raises:
        ValueError: for none of these, or a wrong config.
    """
    path = Path(source)
    if source in PRESETS or path.is_dir():
        return preset(source) if source in PRESETS else path
    if not path.is_file():
        raise ValueError(f"{source} is no file, folder nor preset: {', '.join(sorted(PRESETS))}")
    return SpeechEncoderConfig.from_json(path.read_text())


def load_encoder(folder: Path) -> SpeechEncoder:
    """The float encoder that a task has written.

    Raises:
        ValueError: where a file is missing, or does not fit the config.
    """
    for name in (CONFIG_FILE, ENCODER_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"encoder must be a folder with {name}, got {folder}")
    encoder = SpeechEncoder(SpeechEncoderConfig.from_json((folder / CONFIG_FILE).read_text()))
    try:
        encoder.load_state_dict(load_file(folder / ENCODER_FILE))
    except RuntimeError as error:
        message = str(error).splitlines()[1].strip()
        raise ValueError(f"{folder / ENCODER_FILE} must fit {CONFIG_FILE}: {message}") from None
    return encoder


def _prepare(job: Job) -> tuple[Manifest, SpeechEncoder]:
    if (job.out / STATE_FILE).exists() and not job.resume:
        raise ValueError(f"out must hold no run unless that is resumed, got {job.out}")
    manifest = read_manifest(job.data)
    return manifest, _build(job).to(job.device)


def _build(job: Job) -> SpeechEncoder:
    torch.manual_seed(job.recipe.seed)
    is_new = isinstance(job.encoder, SpeechEncoderConfig)
    model = SpeechEncoder(job.encoder) if is_new else load_encoder(job.encoder)  # type: ignore[arg-type]
    if job.bits is not None:
        options: Any = {"inputs": job.inputs, "input_scale": "static"} if job.inputs else {}
        if job.bits == 1:
            options["group_size"] = "tensor"
        prepare_qat(model, QuantConfig(QuantSpec(job.bits, **options)), job.quantizer)
    elif job.inputs is not None:
        raise ValueError(f"inputs must be None without bits, got {job.inputs!r}")
    return model


def _batch_options(job: Job) -> dict[str, Any]:
    return {"seed": job.recipe.seed, "seconds": job.seconds, "max_seconds": job.max_seconds}


def _check_texts(manifest: Manifest) -> None:
    for each in manifest.utterances:
        if not each.text or not each.text.strip():
            raise ValueError(f"data must have a text for each utterance, got none of {each.path}")


def _train(
    job: Job,
    model: SpeechEncoder,
    objective: nn.Module,
    batches: AudioBatches,
    watch: Watch | None,
    measure: Callable[[], Mapping[str, float]] | None,
) -> dict[str, Any]:
    writer = _board(job)

    def report(step: int, loss: float) -> None:
        is_due = (step + 1) % _MEASURE_STEPS == 0 or step + 1 == job.recipe.steps
        measures = measure() if measure is not None and is_due else {}
        if watch is not None:
            watch(step, loss, measures)
        if writer is not None:
            for name, value in {"loss": loss, **measures}.items():
                writer.add_scalar(name, value, step)

    summary = train(
        model, objective, batches, job.recipe, job.out,
        resume=job.resume, engine=job.engine, workers=job.workers, report=report,
    )  # fmt: skip
    if _is_first():
        _export(job, model, objective)
    last = dict(measure()) if measure is not None else {}
    return _shown(summary) | last | {"out": str(job.out), "recipe": asdict(job.recipe)}


def _board(job: Job) -> Any:
    if not job.tensorboard or not _is_first():
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(job.out)  # type: ignore[no-untyped-call]


def _shown(summary: Summary) -> dict[str, Any]:
    count = max(1, len(summary.losses) // 50)
    parts = [summary.losses[i : i + count] for i in range(0, len(summary.losses), count)]
    finite = [[loss for loss in part if loss == loss] for part in parts]
    return vars(summary) | {"losses": [sum(part) / len(part) for part in finite if part]}


def _is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _export(job: Job, model: SpeechEncoder, objective: nn.Module) -> None:
    """Write the encoder: in float, or packed. From the state file, which has all of a sharded one.

    Weights that were trained in low bits are in float in the state file alone.
    """
    state = _read_state(job)
    (job.out / CONFIG_FILE).write_text(model.config.to_json())
    folder = job.out if job.bits is None else job.out / LOW_BIT_FOLDER
    if job.bits is None:
        _save(_part(state, "model."), folder / ENCODER_FILE)
    else:
        trained = _build(job)
        trained.load_state_dict(_part(state, "model."))
        convert(trained)
        save_quantized(trained.eval(), folder)
    if isinstance(objective, CTC):
        _save(_part(state, "objective."), folder / HEAD_FILE)


def _read_state(job: Job) -> dict[str, Tensor]:
    state = torch.load(job.out / STATE_FILE, map_location="cpu", weights_only=True)
    found: dict[str, Tensor] = state["model"]
    return found


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value.contiguous()
        for name, value in state.items()
        if name.startswith(prefix)
    }


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    unfinished = path.with_suffix(".partial")
    save_file(tensors, unfinished)
    os.replace(unfinished, path)


def _about(manifest: Manifest, batches: AudioBatches) -> dict[str, Any]:
    return {
        "utterances": len(batches.utterances),
        "left_out": batches.left_out,
        "unreadable": len(manifest.problems),
        "first_unreadable": list(manifest.problems[:20]),
    }


def _majority(targets: KMeansTargets, batches: list[Any]) -> float:
    counts = torch.zeros(len(targets.centers), dtype=torch.int64)
    centers = targets.centers.cpu()
    for batch in batches:
        x, frames = targets.features(batch.waveforms, batch.lengths)
        nearest = torch.cdist(x.cpu(), centers).argmin(-1)
        for row, count in zip(nearest, frames.tolist(), strict=True):
            counts += torch.bincount(row[:count], minlength=len(centers))
    return float(counts.max() / counts.sum())


def _error_rate(objective: CTC, model: nn.Module, batches: AudioBatches, count: int) -> float:
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    references, hypotheses = list[str](), list[str]()
    for n in islice(range(batches.batches_per_epoch), count):
        batch = batches[n].to(device)
        references += [text.lower() for text in batch.texts]
        hypotheses += objective.read(model, batch)
    model.train(was_training)
    return word_error_rate(references, hypotheses)
