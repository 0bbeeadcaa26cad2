"""Long audio in pieces: overlapping windows whose kept frames join without a seam.

A file up to one window long is one window, so its result is that of the whole file. A longer one is
cut into windows that overlap by twice the context; of each window the frames next to a cut are
dropped. Windows start at multiples of the model's frame, so the kept frames are as many, and lie
where they would, in one pass over the whole file. Each window is normalized as an utterance of its
own, as the pipelines of transformers do.

Dimension key: S samples of a window.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lowbit_kernels.cli.audio import Samples

WINDOW_SECONDS = 60
CONTEXT_SECONDS = 5
# a cut between words is looked for in the last seconds of a window
_QUIET_SEARCH_SECONDS = 8
# and what follows a cut is never too short for a model
_LEAST_REST_SECONDS = 1
_QUIET_SPAN_SECONDS = 0.1


@dataclass(frozen=True)
class Window:
    """One piece of a file.

    Args:
        samples: [S] float32.
        drop: frames to drop at its start.
        keep: frames to keep after those; ``None`` keeps the rest.
        new_samples: samples that no earlier window held, for progress.
        last: whether the file ends with it.
    """

    samples: Samples
    drop: int
    keep: int | None
    new_samples: int
    last: bool


Cut = Callable[[Iterable[Samples]], Iterator[Window]]


def overlapping(
    blocks: Iterable[Samples], *, length: int, context: int, frame: int
) -> Iterator[Window]:
    """Cut a stream into overlapping windows.

    Args:
        blocks: the file's samples, in order.
        length: samples of a window, a multiple of ``frame`` and more than twice ``context``.
        context: samples on each side of a cut whose frames are dropped, a multiple of ``frame``.
        frame: samples from one frame of the model to the next.
    """
    buffer, overlap = np.zeros(0, np.float32), 0
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while len(buffer) > length:
            drop = context if overlap else 0
            keep = (length - context - drop) // frame
            yield Window(buffer[:length], drop // frame, keep, length - overlap, last=False)
            buffer, overlap = buffer[length - 2 * context :], 2 * context
    drop = context if overlap else 0
    yield Window(buffer, drop // frame, None, len(buffer) - overlap, last=True)


def at_pauses(blocks: Iterable[Samples], *, length: int, rate: int) -> Iterator[Window]:
    """Cut a stream into windows that do not overlap, each cut at the quietest moment near its end.

    Args:
        blocks: the file's samples, in order.
        length: the most samples of a window.
        rate: samples a second.
    """
    buffer = np.zeros(0, np.float32)
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while len(buffer) > length:
            cut = _quietest(buffer[:length], rate)
            yield Window(buffer[:cut], 0, None, cut, last=False)
            buffer = buffer[cut:]
    yield Window(buffer, 0, None, len(buffer), last=True)


def _quietest(samples: Samples, rate: int) -> int:
    """Where to cut: the middle of the quietest tenth of a second in the last seconds."""
    span = int(_QUIET_SPAN_SECONDS * rate)
    start = len(samples) - _QUIET_SEARCH_SECONDS * rate
    searched = samples[start : len(samples) - _LEAST_REST_SECONDS * rate]
    spans = searched[: len(searched) // span * span].reshape(-1, span)
    return start + int(np.square(spans).mean(axis=1).argmin()) * span + span // 2
