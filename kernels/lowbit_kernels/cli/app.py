"""The commands, their options and their exit codes. Commands import torch when they run.

Exit codes: 0; 1 if ``compare --fail-above`` was exceeded; 2 for a wrong file, format or option, or
if an audio file failed (the others are done).
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit_kernels.cli.errors import CommandError, first_line

app = typer.Typer(
    name="lowbit",
    help="Make speech encoders small and fast: 1 to 8 bits, on CPU and GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:N. A GPU is taken if there is one.", show_default=False),
]
Model = Annotated[str, typer.Argument(help="A hub id, a folder, or a low-bit checkpoint.")]
Audio = Annotated[
    list[Path], typer.Argument(help="wav, flac, ogg or mp3 files, or folders of them.")
]

# the errors of typer derive from one class, which has moved between its releases
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run ``lowbit`` and exit. What a user can mend is one line on stderr, never a traceback."""
    try:
        code = app(arguments, prog_name="lowbit", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)
    except (CommandError, ValueError, NotImplementedError, OSError, _UsageError) as error:
        _fail(error)
    except RuntimeError as error:
        # CheckpointError, known without importing torch for `lowbit --help`
        if type(error).__name__ not in ("CheckpointError", "OutOfMemoryError"):
            raise
        _fail(error)
    sys.exit(code or 0)


def _fail(error: BaseException) -> None:
    message = getattr(error, "format_message", lambda: first_line(error))()
    if message:  # `lowbit` alone has printed its help, and has nothing to add
        sys.stderr.write(f"lowbit: {message}\n")
    sys.exit(2)


def _finish(outcomes: list[dict[str, Any]]) -> None:
    """One line on stderr for every file that failed, and exit code 2 if one did."""
    from lowbit_kernels.cli.output import note

    failed = [outcome for outcome in outcomes if "error" in outcome]
    for outcome in failed:
        note(f"{outcome['file']}: {outcome['error']}", style="red")
    if failed:
        raise typer.Exit(2)


@app.command(rich_help_panel="Models")
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A hub id, a folder, or a low-bit checkpoint.")
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The new folder.", show_default=False)
    ] = None,
    preset: Annotated[
        str, typer.Option(help="small: least error. fast: int8 arithmetic, most speed.")
    ] = "small",
    bits: Annotated[
        int | None, typer.Option(help="Bits a weight: 1, 2, 4 or 8; 4 if not given.")
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(help="Weights that share a scale: 32, 64, ..., channel or tensor."),
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(help="int8 or float: how layers take their inputs.")
    ] = None,
    method: Annotated[str, typer.Option(help="Rounding: rtn, search or hqq.")] = "rtn",
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="Layers give an utterance the same bits in any batch."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at OUT.")] = False,
    json: Json = False,
) -> None:
    """Make a checkpoint low-bit and save it as a folder that transformers loads."""
    if out is None and not dry_run:
        raise CommandError("OUT must be given, unless --dry-run is")
    from lowbit_kernels.cli import output
    from lowbit_kernels.cli.quantize import make_config, quantize_checkpoint

    config = make_config(preset, bits, group_size, inputs, deterministic)
    report = quantize_checkpoint(source, None if dry_run else out, config, method, force=force)
    if json:
        output.print_json(report.to_dict() | {"out": None if dry_run else str(out)})
        return
    output.results().print(report)
    if not dry_run:
        output.results().print(f"\nsaved in [bold]{out}[/]")


@app.command(rich_help_panel="Models")
def inspect(
    path: Annotated[Path, typer.Argument(help="A low-bit checkpoint.")], json: Json = False
) -> None:
    """Show what a low-bit checkpoint holds."""
    from lowbit_kernels.checkpoint import inspect_checkpoint
    from lowbit_kernels.cli import output

    info = inspect_checkpoint(path)
    if json:
        output.print_json(info.to_dict())
    else:
        output.results().print(info)


