"""Shapes of real speech encoders, each with its origin: the points of the cases.

Dimension key: M rows (frames), K input features, N output features; B batch, C input channels, T
input samples or frames, k taps, g groups; H heads, D head dimension. Ten seconds at 16 kHz are
160,000 samples and 499 frames.
"""

from collections.abc import Sequence
from dataclasses import replace

from bench.case import Goal, Point

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
    _linear(FRAMES // 2, 768, 3072, "sew: feed-forward in"),
    _linear(125, 1024, 4096, "parakeet: feed-forward in"),
    # a decoder's step is one row
    _linear(1, 512, 512, "whisper-base: a decoder step's q, k, v, output"),
    _linear(1, 512, 2048, "whisper-base: a decoder step's feed-forward in"),
    _linear(1, 1280, 1280, "whisper-large: a decoder step's q, k, v, output"),
    _linear(1, 1280, 5120, "whisper-large: a decoder step's feed-forward in"),
)


def _conv(
    C: int, N: int, T: int, k: int, origin: str, *, stride: int = 1, groups: int = 1, batch: int = 1
) -> Point:
    padding = k // 2 if stride == 1 else 0
    name = f"{C}x{N} k{k}" + (f" s{stride}" if stride > 1 else "")
    name += (f" g{groups}" if groups > 1 else "") + f" T{T}"
    name += f" B{batch}" if batch > 1 else ""
    sizes = {
        "B": batch,
        "C": C,
        "N": N,
        "T": T,
        "k": k,
        "stride": stride,
        "padding": padding,
        "g": groups,
    }
    return Point(name, sizes, origin)


def depthwise_point(
    C: int, T: int, k: int, origin: str, batch: int, goals: tuple[Goal, ...]
) -> Point:
    """A depthwise convolution that keeps the number of frames."""
    return replace(_conv(C, C, T, k, origin, groups=C, batch=batch), goals=goals)


def frames_out(sizes: dict[str, int]) -> int:
    """Output frames of a convolution point."""
    return (sizes["T"] + 2 * sizes["padding"] - sizes["k"]) // sizes["stride"] + 1


def _front_end(family: str, layers: Sequence[tuple[int, int, int]], batch: int = 1) -> list[Point]:
    """Layers (channels, kernel size, stride) one after the other, from the waveform on."""
    points, C, T = [], 1, SECONDS * SAMPLE_RATE
    for i, (N, k, stride) in enumerate(layers):
        point = _conv(C, N, T, k, f"{family}: front end {i}", stride=stride, batch=batch)
        points.append(point)
        C, T = N, frames_out(point.sizes)
    return points


BASE_FRONT_END = ((512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2)
SEW_FRONT_END = (
    (64, 10, 5), *[(128, 3, 2), (128, 1, 1)] * 2,
    *[(256, 3, 2), (256, 1, 1)] * 2, *[(512, 2, 2), (512, 1, 1)] * 2,
)  # fmt: skip
CONV1D = (
    *_front_end("base", BASE_FRONT_END),
    _conv(768, 768, FRAMES, 128, "base: positional", groups=16),
    _conv(1024, 1024, FRAMES, 31, "conformer-large: depthwise", groups=1024),
    _conv(1024, 2048, FRAMES, 1, "conformer-large: pointwise, before GLU"),
    _conv(1024, 1024, FRAMES, 1, "conformer-large: pointwise, last"),
    # its first layer stays in float, and one is the base model's
    *(p for p in _front_end("sew", SEW_FRONT_END)[1:] if p.name != "512x512 k2 s2 T999"),
    _conv(768, 768, FRAMES, 19, "data2vec: positional", groups=16),
    _conv(1024, 1024, 125, 9, "parakeet: depthwise", groups=1024),
)

BATCH = 16
CONV1D_CUDA = (
    *_front_end("base", BASE_FRONT_END, BATCH),
    _conv(768, 768, FRAMES, 128, "base: positional", groups=16, batch=BATCH),
    _conv(1024, 1024, FRAMES, 31, "conformer-large: depthwise", groups=1024, batch=BATCH),
    *CONV1D[:9],
)


def _attention(
    B: int, T: int, kind: str, backward: bool, H: int = 16, D: int = 64, origin: str = "large"
) -> Point:
    goals = _ATTENTION_GOALS.get((kind, backward), ())
    sizes = {"B": B, "H": H, "T": T, "D": D, "backward": int(backward)}
    name = f"T{T} B{B} H{H} D{D}, {kind}, {'forward and backward' if backward else 'forward'}"
    return Point(name, sizes | {kind: 1}, origin, goals)


_ATTENTION_GOALS = {
    ("plain", False): (Goal("lowbit", 0.9, 1.0, "SDPA"),),
    ("transformer-xl", False): (Goal("lowbit", 3.0, 6.0, "SDPA"),),
    ("transformer-xl", True): (Goal("lowbit", 2.0, 4.0, "SDPA"),),
    ("window", False): (Goal("lowbit", 5.0, 5.0, "SDPA without the window"),),
}


ATTENTION_CUDA = (
    *(
        _attention(B, T, kind, backward)
        for backward in (False, True)
        for B, T in ((16, FRAMES), (4, 1500), (16, 250), (1, 6000))
        for kind in ("plain", "lengths", "dense bias")
    ),
    *(
        _attention(16, 1500, kind, backward, H, D, origin)
        for backward in (False, True)
        for kind, H, D, origin in (
            ("transformer-xl", 8, 64, "conformer-large"),
            ("bucketed", 12, 64, "wavlm-base"),
            ("relative key", 16, 64, "wav2vec2-bert"),
            ("transformer-xl", 4, 36, "squeezeformer-XS"),
            ("transformer-xl", 4, 81, "squeezeformer-M"),
        )
    ),
    *(_attention(1, 6000, "window", backward, origin="sparseformer") for backward in (False, True)),
    *(_attention(16, FRAMES, "plain", False, 8, D) for D in (80, 128)),
)

NORM_CUDA = (
    *(
        Point(f"{B}x512x31999", {"B": B, "C": 512, "T": 31_999}, "base: front end's GroupNorm")
        for B in (1, BATCH)
    ),
    *(
        Point(f"{M}x{K}", {"M": M, "K": K}, f"{size}: LayerNorm and residual, to int8")
        for M in (FRAMES, 16 * FRAMES)
        for K, size in ((768, "base"), (1024, "large"))
    ),
)
