"""A toy case, small points of the real cases, and a tiny encoder for them."""

import torch

from bench.case import Case, Cost, Point, Prepared, Provider
from bench.harness import run_case

POINT = Point("3x4", {"M": 3, "K": 4}, "a toy")
LINEAR_POINT = Point("5x96x40", {"M": 5, "K": 96, "N": 40}, "small")
CONV_NAMES = ("B", "C", "N", "T", "k", "stride", "padding", "g")
CONV_POINTS = [
    Point(f"conv{i}", dict(zip(CONV_NAMES, sizes, strict=True)), "small")
    for i, sizes in enumerate([(2, 1, 8, 400, 10, 5, 0, 1), (2, 16, 24, 41, 3, 2, 0, 1),
                               (1, 32, 32, 21, 8, 1, 4, 4), (2, 16, 16, 21, 7, 1, 3, 16)])
]  # fmt: skip
ENCODER_POINT = Point("tiny", {"B": 2, "T": 1600}, "tiny")


def constant(value, max_error=1e-6, **kwargs):
    return lambda x: Prepared(lambda: x * value, max_error, weight_bytes=8, **kwargs)


def broken(x):
    raise RuntimeError("no such kernel\nand a long trace")


def toy_case(*providers, **kwargs):
    return Case(
        name="toy",
        title="A toy",
        points=(POINT,),
        make_inputs=lambda point, device, dtype: torch.ones(point.sizes["M"], point.sizes["K"]),
        providers=(Provider("float32", constant(1.0)), *providers),
        baseline="float32",
        cost=lambda point, itemsize: Cost(flops=1000, bytes=92),
        **kwargs,
    )


def rows_of(case, **kwargs):
    return {row["provider"]: row for row in run_case(case, 0.0, **kwargs)["results"]}


def tiny_wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 4), attn_implementation="sdpa",
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return Wav2Vec2Model(config).eval().requires_grad_(False)
