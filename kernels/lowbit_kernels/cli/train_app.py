"""The commands of ``lowbit train``; they import torch when they run."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit_kernels.cli.output import show

train = typer.Typer(name="train", help="Pre-train, fine-tune and distill encoders.")

Data = Annotated[Path, typer.Argument(help="A folder of audio, a .tsv or a .jsonl manifest.")]
Out = Annotated[Path, typer.Argument(help="Folder for the run and its encoder.")]
Encoder = Annotated[str, typer.Option(help="A preset, a config as JSON, or a run's folder.")]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML: steps, peak_rate, bf16, ...")]
Steps = Annotated[int | None, typer.Option(help="Instead of the recipe's.")]
Seed = Annotated[int | None, typer.Option(help="Instead of the recipe's.")]
Bits = Annotated[int | None, typer.Option(help="Weights in training: 8, 4, 2, 1. Without: float.")]
Inputs = Annotated[str | None, typer.Option(help="int8, int4, int2 or int1. Without: float.")]
Quantizer = Annotated[str, typer.Option(help="ste, lsq or elastic.")]
Seconds = Annotated[float, typer.Option(help="Of audio in a batch.")]
Longest = Annotated[float, typer.Option(help="Seconds of the longest utterance.")]
Engine = Annotated[str | None, typer.Option(help="plain, ddp, fsdp or accelerate.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last state in OUT.")]
Workers = Annotated[int, typer.Option(help="Processes that prepare batches.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N, of one process.")]
Board = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files to OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@train.command()
def digits(
    data: Annotated[Path, typer.Argument(help="Folder of the Free Spoken Digit Dataset.")],
    out: Out,
    steps: Steps = None,
    seed: Seed = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Faster where a CPU has it.")] = False,
    synthetic: Annotated[bool, typer.Option(help="Add voices of espeak-ng.")] = True,
    resume: Resume = False,
    threads: Annotated[int, typer.Option(help="Of the CPU.")] = 2,
    json: Json = False,
) -> None:
    """Train the checkpoint that comes along: a small wav2vec2 that reads digits."""
    from lowbit_kernels.cli.train import run_digits, view_run

    flags = {"steps": steps, "seed": seed, "bf16": bf16 or None}
    found = run_digits(data, out, threads, flags, synthetic=synthetic, resume=resume)
    show(found, view_run(found), as_json=json)


def _run(name: str, given: dict[str, Any], *arguments: Any, **options: Any) -> None:
    from lowbit_kernels.cli.train import run_task, view_run
    from ssl_models.training import tasks

    found = run_task(getattr(tasks, name), given, *arguments, **options)
    # of the processes of torchrun, the first one speaks
    if os.environ.get("RANK", "0") == "0":
        show(found, view_run(found), as_json=given["json"])


@train.command()
def pretrain(
    data: Data, out: Out, encoder: Encoder = "hubert-base", recipe: RecipeFile = None,
    clusters: Annotated[int, typer.Option(help="Of k-means.")] = 100,
    features: Annotated[Path | None, typer.Option(help="Cluster this run's; else MFCCs.")] = None,
    layer: Annotated[str | None, typer.Option(help="Of these: encoder.layers.5")] = None,
    steps: Steps = None, seed: Seed = None, bits: Bits = None, inputs: Inputs = None,
    quantizer: Quantizer = "lsq", seconds: Seconds = 87.5, max_seconds: Longest = 15.625,
    engine: Engine = None, resume: Resume = False, workers: Workers = 0, device: Device = "cpu",
    tensorboard: Board = False, json: Json = False,
) -> None:  # fmt: skip
    """HuBERT's masked prediction; longer utterances are cropped."""
    _run("pretrain", locals(), clusters=clusters, features=features, layer=layer)


@train.command()
def finetune(
    data: Data, out: Out, encoder: Encoder = "hubert-base", recipe: RecipeFile = None,
    test: Annotated[Path | None, typer.Option(help="A manifest to be judged by.")] = None,
    steps: Steps = None, seed: Seed = None, bits: Bits = None, inputs: Inputs = None,
    quantizer: Quantizer = "lsq", seconds: Seconds = 87.5, max_seconds: Longest = 15.625,
    engine: Engine = None, resume: Resume = False, workers: Workers = 0, device: Device = "cpu",
    tensorboard: Board = False, json: Json = False,
) -> None:  # fmt: skip
    """CTC on transcripts; longer utterances are left out."""
    _run("finetune", locals(), test=test)


@train.command()
def distill(
    data: Data, out: Out, teacher: Annotated[Path, typer.Argument(help="A float run's folder.")],
    attention: Annotated[bool, typer.Option(help="Attention maps, too.")] = True,
    recipe: RecipeFile = None, steps: Steps = None, seed: Seed = None, bits: Bits = None,
    inputs: Inputs = None, quantizer: Quantizer = "lsq", seconds: Seconds = 87.5,
    max_seconds: Longest = 15.625, engine: Engine = None, resume: Resume = False,
    workers: Workers = 0, device: Device = "cpu", tensorboard: Board = False, json: Json = False,
) -> None:  # fmt: skip
    """Learn the outputs, layers and attention of a float encoder, usually with --bits."""
    given = locals() | {"encoder": str(teacher)}
    _run("distill", given, teacher, attention=attention)
