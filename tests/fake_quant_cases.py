"""What the tests of fake quantization share: quantizers, and an independent formula of them.

Dimension key: M rows, K columns, S scale groups a row, G columns a group.
"""

import pytest
import torch

from lowbit_kernels.fake_quant import Levels, Quantizer

G = 64
GRANULARITIES = ["tensor", "row", "group", "two-level"]
LEVELS = {
    "w8": Levels.of_weight(8),
    "w4": Levels.of_weight(4),
    "w2": Levels.of_weight(2),
    "w1": Levels.of_weight(1),
    "a2": Levels.of_input(2),
    "u4": Levels.of_input(4, signed=False),
    "u1": Levels.of_input(1, signed=False),
}

all_levels = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
granularities = pytest.mark.parametrize("granularity", GRANULARITIES)


def make_quantizer(rows, K, levels, granularity, method="lsq", device="cpu", center=False):
    """A quantizer whose range holds most, but not all, of values of a Gaussian."""
    S = -(-K // G)
    shapes = {"tensor": (), "row": rows, "group": (*rows, S), "two-level": rows}
    typical = 1.5 / levels.high
    scale = typical * (0.5 + torch.rand(shapes[granularity], device=device))
    group_scale = None
    if granularity == "two-level":
        group_scale = torch.randint(1, 17, (*rows, S), dtype=torch.uint8, device=device)
        scale = scale / 8
    size = G if granularity in ("group", "two-level") else 0
    middle = 0.3 * torch.randn(rows, device=device) if center else None
    return Quantizer(levels, scale, method, group_scale, size, middle)


def nearest(v, levels):
    """The nearest of all levels, one by one."""
    values = torch.arange(levels.low, levels.high + 1, levels.step, device=v.device, dtype=v.dtype)
    return values[(v[..., None] - values).abs().argmin(-1)]


def columns(values, shape, size):
    """Values for all, one a row or one a group, as one an element."""
    if values.numel() == 1:
        return values.reshape(()).expand(shape)
    if values.dim() == len(shape):
        return values.repeat_interleave(size, -1)[..., : shape[-1]]
    return values[..., None].expand(shape)


def formula(x, quantizer, scale):
    """fake_quantize written so that autograd gives the gradients of Quantizer's table."""
    levels, shape, size = quantizer.levels, x.shape, quantizer.group_size
    factor = (x.numel() / scale.numel() * levels.high) ** -0.5
    # a value of scale, a gradient times factor
    s = columns(scale * factor + (scale - scale * factor).detach(), shape, size)
    if quantizer.group_scale is not None:
        s = s * columns(quantizer.group_scale.to(x.dtype), shape, size)
    middle = 0 if quantizer.center is None else columns(quantizer.center.to(x.dtype), shape, size)
    v = (x - middle) / s
    if quantizer.method == "ste":
        return x + (nearest(v, levels) * s - x).detach()
    clipped = v.clamp(levels.low, levels.high)
    level = nearest(clipped.detach(), levels)
    if quantizer.method == "elastic" and (levels.low, levels.high) == (-1, 1):
        edge = s.detach()
        passed = torch.minimum(torch.maximum(x, -edge), edge)
        return s * level + (passed - passed.detach())
    return (clipped + (level - clipped).detach()) * s


def expected(x, quantizer, grad, dtype):
    """y, dx and dscale of ``formula``, computed in ``dtype``."""
    x = x.detach().to(dtype).requires_grad_()
    scale = quantizer.scale.detach().to(dtype).requires_grad_()
    y = formula(x, quantizer, scale)
    y.backward(grad.to(dtype))
    return y.detach(), x.grad, torch.zeros_like(scale) if scale.grad is None else scale.grad
