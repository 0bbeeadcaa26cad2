"""How far a right result may be from the exact one, from theory.

Dimension key: K length of the reduction.
"""

import torch
from torch import Tensor


def float32_error(K: int) -> float:
    """Relative error of a float32 sum of K products, in any order: a random walk, and a reserve."""
    return 4 * torch.finfo(torch.float32).eps * K**0.5


def float_error(K: int, dtype: torch.dtype) -> float:
    """Relative error of float32 sums of K products whose factors and result are of a dtype."""
    return float32_error(K) + (0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def int8_input_error(x: Tensor, dim: int | tuple[int, ...]) -> float:
    """Twice the rounding noise of int8 inputs, relative to x.

    A white weight carries noise and signal to the output alike.

    Args:
        x: the float input.
        dim: the dimensions that share a scale.
    """
    step = x.abs().amax(dim, keepdim=True) / 127
    noise = (step / 12**0.5).expand_as(x)
    return float(2 * noise.norm() / x.norm())
