"""Scales of quantizers: where learned ones start, and those computed from a weight each step.

Dimension key: N rows of a weight, K columns, S scale groups a row.
"""

import math

import torch
from torch import Tensor

from lowbit_kernels.fake_quant.quantizer import Levels

# of the levels {-3, -1, 1, 3} the scale of least squared error is 0.4978 standard deviations of a
# Gaussian (Max, "Quantizing for minimum distortion", 1960, table II), whose mean magnitude is
# sqrt(2 / pi) of them
_OF_MEAN_MAGNITUDE = {1: 1.0, 3: 0.4978 * math.sqrt(math.pi / 2)}


def initial_scale(x: Tensor, levels: Levels) -> Tensor:
    """Where a learned scale of an activation starts, from its first batch: fp32 [].

    2 mean|x| / sqrt(high) (Esser et al., 2020, section 2.1; BiT's, too, with high = 1), and twice
    that for levels from 0 on (BiT).
    """
    factor = 2 if levels.low < 0 else 4
    wide = torch.promote_types(x.dtype, torch.float32)
    mean: Tensor = x.detach().abs().mean(dtype=wide)
    return mean * (factor / math.sqrt(levels.high))


def weight_scale(
    weight: Tensor, levels: Levels, group_scale: Tensor | None, group_size: int, *, shared: bool
) -> Tensor:
    """The scale of a weight [N, K], from its values: fp32 [N], or [1] if all rows share one.

    With many levels each row's largest magnitude becomes the highest one. The levels {-1, 1} and
    {-3, -1, 1, 3} follow the mean magnitude: it is the exact least-squares scale of the former, and
    near it for the latter while weights are about Gaussian.

    Args:
        weight: [N, K].
        levels: what its quotients are rounded to.
        group_scale: [N, S] integers that multiply the scale, or None.
        group_size: weights a group.
        shared: whether all rows share a scale: the largest (many levels), or that of all values.
    """
    N, K = weight.shape
    by_mean = levels.step == 2
    order = 1 if by_mean else math.inf
    wide = torch.promote_types(weight.dtype, torch.float32)
    values, m = weight.detach(), None
    if group_scale is not None:
        m = group_scale.to(wide)
        padding = m.shape[1] * group_size - K
        values = torch.nn.functional.pad(values, (0, padding)).view(N, m.shape[1], group_size)
    norm: Tensor = torch.linalg.vector_norm(values, order, dim=-1, dtype=wide)  # [N, S] or [N]
    if not by_mean:
        largest = norm if m is None else (norm / m).amax(1)
        return (largest.amax().view(1) if shared else largest) / levels.high
    # least squares of |w| = m * scale: sum(m |w|) / sum(m^2), m of every weight
    if m is None:
        scale = norm.mean().view(1) / K if shared else norm / K
    else:
        counts = torch.full((m.shape[1],), group_size, dtype=wide, device=m.device)
        counts[-1] -= padding
        scale = (norm * m).sum(1) / (m.square() * counts).sum(1)
    return scale * _OF_MEAN_MAGNITUDE[levels.high]
