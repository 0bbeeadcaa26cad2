"""Tiles of the weight gradient: a pure function of numbers, tested without a GPU.

Dimension key: M rows of the input, N output features, K input features.
"""

import functools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class WeightGradientConfig:
    """Tile sizes of dW = dz^T x.

    Args:
        block_n: rows of dW a tile.
        block_k: columns of dW a tile.
        block_m: rows of the input a step.
        num_warps: warps a program.
        num_stages: steps in flight.
        splits: parts of the sum over M.
    """

    block_n: int = 128
    block_k: int = 128
    block_m: int = 64
    num_warps: int = 8
    num_stages: int = 3
    splits: int = 1


# each with the share of the matrix units' rate that shared memory lets it reach on sm_90, as the
# static table predicts; a tile 256 columns wide would reach 1, and spill at its end
_CONFIGS = (
    (WeightGradientConfig(), 0.8),
    (WeightGradientConfig(block_n=64, block_k=64, num_warps=4, num_stages=4), 0.5),
)
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# an fp32 part is written and read again, at 3.5 TB/s, while a multiprocessor does a step of a
# 128 x 128 tile in 0.46 us: predictions for an H200, of which only the ratio counts
_STEPS_A_PART_ELEMENT = 8 / 3.5e12 / 0.46e-6


@functools.lru_cache(maxsize=4096)
def choose_weight_gradient_config(M: int, N: int, K: int, num_sms: int) -> WeightGradientConfig:
    """The tiles, and parts of the sum over M, that are predicted to take the least time.

    Args:
        M: rows of the input.
        N: output features.
        K: input features.
        num_sms: multiprocessors of the device.
    """

    def steps(config: WeightGradientConfig, share: float) -> float:
        tiles = -(-N // config.block_n) * -(-K // config.block_k)
        waves = -(-tiles * config.splits // num_sms)
        length = -(-M // (config.block_m * config.splits))
        area = config.block_n * config.block_k / 128**2
        parts = config.splits if config.splits > 1 else 0
        return waves * length * area / share + parts * N * K * _STEPS_A_PART_ELEMENT

    candidates = [
        (replace(config, splits=splits), share) for config, share in _CONFIGS for splits in _SPLITS
    ]
    return min(candidates, key=lambda candidate: steps(*candidate))[0]
