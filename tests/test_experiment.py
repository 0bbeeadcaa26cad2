"""The experiment: its models, data, arms, measures and statistics."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bench.experiment.arms import ALL, groups_of, only, quantized, spec_of, storage
from bench.experiment.data import DigitBatches, Utterance, test_strings
from bench.experiment.measure import make_subject, measure
from bench.experiment.models import BLANK, CONFIGS, SLOTS, DigitReader, greedy
from bench.experiment.statistics import (
    Estimate,
    estimate,
    holm,
    joined_verdict,
    mixing,
    paired_bootstrap,
    verdict,
)
from lowbit_kernels.modules import QuantizedModule
from ssl_models.digits.data import Clip
from ssl_models.error_propagation.sources import find_sources, modules_of


def weights_of(model: nn.Module, names: tuple[str, ...]) -> int:
    layers = [
        layer
        for name in names
        for layer in model.get_submodule(name).modules()
        if isinstance(layer, nn.Linear | nn.Conv1d)
    ]
    return sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize(
    ("name", "millions", "branches"),
    [
        ("T", 1.573, 16), ("T-win", 1.573, 16), ("DN", 1.548, 28), ("SW", 1.558, 6),
        ("AC", 1.589, 16), ("Squeezeformer", 1.572, 16), ("AA", 1.573, 16), ("CC", 1.605, 16),
    ],
)  # fmt: skip
def test_models_have_the_weights_of_the_protocol(name: str, millions: float, branches: int) -> None:
    model = DigitReader(name)
    sources = find_sources(model)
    assert weights_of(model, modules_of(sources)) / 1e6 == pytest.approx(millions, abs=6e-4)
    assert sum(source.kind != "rate" for source in sources) == branches


def test_storage_is_matched() -> None:
    found = {name: storage(DigitReader(name)) for name in CONFIGS}
    for bits, share in (("16", 0.02), ("8", 0.02), ("4", 0.02), ("2", 0.03), ("1", 0.05)):
        sizes = [each[bits] for each in found.values()]
        middle = sum(sizes) / len(sizes)
        assert all(abs(size / middle - 1) < share for size in sizes), (bits, sizes)
    model = DigitReader("AC")
    parameters = sum(each.numel() for each in model.parameters())
    assert found["AC"]["16"] == pytest.approx(parameters * 2 / 1e6)
    weights = weights_of(model, modules_of(find_sources(model)))
    assert found["AC"]["16"] - found["AC"]["4"] == pytest.approx(weights * 1.5 / 1e6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_utterance_reads_as_alone(name: str) -> None:
    torch.manual_seed(0)
    model = DigitReader(name).double().eval()
    batch, lengths = torch.randn(2, 12000, dtype=torch.float64), torch.tensor([12000, 7000])
    with torch.inference_mode():
        logits, counts = model(batch, lengths)
        alone, _ = model(batch[1:, :7000])
    assert counts.tolist() == [36, 20]
    torch.testing.assert_close(logits[1:, :20], alone)


def test_greedy_merges_and_drops_blanks() -> None:
    best = torch.tensor([BLANK, 3, 3, BLANK, 3, 7, 7, BLANK, 0])
    assert greedy(nn.functional.one_hot(best, 11).float()) == (3, 3, 7, 0)


def clips(speakers: tuple[str, ...] = ("ann", "bob"), per_digit: int = 5) -> list[Clip]:
    rng = np.random.default_rng(0)
    return [
        Clip(digit, name, index, rng.normal(0, 1, 3000 + 100 * digit).astype(np.float32))
        for name in speakers
        for digit in range(10)
        for index in range(per_digit)
    ]


def test_training_batches_are_a_function_of_seed_and_step() -> None:
    batches = DigitBatches(clips(), seed=3)
    assert (batches[7].counts == 1).all()
    assert batches[7].waveforms.shape == (16, 17600)
    assert DigitBatches(clips(), seed=3, curriculum=False)[7].counts.max() > 4
    batch, again = batches[400], DigitBatches(clips(), seed=3)[400]
    assert batch.waveforms.shape == (16, 35200)
    assert batch.waveforms.dtype == torch.float32
    assert torch.equal(batch.waveforms, again.waveforms)
    assert torch.equal(batch.labels, again.labels)
    assert ((batch.labels >= 0).sum(1) == batch.counts).all()
    assert 1 <= batch.counts.min() < batch.counts.max() <= 7
    assert not torch.equal(batch.waveforms, batches[401].waveforms)
    assert not torch.equal(batch.waveforms, DigitBatches(clips(), seed=4)[400].waveforms)


def test_every_clip_is_in_one_test_string() -> None:
    own = clips(("theo",))
    strings = test_strings(own)
    assert len(strings) == 10
    assert sorted(len(string.digits) for string in strings) == [3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    counts = np.bincount([digit for string in strings for digit in string.digits])
    assert counts.tolist() == [5] * 10
    # digits of a string take the room of their clips and of silence
    for string in strings:
        silence = len(string.audio) - sum(3000 + 100 * digit for digit in string.digits)
        between = len(string.digits) - 1
        assert 3200 + 800 * between - between <= silence + 2 <= 9600 + 6400 * between + 2
    with pytest.raises(ValueError, match=r"one speaker, a multiple of 25, got 100 of \['ann'"):
        test_strings(clips())


def test_branches_begin_small() -> None:
    torch.manual_seed(0)
    model = DigitReader("T")
    outputs = [
        m for name, m in model.named_modules() if name.endswith(("out_proj", "output_dense"))
    ]
    assert len(outputs) == 16
    for layer in outputs:
        # Xavier's deviation, over the root of 16
        expected = (2 / sum(layer.weight.shape)) ** 0.5 / 4
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)


def test_groups_are_disjoint_slots() -> None:
    model = DigitReader("AC")
    groups = groups_of(model, SLOTS["AC"])
    assert list(groups) == ["X", "Y", "F", "XY", "XF", "YF", ALL]
    assert set(groups["XY"]) == set(groups["X"]) | set(groups["Y"])
    assert {*groups["X"], *groups["Y"], *groups["F"]} == set(groups[ALL])
    assert len(groups["X"]) == len(groups["Y"]) == 4
    assert all("self_attn" in name for name in groups["X"])
    assert all("conv_module" in name for name in groups["Y"])
    assert list(groups_of(DigitReader("T"), {})) == [ALL]


def test_only_what_is_named_is_quantized() -> None:
    model = DigitReader("CC").eval()
    names = groups_of(model, SLOTS["CC"])["X"]
    donor = quantized(model, names, spec_of(4))
    low_bit = {name for name, m in donor.named_modules() if isinstance(m, QuantizedModule)}
    assert low_bit == {
        f"{name}.{part}"
        for name in names
        for part in ("pointwise_conv1", "depthwise_conv", "pointwise_conv2")
    }
    assert only(names, spec_of(4)).spec_for("classifier")[0] is None


def test_measures_of_a_model() -> None:
    torch.manual_seed(0)
    model = DigitReader("AC").eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
    utterance = Utterance(torch.randn(9000), (1, 2))
    row = measure(make_subject(model, utterance), utterance, seed=0, gains=True)
    # the check of the design itself: the same noise twice, and quiet noise
    assert row["twice/J"] == pytest.approx(10 * math.log10(2), abs=0.05)
    assert row["noise40/ratio"] == pytest.approx(1, abs=0.25)
    assert row["noise40/interaction"] < 1e-3
    assert row["noise40/alignment"] == pytest.approx(row["noise40/ratio"], rel=0.05)
    # more bits, less error; more noise, more error
    assert row["w8/all/nsr"] < row["w4/all/nsr"] - 6 < row["w2/all/nsr"] - 12
    assert row["noise30/all/nsr"] < row["noise20/all/nsr"] < row["noise10/all/nsr"]
    # noise of 30 dB at one branch is what its gain says
    local, fed, gain = (row[f"sources/{k}"] for k in ("w8/local", "w8/fed", "gain"))
    assert len(local) == len(fed) == len(gain) == 16
    # the first branch's input is the same in both models
    assert fed[0] == pytest.approx(local[0], rel=1e-4)
    assert 0.3 < np.median(np.array(fed) / np.array(local)) < 3
    alone = np.array(row["sources/w8/alone"])
    assert 0.5 < np.median(alone / (np.array(local) * np.array(gain))) < 2
    assert len(row["blocks/w4/J(X,Y)"]) == 4
    assert row["blocks/w4/J(X,Y)"][-1] == row["w4/J(X,Y)"]
    assert {
        f"w{bits}/{arm}/nsr" for bits in (8, 4, 2) for arm in ("front_end", "attention")
    } <= set(row)


def test_measures_leave_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = DigitReader("Squeezeformer").eval()
    utterance = Utterance(torch.randn(9000), None)
    subject = make_subject(model, utterance)
    before = model(utterance.audio[None])[0]
    first = measure(subject, utterance, seed=0, gains=False)
    assert torch.equal(subject.model(utterance.audio[None])[0], before)
    assert measure(subject, utterance, seed=0, gains=False) == first


def values(*means: float, spread: float = 0.3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, spread, 150) for _ in means]
    return [mean + row - row.mean() for mean, row in zip(means, noise, strict=True)]


def test_intervals() -> None:
    found = estimate(values(0.9, 1.0, 1.1))
    assert found.mean == pytest.approx(1)
    # 4.303 standard errors
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert found.t_interval == pytest.approx((1 - half, 1 + half), rel=1e-4)
    low, high = found.bootstrap_interval
    assert 0.85 < low < 0.95 < 1.05 < high < 1.15
    # of one value everywhere, only utterances vary
    same = estimate(values(0.99, 1.0, 1.01, spread=1.0))
    width = np.subtract(*same.bootstrap_interval[::-1])
    assert width == pytest.approx(2 * 1.96 * 1 / math.sqrt(450), rel=0.15)
    with pytest.raises(ValueError, match="at least two, of finite numbers, got 1"):
        estimate(values(1.0))
    with pytest.raises(ValueError, match="of finite numbers"):
        estimate([np.array([1.0]), np.array([math.inf])])


def test_holm() -> None:
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx(
        {"a": 0.06, "b": 0.03, "c": 0.06}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def made(mean: float, interval: tuple[float, float], replicates: tuple[float, ...]) -> Estimate:
    return Estimate(replicates, mean, interval, interval, 0.01)


FRAGILE = {"error": (1.0, 0.2, 0.5), "gain": (-1.0, 2.0, 1.0)}
STURDY = {"error": (1.0, -0.2, 0.5), "gain": (-1.0, 2.0, 1.0)}


@pytest.mark.parametrize(
    ("m", "fragility", "expected"),
    [
        (made(0.8, (0.1, 1.5), (0.7, 0.8, 0.9)), FRAGILE, "for"),
        (made(0.8, (-0.1, 1.7), (0.7, 0.8, 0.9)), FRAGILE, "undecided"),
        (made(0.8, (0.1, 1.5), (2.5, 0.0, -0.1)), STURDY, "undecided"),
        (made(0.4, (0.1, 0.7), (0.4, 0.4, 0.4)), FRAGILE, "conv fragile, not mixing"),
        (made(0.4, (0.1, 0.7), (0.4, 0.4, 0.4)), STURDY, "undecided"),
        (made(-0.4, (-0.7, -0.1), (-0.4,) * 3), {"gain": (1.0,)}, "conv fragile, not mixing"),
        (made(-0.8, (-1.5, -0.1), (-0.7, -0.8, -0.9)), FRAGILE, "against"),
        (made(-0.8, (-1.7, 0.1), (-0.7, -0.8, -0.9)), FRAGILE, "undecided"),
    ],
)  # fmt: skip
def test_rules_of_the_verdict(m: Estimate, fragility: dict, expected: str) -> None:
    assert verdict(m, fragility) == expected


def test_both_intervals_must_exclude_zero() -> None:
    m = Estimate((0.7, 0.8, 0.9), 0.8, (0.1, 1.5), (-0.1, 1.5), 0.01)
    assert verdict(m, STURDY) == "undecided"
    assert (
        verdict(Estimate((0.7, 0.8, 0.9), 0.8, (-0.1, 1.5), (0.1, 1.5), 0.01), STURDY)
        == "undecided"
    )
    assert joined_verdict(["for", "for"]) == "for"
    assert joined_verdict(["for", "undecided"]) == "undecided"


def test_mixing_is_paired_by_utterance() -> None:
    a, b, c = values(1.0, 0.5, 0.1)
    (m,) = mixing([a], [b], [c])
    assert m == pytest.approx(a - (b + c) / 2)


def test_paired_bootstrap() -> None:
    words, errors = np.full(100, 5.0), np.tile([2.0, 0.0], 50)
    change, low, high = paired_bootstrap(errors + 1, errors, words)
    # the same change in every string leaves no doubt
    assert (change, low, high) == pytest.approx((0.2, 0.2, 0.2))
    change, low, high = paired_bootstrap(errors, errors[::-1].copy(), words)
    assert change == 0
    assert -0.15 < low < -0.05 < 0.05 < high < 0.15
