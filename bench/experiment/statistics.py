"""The statistics of the experiment, and its rules for a verdict, fixed before any result.

Dimension key: R replicates, U utterances of one, each a float in decibels unless said otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Values: TypeAlias = NDArray[np.float64]

# decibels: a smaller effect is none
BAND = 0.5
CONFIDENCE = 0.95
RESAMPLES = 10_000

VERDICTS = ("for", "conv fragile, not mixing", "against", "undecided")


@dataclass(frozen=True)
class Estimate:
    """A mean over replicates, and how sure it is.

    Attributes:
        replicates: the mean of each.
        mean: of these.
        t_interval: 95 %, with R - 1 degrees of freedom.
        bootstrap_interval: 95 %, of replicates drawn anew, and of utterances within each.
        p_value: two-sided, of the t test against 0.
    """

    replicates: tuple[float, ...]
    mean: float
    t_interval: tuple[float, float]
    bootstrap_interval: tuple[float, float]
    p_value: float

    @property
    def excludes_zero(self) -> bool:
        """Whether both intervals do."""
        return all(low > 0 or high < 0 for low, high in (self.t_interval, self.bootstrap_interval))

    @property
    def has_one_sign(self) -> bool:
        """Whether all replicates are on one side of 0."""
        return len(set(np.sign(self.replicates))) == 1


def estimate(replicates: Sequence[Values], seed: int = 0) -> Estimate:
    """The mean of utterances [U] of each of R replicates, and its intervals.

    Raises:
        ValueError: for fewer than two replicates, one without utterances, or numbers that are not
            finite.
    """
    from scipy import stats

    for values in replicates:
        if len(replicates) < 2 or not len(values) or not np.isfinite(values).all():
            raise ValueError(
                "replicates must be at least two, of finite numbers, got "
                f"{len(replicates)}, one of them {len(values)} numbers"
            )
    means = np.array([values.mean() for values in replicates])
    test = stats.ttest_1samp(means, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    drawn = hierarchical_bootstrap(replicates, seed)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(
        tuple(means.tolist()),
        float(means.mean()),
        (float(interval.low), float(interval.high)),
        (float(low), float(high)),
        float(test.pvalue),
    )


def hierarchical_bootstrap(replicates: Sequence[Values], seed: int = 0) -> Values:
    """Means of replicates drawn with replacement, of utterances drawn likewise: [10,000]."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(replicates), size=(RESAMPLES, len(replicates)))
    # the mean of a replicate's utterances, drawn once for each time it is chosen
    drawn = np.empty(chosen.shape)
    for index, values in enumerate(replicates):
        places = chosen == index
        rows = rng.integers(len(values), size=(int(places.sum()), len(values)))
        drawn[places] = values[rows].mean(1)
    means: Values = drawn.mean(1)
    return means


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values of a family, adjusted as Holm (1979) does."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def mixing(ac: Sequence[Values], aa: Sequence[Values], cc: Sequence[Values]) -> list[Values]:
    """M of each utterance [U] of each replicate: J of AC over the mean of its two controls.

    Args:
        ac: J(A, C) by replicate, [U] each.
        aa: J(A1, A2) of the same utterances.
        cc: J(C1, C2) likewise.
    """
    return [a - (b + c) / 2 for a, b, c in zip(ac, aa, cc, strict=True)]


def verdict(m: Estimate, fragility: Mapping[str, Sequence[float]]) -> str:
    """What the rules say of M, at one width or level of noise.

    * "for": M > 0.5 dB, its intervals exclude 0, and all replicates have its sign;
    * "against": M < -0.5 dB, and its intervals exclude 0;
    * "conv fragile, not mixing": |M| < 0.5 dB, and the convolutions' own error, or their gain, is
      above the attentions' in all replicates;
    * "undecided" otherwise.

    Args:
        m: the primary endpoint.
        fragility: by ``"error"`` and ``"gain"``, the convolutions' over the attentions' in AC, in
            decibels, a replicate.
    """
    if m.mean > BAND and m.excludes_zero and m.has_one_sign:
        return "for"
    if m.mean < -BAND and m.excludes_zero:
        return "against"
    is_fragile = any(len(each) and min(each) > 0 for each in fragility.values())
    return "conv fragile, not mixing" if abs(m.mean) < BAND and is_fragile else "undecided"


def joined_verdict(verdicts: Sequence[str]) -> str:
    """Of w4a8 and of noise at 15 dB: theirs if they agree, otherwise "undecided"."""
    return verdicts[0] if len(set(verdicts)) == 1 else "undecided"


def paired_bootstrap(
    errors: Values, other_errors: Values, words: Values, seed: int = 0
) -> tuple[float, float, float]:
    """A change of the word error rate, and its 95 % interval over strings drawn anew.

    Args:
        errors: [U], of the model.
        other_errors: [U], of what it is compared with, on the same strings.
        words: [U], in each string.
    """
    rows = np.random.default_rng(seed).integers(len(words), size=(RESAMPLES, len(words)))
    change = errors - other_errors
    drawn = change[rows].sum(1) / words[rows].sum(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(change.sum() / words.sum()), float(low), float(high)
