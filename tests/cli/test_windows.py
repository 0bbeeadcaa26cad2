"""Long audio in windows: kept frames are as many, and the same, as in one pass."""

import numpy as np
import pytest

from lowbit_kernels.cli.windows import at_pauses, overlapping

FRAME, SPAN = 4, 10  # a toy front end: a frame every 4 samples, each looks at 10


def frames_of(samples):
    """[T, SPAN]: what each frame sees."""
    count = max((len(samples) - SPAN) // FRAME + 1, 0)
    return [tuple(samples[FRAME * t :][:SPAN]) for t in range(count)]


def in_blocks(samples, size):
    return (samples[i : i + size] for i in range(0, len(samples), size))


@pytest.mark.parametrize("count", [10, 79, 80, 81, 120, 121, 200, 403, 1000])
@pytest.mark.parametrize("size", [7, 64, 999])
def test_kept_frames_join_without_a_seam(count, size):
    samples = np.arange(count, dtype=np.float32)
    windows = list(overlapping(in_blocks(samples, size), length=80, context=16, frame=FRAME))
    kept = [frame for w in windows for frame in frames_of(w.samples)[w.drop :][: w.keep]]
    assert kept == frames_of(samples)
    assert sum(w.new_samples for w in windows) == count
    assert [w.last for w in windows] == [False] * (len(windows) - 1) + [True]
    assert max(len(w.samples) for w in windows) <= 80


def test_a_short_file_is_one_window():
    (window,) = overlapping([np.ones(80, np.float32)], length=80, context=16, frame=FRAME)
    assert (window.drop, window.keep, window.last) == (0, None, True)


def test_cuts_fall_into_pauses():
    rate, length = 100, 3000
    samples = np.ones(7000, np.float32)
    pauses = (2600, 5300)  # each in the searched part of its window
    for start in pauses:
        samples[start : start + 40] = 0
    windows = list(at_pauses(in_blocks(samples, 900), length=length, rate=rate))
    cuts = np.cumsum([len(w.samples) for w in windows])[:-1]
    assert [start <= cut < start + 40 for start, cut in zip(pauses, cuts, strict=True)] == [
        True
    ] * 2
    np.testing.assert_array_equal(np.concatenate([w.samples for w in windows]), samples)
    assert all(len(w.samples) >= rate for w in windows)
