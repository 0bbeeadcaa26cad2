"""The points of the linear cases of a GPU, with what ours should reach at each.

Dimension key: M rows, K input features, N output features.
"""

from collections.abc import Iterable
from dataclasses import replace

from bench.case import BEST_PEER, FLOOR, READ_ONLY, Goal, Point
from bench.shapes import FRAMES

CUBLAS, PADDED = "cuBLAS bf16", "cuBLAS bf16, padded"
DEQUANTIZE_MATMUL = "dequantize, matmul, activation"
W4, W8 = "lowbit w4, float inputs", "lowbit w8, float inputs"
W4A8, W8A8 = "lowbit w4, int8 inputs", "lowbit w8, int8 inputs"
# as fused blocks hand it over: the kernel before has quantized
W4A8_FED = "lowbit w4, int8 from the producer"
W2, W1 = "lowbit w2, float inputs", "lowbit w1, float inputs"
W2A8, W1A8 = "lowbit w2, int8 inputs", "lowbit w1, int8 inputs"
GEMLITE_W4, GEMLITE_W2, GEMLITE_W1 = "gemlite w4", "gemlite w2", "gemlite w1"
TORCHAO_W4, COMPILED = "torchao w4", "torch.compile"
OURS_BACKWARD, QAT_W4 = "lowbit w4, gradients", "lowbit w4 QAT"


def point(M: int, K: int, N: int, origin: str, *goals: Goal, gelu: bool = False) -> Point:
    """A linear layer, followed by GELU or not."""
    sizes = {"M": M, "K": K, "N": N} | ({"gelu": 1} if gelu else {})
    return Point(f"{M}x{K}x{N}" + " GELU" * gelu, sizes, origin, goals)


def both(float_inputs: tuple[float, float], int8: tuple[float, float]) -> tuple[Goal, ...]:
    """Goals against cuBLAS with each kind of inputs."""
    with_int8 = [Goal(ours, *int8, CUBLAS) for ours in (W4A8, W4A8_FED)]
    return Goal(W4, *float_inputs, CUBLAS), *with_int8


def small(points: Iterable[Point]) -> tuple[Point, ...]:
    """The same kinds of points at a size for a CPU, goals included; no two of a name."""
    shrunk = {}
    for full in points:
        M, K, N = (full.sizes[name] for name in "MKN")
        # what is odd stays odd
        M, K, N = min(M, 32 + M % 8), min(K, 64 + K % 64), min(N, 64 + N % 64)
        new = point(M, K, N, full.origin, gelu="gelu" in full.sizes)
        shrunk.setdefault(new.name, replace(new, goals=full.goals))
    return tuple(shrunk.values())


_BATCH_1 = both((1.0, 1.2), (1.1, 1.4))
_NARROW = both((1.0, 1.3), (1.1, 1.4))
_BASE = (*both((1.0, 1.1), (1.1, 1.4)), Goal(W4, 2.0, 3.0, TORCHAO_W4))
FEED_FORWARD = point(
    FRAMES, 1024, 4096, "large: feed-forward in, GELU",
    *_BATCH_1, Goal(W4, 1.5, 2.0, GEMLITE_W4), gelu=True,
)  # fmt: skip
BATCH1 = (
    FEED_FORWARD,
    point(FRAMES, 1024, 1024, "large: q, k, v, output", *_NARROW),
    point(FRAMES, 4096, 1024, "large: feed-forward out", *_NARROW),
    point(FRAMES, 768, 768, "base: q, k, v, output", *_BASE),
    point(FRAMES, 768, 3072, "base: feed-forward in", *_BASE, gelu=True),
    point(FRAMES, 1024, 3072, "large: q, k and v in one", *_BATCH_1),
)


def _large(M: int) -> list[Point]:
    fused = (0.95, 1.0) if M >= 16 * FRAMES else (0.85, 1.0)
    into = point(M, 1024, 4096, "large: feed-forward in", *both(fused, (1.3, 1.6)), gelu=True)
    out = point(M, 4096, 1024, "large: feed-forward out", *both(fused, (1.45, 1.6)))
    return [into, out]


# 4, 8, 16 and 32 utterances of 10 s; the first of each M is the one that must not be left out
_BY_M = [_large(2**i * FRAMES) for i in (2, 3, 4, 5)]
LARGE = tuple(p for i in (0, 1) for p in (pair[i] for pair in _BY_M))


def _stream(M: int, K: int, N: int, origin: str) -> Point:
    goals = [Goal(W4, 0.9, 1.1, BEST_PEER), Goal(W4, 0.8, 1.0, READ_ONLY)]
    goals += [Goal(W4, 0.75, 0.9, FLOOR)] if K * N >= 2**26 else []
    return point(M, K, N, origin, *goals)


STREAM = (
    *(_stream(M, 1024, 4096, "large: feed-forward in") for M in (1, 16, 64)),
    *(_stream(M, 8192, 8192, "64M weights") for M in (1, 16)),
    *(_stream(M, 1024, 1024, "large: q, k, v, output") for M in (1, 16, 64)),
    *(_stream(M, 4096, 1024, "large: feed-forward out") for M in (1, 16, 64)),
    *(_stream(M, 1024, 4096, "large: feed-forward in") for M in (4, 8, 32)),
    _stream(1, 512, 2048, "whisper-base: a decoder step's feed-forward in"),
)
_TO_GEMLITE = (Goal(W2, 1.0, 1.1, GEMLITE_W2), Goal(W1, 1.0, 1.1, GEMLITE_W1))
_TO_CUBLAS = (Goal(W2A8, 1.45, 1.6, CUBLAS), Goal(W1A8, 1.45, 1.6, CUBLAS))
BITS = tuple(
    point(M, 1024, 4096, "large: feed-forward in", *goals)
    for M, goals in (
        (1, _TO_GEMLITE), (32 * FRAMES, _TO_CUBLAS), (64, _TO_GEMLITE), (FRAMES, ()),
    )
)  # fmt: skip
_ODD = tuple(Goal(ours, 0.8, 1.0, PADDED) for ours in (W4, W4A8))
ODD = tuple(
    point(M, d, 4 * d, f"squeezeformer, d = {d}: feed-forward in", *_ODD)
    for M, d in ((1501, 144), (375, 196), (1501, 324), (37, 196), (375, 324))
)
_BACKWARD = (Goal(OURS_BACKWARD, 1.0, 1.3, DEQUANTIZE_MATMUL),)
BACKWARD = tuple(
    point(M, K, N, f"large: {name}", *_BACKWARD, gelu=gelu)
    for M in (8 * FRAMES, FRAMES)
    for K, N, name, gelu in (
        (1024, 4096, "feed-forward in, GELU", True), (4096, 1024, "feed-forward out", False),
    )
)  # fmt: skip
# 32 utterances of 15 s, a frame each 40 ms
TRAINING = (
    point(
        32 * 375, 1024, 4096, "conformer-large, 32 x 15 s: feed-forward in",
        Goal(QAT_W4, 1.2, 1.5, COMPILED), gelu=True,
    ),
    point(
        32 * 375, 4096, 1024, "conformer-large, 32 x 15 s: feed-forward out",
        Goal(QAT_W4, 1.2, 1.5, COMPILED),
    ),
)  # fmt: skip
# where PyTorch's compiler may take a minute each
AUTOTUNED = tuple(p.name for p in (FEED_FORWARD, BATCH1[1], LARGE[0]))
