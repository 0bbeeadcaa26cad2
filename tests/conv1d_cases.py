"""The convolutions that the tests of low_bit_conv1d try, and inputs for them."""

import torch

from lowbit_kernels.conv1d import Geometry
from lowbit_kernels.formats import QuantSpec, quantize_depthwise_weight, quantize_weight

FLOAT, INT8 = QuantSpec(bits=4), QuantSpec(bits=4, inputs="int8")
EPILOGUES = (None, "gelu", "gelu_tanh", "silu", "relu", "glu")
# C, N, T, and the geometry
CASES = {
    "pointwise": (36, 20, 9, Geometry(1)),
    "front-end-first": (1, 20, 57, Geometry(10, stride=5)),
    "front-end": (33, 18, 14, Geometry(3, stride=2)),
    "even-same": (20, 24, 11, Geometry(2, left=0, right=1)),
    "dilated": (12, 14, 15, Geometry(3, 2, 2, 3, dilation=2)),
    "grouped": (24, 36, 13, Geometry(5, 2, 1, 2, groups=2)),
    "grouped-32-channels": (64, 48, 12, Geometry(3, left=1, right=1, groups=2)),
    "positional": (8, 8, 10, Geometry(128, left=64, right=64, groups=2)),
    "channel-multiplier": (4, 8, 10, Geometry(3, left=2, groups=4)),
    "depthwise": (18, 18, 11, Geometry(31, left=15, right=15, groups=18)),
    "depthwise-causal": (70, 70, 12, Geometry(3, left=2, groups=70)),
    "depthwise-strided": (18, 18, 12, Geometry(5, 2, 1, 2, groups=18)),
    "depthwise-stride-dilation": (18, 18, 23, Geometry(4, 4, 3, 3, dilation=6, groups=18)),
}


def make_weight(C, N, geometry, spec, device="cpu"):
    K = geometry.kernel_size * C // geometry.groups
    weight = torch.randn(N, K, device=device) / K**0.5
    if geometry.groups == C == N and C > 1:
        return quantize_depthwise_weight(weight, spec)
    return quantize_weight(weight, spec)


def make_inputs(case, spec, dtype=torch.float32, device="cpu", epilogue=None, B=2):
    """x, weight, bias, residual, lengths, geometry; padded frames hold NaN."""
    C, N, T, geometry = CASES[case]
    x = torch.randn(B, C, T, device=device, dtype=dtype)
    lengths = torch.tensor([T, T // 2 + 1] + [T] * (B - 2), device=device)[:B]
    x = x.masked_fill(torch.arange(T, device=device) >= lengths[:, None, None], torch.nan)
    N_out, T_out = N // 2 if epilogue == "glu" else N, geometry.frames_out(T)
    residual = torch.randn(B, N_out, T_out, device=device, dtype=dtype)
    bias = torch.randn(N, device=device, dtype=dtype)
    return x, make_weight(C, N, geometry, spec, device), bias, residual, lengths, geometry


def keywords(geometry):
    options = {name: getattr(geometry, name) for name in ("stride", "dilation", "groups")}
    return {**options, "padding": (geometry.left, geometry.right)}