@app.command(rich_help_panel="Models")
def compare(
    float_model: Annotated[str, typer.Argument(metavar="FLOAT", help="The float model.")],
    quantized: Annotated[str, typer.Argument(metavar="QUANT", help="The low-bit model.")],
    audio: Audio,
    texts: Annotated[
        Path | None,
        typer.Option(help="What is said: JSON, or lines of file name, tab, text."),
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(min=0.0, help="Exit 1 if any disagreement is above this: 0.05 is 5 %."),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure how far a low-bit model is from its float model, on audio."""
    from lowbit_kernels.cli import output
    from lowbit_kernels.cli.audio import find_audio
    from lowbit_kernels.cli.compare import compare as run
    from lowbit_kernels.cli.compare_view import show_comparison
    from lowbit_kernels.cli.load import find_device, load_speech
    from lowbit_kernels.cli.words import read_texts

    files, known = find_audio(audio), read_texts(texts) if texts else {}
    place = find_device(device)
    found = run(load_speech(float_model, place), load_speech(quantized, place), files, known)
    if json:
        names = {"float": float_model, "quantized": quantized, "device": str(place)}
        output.print_json(names | found.to_dict())
    else:
        show_comparison(found)
    _finish(list(found.files))
    if fail_above is not None and found.worst > fail_above:
        output.note(f"disagreement {found.worst:.4f} is above {fail_above:g}", style="red")
        raise typer.Exit(1)


@app.command(rich_help_panel="Audio")
def transcribe(model: Model, audio: Audio, device: Device = None, json: Json = False) -> None:
    """Write what is said in audio files; long files are read in overlapping windows."""
    from lowbit_kernels.cli import output
    from lowbit_kernels.cli.audio import find_audio
    from lowbit_kernels.cli.load import find_device, load_speech
    from lowbit_kernels.cli.transcribe import print_transcripts
    from lowbit_kernels.cli.transcribe import transcribe as run

    files, place = find_audio(audio), find_device(device)
    outcomes = run(load_speech(model, place), files)
    if json:
        output.print_json({"model": model, "device": str(place), "files": outcomes})
    else:
        print_transcripts(outcomes)
    _finish(outcomes)


@app.command(rich_help_panel="Audio")
def encode(
    model: Model,
    audio: Audio,
    out: Annotated[Path, typer.Option(help="The folder for the frames.", show_default=False)],
    form: Annotated[str, typer.Option("--format", help="safetensors or npy.")] = "safetensors",
    device: Device = None,
    json: Json = False,
) -> None:
    """Write the encoder's frames, one file for each audio file; what is there is skipped."""
    from lowbit_kernels.cli import output
    from lowbit_kernels.cli.audio import find_audio
    from lowbit_kernels.cli.encode import encode as run
    from lowbit_kernels.cli.encode import name_targets, summarize
    from lowbit_kernels.cli.load import find_device, load_speech

    targets = name_targets(audio, find_audio(audio), out, form)
    place = find_device(device)
    outcomes = run(load_speech(model, place), targets, out)
    if json:
        output.print_json({"model": model, "device": str(place), "files": outcomes})
    else:
        output.results().print(summarize(outcomes, out))
    _finish(outcomes)


@app.command(rich_help_panel="This machine")
def env(json: Json = False) -> None:
    """Show versions, devices and backends, for bug reports."""
    from lowbit_kernels.cli import output
    from lowbit_kernels.cli.env import collect_env, env_table

    found = collect_env()
    if json:
        output.print_json(found)
    else:
        output.results().print(env_table(found))


@app.command(rich_help_panel="This machine")
def demo(device: Device = None, json: Json = False) -> None:
    """Read spoken digits in float and in low bits, and time both; under a minute."""
    from lowbit_kernels.cli import output
    from lowbit_kernels.cli.demo import run_demo
    from lowbit_kernels.cli.demo_view import show_demo
    from lowbit_kernels.cli.load import find_device

    found = run_demo(find_device(device))
    if json:
        output.print_json(found.to_dict())
    else:
        show_demo(found)
