"""The commands, their options and their exit codes. Commands import torch when they run.

Exit codes: 0; 1 if ``compare --fail-above`` was exceeded; 2 for a wrong file, format or option, or
if an audio file failed (the others are done).
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from lowbit_kernels.cli.errors import CommandError, first_line
from lowbit_kernels.cli.output import note, show
from lowbit_kernels.cli.train_app import train

app = typer.Typer(
    name="lowbit",
    help="Make speech encoders small and fast: 1 to 8 bits, on CPU and GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
app.add_typer(train, rich_help_panel="Models")

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
_TORCH_ERRORS = ("CheckpointError", "OutOfMemoryError")
_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run ``lowbit`` and exit. What a user can mend is one line on stderr, never a traceback."""
    try:
        code = app(arguments, prog_name="lowbit", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)
    except Exception as error:
        known = (CommandError, ValueError, NotImplementedError, OSError, _UsageError)
        # known by name, without importing torch for `lowbit --help`
        if not isinstance(error, known) and type(error).__name__ not in _TORCH_ERRORS:
            raise
        _fail(error)
    sys.exit(code or 0)


def _fail(error: BaseException) -> None:
    message = getattr(error, "format_message", lambda: first_line(error))()
    if message:  # `lowbit` alone has printed its help, and has nothing to add
        sys.stderr.write(f"lowbit: {message}\n")
    sys.exit(2)


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
    bits: Annotated[int, typer.Option(help="Bits a weight: 1, 2, 4 or 8.")] = 4,
    group_size: Annotated[
        str, typer.Option(help="Weights that share a scale: auto, 32, 64, ..., channel or tensor.")
    ] = "auto",
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
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Encoder layers run in a handful of fused ops.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at OUT.")] = False,
    json: Json = False,
) -> None:
    """Make a checkpoint low-bit and save it as a folder that transformers loads."""
    if out is None and not dry_run:
        raise CommandError("OUT must be given, unless --dry-run is")
    from lowbit_kernels.cli.quantize import make_config, quantize_checkpoint

    config = make_config(preset, bits, group_size, inputs, deterministic, fuse)
    target = None if dry_run else out
    report = quantize_checkpoint(source, target, config, method, force=force)
    saved = [Text.assemble("\nsaved in ", (str(target), "bold"))] if target else []
    data = report.to_dict() | {"out": target and str(target)}
    show(data, Group(report, *saved), as_json=json)


@app.command(rich_help_panel="Models")
def inspect(
    path: Annotated[Path, typer.Argument(help="A low-bit checkpoint.")], json: Json = False
) -> None:
    """Show what a low-bit checkpoint holds."""
    from lowbit_kernels.checkpoint import inspect_checkpoint

    info = inspect_checkpoint(path)
    show(info.to_dict(), info, as_json=json)


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
    from lowbit_kernels.cli.compare import compare as run
    from lowbit_kernels.cli.compare_view import view_comparison

    found = run(float_model, quantized, audio, texts, device)
    show(found.to_dict(), view_comparison(found), as_json=json)
    if fail_above is not None and found.worst > fail_above:
        note(f"disagreement {found.worst:.4f} is above {fail_above:g}", style="red")
        raise typer.Exit(1)


@app.command(rich_help_panel="Models")
def errors(
    model: Annotated[str, typer.Argument(metavar="FLOAT", help="The float model.")],
    audio: Audio,
    preset: Annotated[str, typer.Option(help="small: float inputs. fast: int8 inputs.")] = "fast",
    bits: Annotated[int, typer.Option(help="Bits a weight: 1, 2, 4 or 8.")] = 4,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it as .png, .svg or .pdf.", show_default=False)
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Follow quantization errors through a model: one kind of layer at a time, block by block."""
    from lowbit_kernels.cli.propagation import follow_errors, view_errors
    from lowbit_kernels.cli.quantize import make_config

    config = make_config(preset, bits, "auto", None)
    found, files = follow_errors(model, audio, config, plot, device)
    show(found.to_dict() | {"files": files}, view_errors(found), as_json=json)


@app.command(rich_help_panel="Models")
def cost(
    config: Annotated[
        str, typer.Argument(metavar="PRESET_OR_CONFIG", help="A preset, or a config as JSON.")
    ],
    bits: Annotated[
        int | None, typer.Option(help="Bits a weight. Without: as the config says.")
    ] = None,
    inputs: Annotated[
        int | None, typer.Option(help="Bits of inputs; 16: float. Without: as --bits, sqwq: 8.")
    ] = None,
    scope: Annotated[
        str, typer.Option(help="sqwq or bit-l: linear layers. bit-la: attention's products, too.")
    ] = "bit-l",
    convolutions: Annotated[
        bool, typer.Option("--convolutions", help="Quantize convolutions, too.")
    ] = False,
    final_dim: Annotated[int, typer.Option(help="Of a projection for pre-training.")] = 0,
    seconds: Annotated[float, typer.Option(help="Of audio.")] = 10.0,
    json: Json = False,
) -> None:
    """Count storage, operations and estimated runtime of a speech encoder, layer by layer."""
    from lowbit_kernels.cli.cost import find_cost, view_cost

    found = find_cost(
        config, seconds, bits=bits, inputs=inputs, scope=scope, convolutions=convolutions,
        final_dim=final_dim,
    )  # fmt: skip
    show(found, view_cost(found), as_json=json)


@app.command(rich_help_panel="Audio")
def transcribe(model: Model, audio: Audio, device: Device = None, json: Json = False) -> None:
    """Write what is said in audio files; long files are read in overlapping windows."""
    from lowbit_kernels.cli.transcribe import transcribe as run
    from lowbit_kernels.cli.transcribe import view_transcripts

    found = run(model, audio, device)
    show(found, view_transcripts(found["files"]), as_json=json)


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
    from lowbit_kernels.cli.encode import encode as run
    from lowbit_kernels.cli.encode import summarize

    found = run(model, audio, out, form, device)
    show(found, summarize(found["files"], out), as_json=json)


@app.command(rich_help_panel="This machine")
def env(json: Json = False) -> None:
    """Show versions, devices and backends, for bug reports."""
    from lowbit_kernels.cli.env import collect_env, env_table

    found = collect_env()
    show(found, env_table(found), as_json=json)


@app.command(rich_help_panel="This machine")
def demo(device: Device = None, json: Json = False) -> None:
    """Read spoken digits in float and in low bits, and time both; under a minute."""
    from lowbit_kernels.cli.demo import run_demo, view_demo
    from lowbit_kernels.cli.load import find_device

    found = run_demo(find_device(device))
    show(asdict(found), view_demo(found), as_json=json)
