"""Cells side by side in processes, until the time is over."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

import torch

from bench.experiment.cells import Cell
from bench.experiment.plan import Plan
from bench.experiment.run import run_cell


def run_grid(
    cells: Sequence[Cell],
    plan: Plan,
    jobs: int,
    minutes: float,
    report: Callable[[Cell, float | BaseException], None],
) -> list[Cell]:
    """Run cells whose files are not there, each after the one whose weights it needs.

    Args:
        cells: in order of importance.
        plan: what they have in common.
        jobs: processes, of one thread each.
        minutes: after which no cell is begun.
        report: called with a cell and its seconds, or what it raised.

    Returns:
        The cells that are left.
    """
    missing = {cell for cell in cells if not plan.path(cell).exists()}
    # weights are not kept with results: where they are gone, they are trained again
    needed = {cell.needs for cell in missing if cell.needs is not None}
    missing |= {cell for cell in needed if not plan.weights(cell).exists()}
    todo = [cell for cell in cells if cell in missing]
    end, failed = time.monotonic() + 60 * minutes, list[Cell]()
    running: dict[Future[float], Cell] = {}
    # a forked process would share the threads of its parent
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        jobs, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        while True:
            ready = [c for c in todo if c.needs is None or _is_whole(c.needs, plan)]
            while ready and len(running) < jobs and time.monotonic() < end:
                cell = ready.pop(0)
                todo.remove(cell)
                running[pool.submit(_run, cell, plan)] = cell
            if not running:
                return [*failed, *todo]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, error = running.pop(future), future.exception()
                report(cell, future.result() if error is None else error)
                if error is not None:
                    failed.append(cell)


def _is_whole(cell: Cell, plan: Plan) -> bool:
    return plan.path(cell).exists() and plan.weights(cell).exists()


def _run(cell: Cell, plan: Plan) -> float:
    started = time.monotonic()
    run_cell(cell, plan)
    return time.monotonic() - started
