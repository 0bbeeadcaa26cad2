"""Everything that is measured of one float model, an utterance at a time.

Dimension key: B draws, T frames, C channels, V tokens.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.experiment.arms import (
    ALL,
    WIDTHS,
    Slots,
    front_end_modules,
    groups_of,
    quantized,
    spec_of,
)
from bench.experiment.data import Utterance
from bench.experiment.models import SLOTS, DigitReader, greedy
from lowbit_kernels import QuantConfig, prepare_qat
from ssl_models.error_propagation.interventions import noisy, swapped
from ssl_models.error_propagation.measures import (
    additivity,
    decibels,
    energy,
    joint_excess,
    linear_cka,
    noise_to_signal,
    token_disagreement,
    token_divergence,
)
from ssl_models.error_propagation.sources import Source, find_blocks, find_sources, modules_of
from ssl_models.error_propagation.trace import Trace, trace

# signal to noise in decibels, the same at every branch
NOISE_LEVELS = (10, 15, 20, 30)
QUIET = 40
GAIN_DRAWS = 10
# pairs of slots, of which the first is the primary endpoint's
PAIRS = (("X", "Y"), ("X", "F"), ("Y", "F"))

Row = dict[str, Any]


@dataclass
class Subject:
    """A float model, and its quantized copies that give parts to it.

    Attributes:
        model: in evaluation mode.
        slots: which branches make errors in subsets.
        decode: what logits [T, V] read.
        donors: by bits of weights, with every source quantized.
        front_ends: by bits, with the front end quantized instead.
        attention: by bits, with low-bit products of attention instead.
    """

    model: nn.Module
    slots: Slots
    decode: Callable[[Tensor], Sequence[int]]
    donors: Mapping[int, nn.Module]
    front_ends: Mapping[int, nn.Module]
    attention: Mapping[int, nn.Module]
    blocks: tuple[str, ...] = field(init=False)
    sources: tuple[Source, ...] = field(init=False)
    groups: dict[str, tuple[str, ...]] = field(init=False)
    # the model's own modules, whatever stands in their places at the moment
    own: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.blocks, self.sources = find_blocks(self.model), find_sources(self.model)
        self.groups = groups_of(self.model, self.slots)
        self.own = dict(self.model.named_modules())

    @property
    def watched(self) -> tuple[str, ...]:
        """Blocks, and the branches."""
        return (*self.blocks, *(source.name for source in self.sources))


def make_subject(model: DigitReader, first: Utterance) -> Subject:
    """Quantize a float model in every way that the arms need.

    Args:
        model: trained, in float.
        first: sets the scales of low-bit products of attention, as BiT does.
    """
    attention = {}
    if any(source.kind == "attention" for source in find_sources(model)):
        for bits in WIDTHS:
            donor = copy.deepcopy(model).eval()
            prepare_qat(donor, QuantConfig(skip=(".",), attention_matmuls=f"int{bits}"))
            with torch.inference_mode():
                donor(first.audio[None])
            attention[bits] = donor
    slots, front = SLOTS.get(model.name, {}), front_end_modules(model)
    return subject_of(model, slots, greedy, front, attention)


def subject_of(
    model: nn.Module,
    slots: Slots,
    decode: Callable[[Tensor], Sequence[int]],
    front_end: Sequence[str],
    attention: Mapping[int, nn.Module],
) -> Subject:
    """A model that gives logits [B, T, V] and something else, with its quantized copies."""
    model = copy.deepcopy(model).eval()
    names = modules_of(find_sources(model))
    donors, front_ends = (
        {bits: quantized(model, part, spec_of(bits)) for bits in WIDTHS}
        for part in (names, front_end)
    )
    return Subject(model, slots, decode, donors, front_ends, attention)


def run(model: nn.Module, audio: Tensor) -> Tensor:
    """Logits [B, T, V] of waveforms [B, S]."""
    logits: Tensor = model(audio)[0]
    return logits


@torch.inference_mode()
def measure(subject: Subject, utterance: Utterance, *, seed: int, gains: bool) -> Row:
    """All measures of one utterance.

    Args:
        subject: what is measured.
        utterance: on what.
        seed: of the noise.
        gains: whether to measure the gains of branches as well, which takes as long as the rest.

    Returns:
        JSON-able numbers by name; lists are of blocks where the name starts with ``"blocks/"``, and
        of sources where it starts with ``"sources/"``.
    """
    audio = utterance.audio[None]
    look = partial(trace, forward=run, utterance=audio, names=subject.watched)
    expected = look(subject.model)
    row: Row = {"digits": utterance.digits, "read/float": list(subject.decode(expected.end[0]))}
    for bits in WIDTHS:
        row |= _quantized(subject, bits, look, expected)
    row |= _noise(subject, look, expected, seed)
    for bits in WIDTHS:
        # noise as loud as each branch's own error, without its structure
        levels = {
            source.name: -decibels(local)
            for source, local in zip(subject.sources, row[f"sources/w{bits}/local"], strict=True)
            if local
        }
        with noisy(subject.model, levels, seed):
            row |= _errors(subject, f"w{bits}/gaussian", look(subject.model), expected)
    if gains:
        row["sources/gain"] = _gains(subject, audio, expected, seed)
        for bits in WIDTHS:
            local = row[f"sources/w{bits}/local"]
            pairs = zip(local, row["sources/gain"], strict=True)
            predicted = decibels(sum(each * gain for each, gain in pairs))
            row[f"w{bits}/account"] = predicted - row[f"w{bits}/{ALL}/nsr"]
    return row


def _quantized(subject: Subject, bits: int, look: Any, expected: Trace) -> Row:
    """Of one width: groups, each source alone, front end, products of attention."""
    model, donor, prefix = subject.model, subject.donors[bits], f"w{bits}"
    row: Row = {}
    deltas: dict[str, list[Tensor]] = {}
    for group, names in subject.groups.items():
        with swapped(model, donor, names):
            if group == ALL:
                with _feeding(subject, donor) as fed:
                    got = look(model)
                row[f"sources/{prefix}/fed"] = [fed.get(source.name) for source in subject.sources]
            else:
                got = look(model)
        row |= _errors(subject, f"{prefix}/{group}", got, expected)
        deltas[group] = _deltas(subject, got, expected)
    parts, local = [], []
    for source in subject.sources:
        with swapped(model, donor, source.modules):
            got = look(model)
        wanted = expected.outputs[source.name]
        local.append(energy(got.outputs[source.name] - wanted) / energy(wanted))
        parts.append(_deltas(subject, got, expected))
    row[f"sources/{prefix}/local"] = local
    row[f"sources/{prefix}/alone"] = [
        noise_to_signal(part[-1], expected.outputs[subject.blocks[-1]][0]) for part in parts
    ]
    row |= _sums(prefix, deltas, parts)
    for name, others in (("front_end", subject.front_ends), ("attention", subject.attention)):
        if bits in others:
            with torch.inference_mode():
                row |= _errors(subject, f"{prefix}/{name}", look(others[bits]), expected)
    return row


def _noise(subject: Subject, look: Any, expected: Trace, seed: int) -> Row:
    """Gaussian noise instead of quantization, at equal levels, and the two checks of it."""
    model, row = subject.model, Row()
    names = {source.name for source in subject.sources}
    for level in NOISE_LEVELS:
        deltas = {}
        for group, modules in subject.groups.items():
            with noisy(model, {name: level for name in modules if name in names}, seed):
                got = look(model)
            row |= _errors(subject, f"noise{level}/{group}", got, expected)
            deltas[group] = _deltas(subject, got, expected)
        row |= _joint(f"noise{level}", deltas)
    parts = []
    for source in subject.sources:
        with noisy(model, {source.name: QUIET}, seed):
            parts.append(_deltas(subject, look(model), expected))
    with noisy(model, dict.fromkeys(sorted(names), QUIET), seed):
        whole = _deltas(subject, look(model), expected)
    row |= _sums(f"noise{QUIET}", {ALL: whole}, parts)
    # the same noise twice at one place of the residual stream
    first = subject.sources[0].name
    doubled = []
    for times in (1.0, 2.0):
        with noisy(model, {first: QUIET}, seed, times=times):
            doubled.append(_deltas(subject, look(model), expected)[-1])
    row["twice/J"] = joint_excess(doubled[1], doubled[0], doubled[0])
    return row


def _gains(subject: Subject, audio: Tensor, expected: Trace, seed: int) -> list[float]:
    """Noise to signal after the last block, over that at the branch's output."""
    last, found = subject.blocks[-1], []
    wanted = expected.outputs[last][0]
    for source in subject.sources:
        with noisy(subject.model, {source.name: QUIET}, seed + 1):
            got = trace(subject.model, run, audio.expand(GAIN_DRAWS, -1), (last,)).outputs[last]
        ratios = [noise_to_signal(draw - wanted, wanted) for draw in got]
        found.append(sum(ratios) / len(ratios) * 10 ** (QUIET / 10))
    return found


