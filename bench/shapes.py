"""Shapes of real speech encoders, each with its origin: the points of the cases.

Dimension key: M rows (frames), K input features, N output features; C input channels, T input
samples or frames, k taps, g groups. Ten seconds at 16 kHz are 160,000 samples and 499 frames.
"""

from bench.harness import Point

SAMPLE_RATE = 16_000
SECONDS = 10
FRAMES = 499


def _linear(M: int, K: int, N: int, origin: str) -> Point:
    return Point(f"{M}x{K}x{N}", {"M": M, "K": K, "N": N}, origin)


LINEAR = (
    _linear(FRAMES, 512, 768, "base: feature projection"),
    _linear(FRAMES, 768, 768, "base: q, k, v, output"),
    _linear(FRAMES, 768, 3072, "base: feed-forward in"),
    _linear(FRAMES, 3072, 768, "base: feed-forward out"),
    _linear(FRAMES, 512, 1024, "large, conformer-large: feature projection"),
    _linear(FRAMES, 1024, 1024, "large, conformer-large: q, k, v, output"),
    _linear(FRAMES, 1024, 4096, "large, conformer-large: feed-forward in"),
    _linear(FRAMES, 4096, 1024, "large, conformer-large: feed-forward out"),
    _linear(2 * FRAMES - 1, 1024, 1024, "conformer-large: relative positions"),
    # Whisper pads every clip to 30 s
    _linear(1500, 512, 512, "whisper-base: q, k, v, output"),
    _linear(1500, 512, 2048, "whisper-base: feed-forward in"),
    _linear(1500, 2048, 512, "whisper-base: feed-forward out"),
    # a decoder's step is one row
    _linear(1, 512, 512, "whisper-base: a decoder step's q, k, v, output"),
    _linear(1, 512, 2048, "whisper-base: a decoder step's feed-forward in"),
    _linear(1, 1280, 1280, "whisper-large: a decoder step's q, k, v, output"),
    _linear(1, 1280, 5120, "whisper-large: a decoder step's feed-forward in"),
)


def _conv(
    C: int, N: int, T: int, k: int, origin: str, *, stride: int = 1, groups: int = 1
) -> Point:
    padding = k // 2 if stride == 1 else 0
    name = f"{C}x{N} k{k}" + (f" s{stride}" if stride > 1 else "")
    name += (f" g{groups}" if groups > 1 else "") + f" T{T}"
    sizes = {"C": C, "N": N, "T": T, "k": k, "stride": stride, "padding": padding, "g": groups}
    return Point(name, sizes, origin)


def frames_out(sizes: dict[str, int]) -> int:
    """Output frames of a convolution point."""
    return (sizes["T"] + 2 * sizes["padding"] - sizes["k"]) // sizes["stride"] + 1


def _front_end() -> list[Point]:
    points, T = [], SECONDS * SAMPLE_RATE
    for i, (k, stride) in enumerate([(10, 5), *[(3, 2)] * 4, *[(2, 2)] * 2]):
        C = 1 if i == 0 else 512
        point = _conv(C, 512, T, k, f"base: front end {i}", stride=stride)
        points.append(point)
        T = frames_out(point.sizes)
    return points


CONV1D = (
    *_front_end(),
    _conv(768, 768, FRAMES, 128, "base: positional", groups=16),
    _conv(1024, 1024, FRAMES, 31, "conformer-large: depthwise", groups=1024),
    _conv(1024, 2048, FRAMES, 1, "conformer-large: pointwise, before GLU"),
    _conv(1024, 1024, FRAMES, 1, "conformer-large: pointwise, last"),
)
