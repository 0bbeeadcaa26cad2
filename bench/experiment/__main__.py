"""``python -m bench.experiment run`` and ``report``."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.status import Status

from bench.experiment.cells import FEW_SEEDS, Cell, all_cells
from bench.experiment.data import read_speech
from bench.experiment.grid import run_grid
from bench.experiment.plan import Plan
from bench.experiment.record import write
from bench.record import environment

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console(highlight=False)

REAL = ("hama", "whisper-base")

Out = Annotated[Path, typer.Option(help="Folder of the results, one JSON file a cell.")]


@app.command()
def run(
    digits: Annotated[Path, typer.Option(help="The Free Spoken Digit Dataset.", exists=True)],
    speech: Annotated[Path, typer.Option(help="Read speech in FLAC, any.", exists=True)],
    out: Out,
    work: Annotated[Path, typer.Option(help="For checkpoints, which the results do not need.")],
    minutes: Annotated[float, typer.Option(help="No cell is begun after these.")] = 150.0,
    seeds: Annotated[int, typer.Option(min=1, help="Replicates of AA, AC and CC.")] = FEW_SEEDS,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    float_steps: Annotated[int, typer.Option(min=1)] = 1500,
    qat_steps: Annotated[int, typer.Option(min=1)] = 500,
    strings: Annotated[int | None, typer.Option(min=1, help="Fewer, to try it.")] = None,
    speeches: Annotated[int, typer.Option(min=0)] = 50,
) -> None:
    """Run every cell whose file is not there; a run that was stopped goes on where it was."""
    plan = Plan(
        digits, speech, out, work, float_steps, qat_steps, strings, speeches, device
    )  # fmt: skip
    cells = list(all_cells(seeds))
    missing = sum(not plan.path(cell).exists() for cell in cells)
    console.print(f"{missing} of {len(cells)} cells to run, {minutes:g} minutes")
    if left := run_grid(cells, plan, jobs, minutes, _say):
        console.print(f"{len(left)} cells are left: run the same command again")
        raise typer.Exit(1)


def _say(cell: Cell, found: float | BaseException) -> None:
    if isinstance(found, BaseException):
        console.print(f"{cell.name:24} [red]{type(found).__name__}: {found}[/]")
    else:
        console.print(f"{cell.name:24} {found / 60:5.1f} min")


@app.command()
def real(
    speech: Annotated[Path, typer.Option(help="Read speech in FLAC, any.", exists=True)],
    out: Out,
    hama: Annotated[Path | None, typer.Option(help="The package's asr_waveform.hama.")] = None,
    whisper: Annotated[
        list[Path] | None, typer.Option(help="CTranslate2's model.bin of base; its parts in turn.")
    ] = None,
    speeches: Annotated[int, typer.Option(min=1)] = 50,
) -> None:
    """Measure encoders with real weights."""
    from bench.experiment.real import measure_hama, measure_whisper

    utterances = read_speech(speech, speeches)
    tasks: dict[str, Callable[[Callable[[int], None]], dict[str, Any]]] = {}
    if hama:
        tasks["hama"] = partial(measure_hama, hama, utterances)
    if whisper:
        tasks["whisper-base"] = partial(measure_whisper, whisper, utterances)
    for name, task in tasks.items():
        with console.status(name) as status:
            found = task(partial(_tell, status, name))
        about = environment("cpu", torch.get_num_threads(), "python -m bench.experiment real")
        write(out / f"{name}.json", about | found)
        console.print(f"{name} is in {out}")


def _tell(status: Status, name: str, done: int) -> None:
    status.update(f"{name}: {done} utterances")


@app.command()
def report(
    out: Out,
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures and tables.")] = None,
) -> None:
    """Summarize the results: numbers, the verdict, pictures."""
    from bench.experiment.plots import draw_all
    from bench.experiment.summary import summarize, summarize_real
    from bench.experiment.tables import real_tables, tables

    cells, real = read_cells(out), read_real(out)
    if not cells and not real:
        raise typer.BadParameter(f"--out must hold results, got {out}")
    summary = summarize(cells)
    folder = plots or out
    write(folder / "summary.json", summary | {"real": summarize_real(real)})
    for path in draw_all(summary, cells, folder):
        console.print(f"drawn {path}")
    text = tables(summary) + real_tables(summarize_real(real))
    (folder / "tables.md").write_text(text)
    console.print(Markdown(text))


def read_cells(out: Path) -> dict[Cell, dict[str, object]]:
    """What the files of cells hold."""
    found = {}
    for path in sorted(out.glob("*-*-*.json")):
        content = json.loads(path.read_text())
        about = content["cell"]
        found[Cell(about["model"], about["seed"], about["stage"])] = content
    return found


def read_real(out: Path) -> dict[str, dict[str, object]]:
    """What the files of models with real weights hold."""
    paths = (out / f"{name}.json" for name in REAL)
    return {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}


if __name__ == "__main__":
    app()
