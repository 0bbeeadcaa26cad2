"""How large an error is, how it differs from a sum of errors, and what it changes at the end.

All of one utterance, over its valid frames; in fp64, as errors of errors are taken.

Dimension key: T frames, C channels, V tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


def energy(x: Tensor) -> float:
    """Sum of squares."""
    return x.double().square().sum().item()


def decibels(ratio: float) -> float:
    """Of a ratio of energies; of 0 and of infinity they are infinite, too."""
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else math.inf * (1 if ratio else -1)


def signal_energy(h: Tensor) -> float:
    """Energy of frames [T, C] around each channel's mean: what a constant adds says nothing."""
    h = h.double()
    return energy(h - h.mean(0))


def noise_to_signal(error: Tensor, h: Tensor) -> float:
    """Energy of an error [T, C] as a share of that of the frames [T, C] it is in."""
    return energy(error) / signal_energy(h)


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear centered kernel alignment of frames [T, C] (arXiv 1905.00414, section 4), in [0, 1].

    Equal representations, up to a rotation and a scale, have 1.
    """
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    cross, own, other = (float((x.mT @ y).norm()) for x, y in ((a, b), (a, a), (b, b)))
    return cross**2 / (own * other)


@dataclass(frozen=True)
class Additivity:
    """What an error of several sources has to do with the errors of each of them alone.

    Attributes:
        ratio: |all|^2 / sum |each|^2: 1 where independent errors add up.
        alignment: |sum each|^2 / sum |each|^2: 1 where the errors alone are orthogonal.
        interaction: |all - sum each|^2 / |all|^2: 0 where errors pass through a linear network.
    """

    ratio: float
    alignment: float
    interaction: float


def additivity(whole: Tensor, parts: Sequence[Tensor]) -> Additivity:
    """Compare the error of all sources with those of each alone, [T, C] after the same block.

    Raises:
        ValueError: for no parts, or parts that are all zero.
    """
    total = sum(map(energy, parts))
    if not total:
        raise ValueError(f"parts must be errors of which one is not zero, got {len(parts)}")
    combined = sum(part.double() for part in parts)
    assert isinstance(combined, Tensor), "parts were given"
    return Additivity(
        ratio=energy(whole) / total,
        alignment=energy(combined) / total,
        interaction=energy(whole.double() - combined) / energy(whole),
    )


def joint_excess(both: Tensor, first: Tensor, second: Tensor) -> float:
    """J in decibels: the error of two sources together over the sum of their own energies.

    0 where they are independent, 10 log10(2) = 3.01 where they are the same error twice.
    """
    return decibels(energy(both) / (energy(first) + energy(second)))


def token_divergence(logits: Tensor, expected: Tensor) -> float:
    """Mean KL divergence a frame, in nats, of logits [T, V] from the expected ones."""
    log_p, log_q = (x.double().log_softmax(-1) for x in (expected, logits))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def token_disagreement(logits: Tensor, expected: Tensor) -> float:
    """Share of frames with another best token, of logits [T, V]."""
    return (logits.argmax(-1) != expected.argmax(-1)).double().mean().item()