def _errors(subject: Subject, name: str, got: Trace, expected: Trace) -> Row:
    """How far an arm is from the float model, after every block and at the end."""
    pairs = [(got.outputs[block][0], expected.outputs[block][0]) for block in subject.blocks]
    return {
        f"blocks/{name}/nsr": [decibels(noise_to_signal(a - b, b)) for a, b in pairs],
        f"blocks/{name}/cka": [linear_cka(a, b) for a, b in pairs],
        f"{name}/nsr": decibels(noise_to_signal(pairs[-1][0] - pairs[-1][1], pairs[-1][1])),
        f"{name}/kl": token_divergence(got.end[0], expected.end[0]),
        f"{name}/disagreement": token_disagreement(got.end[0], expected.end[0]),
        f"read/{name}": list(subject.decode(got.end[0])),
    }


def _sums(name: str, deltas: Mapping[str, Sequence[Tensor]], parts: Sequence[Any]) -> Row:
    """Whether the errors of all sources add up, after every block; and of pairs of slots."""
    row = _joint(name, deltas)
    rows = [
        additivity(whole, each)
        for whole, each in zip(deltas[ALL], zip(*parts, strict=True), strict=True)
    ]
    for measure_name in ("ratio", "alignment", "interaction"):
        row[f"blocks/{name}/{measure_name}"] = [getattr(each, measure_name) for each in rows]
        row[f"{name}/{measure_name}"] = getattr(rows[-1], measure_name)
    return row


