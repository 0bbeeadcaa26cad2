"""What a benchmark case is: data. ``harness.run_case`` owns everything else.

Points are shapes with their origin, providers are ours and the peers, one of them the baseline.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Row = dict[str, Any]
Result = Tensor | tuple[Tensor, ...]
# how the report shows a case: a row a provider, a row a point, goals, or one line a value
Layout = Literal["providers", "points", "goals", "values"]
# a GPU's ways to time a call, see ``timing.sampler``
Mode = Literal["graph", "eager", "flushed", "warm"]
ALL_MODES: tuple[Mode, ...] = ("graph", "eager", "flushed", "warm")

BEST_PEER, FLOOR = "best peer", "floor"
# reads a weight and computes nothing: a bound, and nobody's peer
READ_ONLY = "read-only kernel"


@dataclass(frozen=True)
class Goal:
    """What one of our providers should reach, as a ratio of times: above 1 ours is faster.

    Args:
        ours: name of the provider.
        good, moonshot: the ratio to reach, and the one to dream of.
        against: name of a peer, ``BEST_PEER``, or ``FLOOR`` for the share of the floor.
    """

    ours: str
    good: float
    moonshot: float
    against: str


@dataclass(frozen=True)
class Point:
    """One shape of a case.

    Args:
        name: unique in the case.
        sizes: the dimensions.
        origin: the model and layer that has this shape.
        goals: of our providers here.
    """

    name: str
    sizes: dict[str, int]
    origin: str
    goals: tuple[Goal, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What any implementation must do at least.

    Args:
        flops: floating-point (or integer) operations, two a multiply-add.
        bytes: of inputs and outputs; the weight is counted as each provider stores it.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Prepared:
    """A provider ready to be timed at one point.

    Args:
        call: runs it once and returns the result.
        max_error: the largest relative error (Frobenius norm) that is not a bug.
        expected: what ``call`` must return to within ``max_error``; None: the baseline's result.
        weight_bytes: of the weights as stored.
        facts: further numbers for the record, read after the timing.
        int8: whether it multiplies in int8, whose roofline is another.
    """

    call: Callable[[], Result]
    max_error: float
    expected: Callable[[], Result] | None = None
    weight_bytes: int = 0
    facts: Callable[[], Row] = dict
    int8: bool = False


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Args:
        name: as shown in tables; ours begin with ``lowbit``.
        prepare: makes it ready for a case's inputs.
        needs: modules it imports, to the pip package that brings each; empty: nothing optional.
        slow: takes minutes to prepare, so it runs only when asked for.
        gpu_only: whether it does not exist on a CPU.
        points: names of the points it runs at; None: all.
    """

    name: str
    prepare: Callable[[Any], Prepared]
    needs: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False
    gpu_only: bool = False
    points: tuple[str, ...] | None = None

    @property
    def missing(self) -> list[str]:
        """The pip packages that are not installed."""
        return [pip for module, pip in self.needs.items() if not importlib.util.find_spec(module)]

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's."""
        return self.name.startswith("lowbit")


@dataclass(frozen=True)
class Case:
    """Providers timed side by side over some points.

    Args:
        name: on the command line, and of the JSON file.
        title: one line for the report.
        points: the shapes.
        make_inputs: what the providers share at a point, on a device and of a dtype; with ``sets``
            above 1 a fourth argument is the seed.
        providers: with the baseline among them.
        baseline: name of the provider that ratios refer to.
        cost: of a point, with the bytes an element of its inputs and outputs.
        layout: ``"providers"``, ``"points"`` or ``"goals"``.
        weight: share of a sitting's time, relative to the other cases.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the inputs.
        probe: numbers about a (point, provider) that are measured apart, in a process of their own.
        small: the points of ``--small``, which need no GPU; empty: the case has none.
        sets: inputs and weights that the calls cycle through, so that no cache holds them.
        modes: how a GPU times it; ratios are those of the first mode that both sides have.
        in_all: whether ``all`` runs it.
    """

    name: str
    title: str
    points: tuple[Point, ...]
    make_inputs: Callable[..., Any]
    providers: tuple[Provider, ...]
    baseline: str
    cost: Callable[[Point, int], Cost]
    layout: Layout = "points"
    weight: float = 1.0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    probe: Callable[[Point, Provider], Row] | None = None
    small: tuple[Point, ...] = ()
    sets: int = 1
    modes: tuple[Mode, ...] = ("flushed",)
    in_all: bool = True

    def provider(self, name: str) -> Provider:
        """The provider called ``name``."""
        return next(p for p in self.providers if p.name == name)

    def point(self, name: str) -> Point:
        """The point called ``name``."""
        return next(p for p in self.points if p.name == name)


@dataclass(frozen=True)
class ValueCase:
    """A few numbers that are no comparison of kernels.

    Args:
        name, title, weight: as in ``Case``.
        measure: returns rows of ``{"name", "value", "unit"}``, with ``"q1"`` and ``"q3"`` where the
            value is a median, and ``"goal"`` and ``"moonshot"`` where there are such.
        device: ``"cpu"`` or ``"cuda"``; ``measure`` is called with it if ``takes_device``.
        in_all: as in ``Case``.
        takes_device: whether it measures any device.
    """

    name: str
    title: str
    measure: Callable[..., list[Row]]
    weight: float = 0.1
    device: str = "cpu"
    layout: Layout = "values"
    in_all: bool = True
    takes_device: bool = False


def shrunk(case: Case | ValueCase) -> Case | ValueCase:
    """The case at its small points, on the GPU if there is one."""
    has_gpu = case.device == "cuda" and torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    if isinstance(case, ValueCase):
        return replace(case, device=device)
    return replace(case, points=case.small, device=device, sets=min(case.sets, 2))