def _joint(name: str, deltas: Mapping[str, Sequence[Tensor]]) -> Row:
    """J of each pair of slots, after every block and after the last."""
    row: Row = {}
    for a, b in PAIRS:
        if a + b not in deltas:
            continue
        values = [
            joint_excess(*each) for each in zip(deltas[a + b], deltas[a], deltas[b], strict=True)
        ]
        row |= {f"blocks/{name}/J({a},{b})": values, f"{name}/J({a},{b})": values[-1]}
    return row


def _deltas(subject: Subject, got: Trace, expected: Trace) -> list[Tensor]:
    return [got.outputs[block][0] - expected.outputs[block][0] for block in subject.blocks]


@contextlib.contextmanager
def _feeding(subject: Subject, donor: nn.Module) -> Iterator[dict[str, float]]:
    """Collect each branch's own error on the inputs that the quantized model gives it."""
    found: dict[str, float] = {}
    entered: dict[str, Tensor] = {}

    def enter(name: str, module: nn.Module, args: Any) -> None:
        entered[name] = args[0]

    def leave(name: str, own: Any, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # a branch with its scale beside it: what enters that is what both models share
        x = entered[name] if len(own) == 1 else own[0](entered[name])
        wanted = own[-1](x, *args[1:], **kwargs)
        a, b = (each[0] if isinstance(each, tuple) else each for each in (output, wanted))
        found[name] = energy(a - b) / energy(b)

    with contextlib.ExitStack() as hooks:
        for source in subject.sources:
            own = [subject.own[name] for name in source.modules]
            first, last = (donor.get_submodule(source.modules[i]) for i in (0, -1))
            hooks.enter_context(first.register_forward_pre_hook(partial(enter, source.name)))
            see = partial(leave, source.name, own)
            hooks.enter_context(last.register_forward_hook(see, with_kwargs=True))
        yield found
