"""Microbenchmarks for ``pytest --benchmark``: members of a group compute the same thing.

Dimension key: B batch, M rows, K input features, N output features, C channels, T frames, H heads,
D head dimension.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.harness import Cost
from bench.shapes import CONV1D, LINEAR, frames_out
from lowbit_kernels import QConv1d, QLinear, QuantSpec, flash_attention
from lowbit_kernels.norm import masked_group_norm

SPECS = {
    "float32": None,
    "w4-int8-inputs": QuantSpec(bits=4, inputs="int8"),
    "w4-float-inputs": QuantSpec(bits=4),
}
LINEAR_POINTS = [p for p in LINEAR if p.origin.endswith(": feed-forward in")]
# one of each kind: strided, grouped, depthwise, pointwise
CONV_KINDS = ("front end 3", "positional", "depthwise", "last")
CONV_POINTS = [p for p in CONV1D if p.origin.endswith(CONV_KINDS)]


@pytest.fixture(autouse=True)
def _poison_uninitialized_memory():
    """The NaN poison of the tests would be timed too."""


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def point_id(value):
    return value.name.replace(" ", "-") if hasattr(value, "name") else str(value)


def run(benchmark, device, group, call, cost):
    """Time ``call`` with the device synchronized inside, and say what the time means."""

    def synchronized():
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.extra_info |= {"device": device, "dtype": "float32"}
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(synchronized, rounds=10, warmup_rounds=2)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["gflop_per_s"] = cost.flops / seconds / 1e9
        benchmark.extra_info["gb_per_s"] = cost.bytes / seconds / 1e9


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("point", LINEAR_POINTS, ids=point_id)
def test_linear(benchmark, device, point, kind):
    M, K, N = (point.sizes[name] for name in "MKN")
    layer, spec = nn.Linear(K, N), SPECS[kind]
    stored = layer.weight.nbytes
    if spec is not None:
        layer = QLinear.from_float(layer, spec)
        stored = layer.quantized_weight().nbytes
    layer, x = layer.to(device), torch.randn(M, K, device=device)
    cost = Cost(2 * M * K * N, 4 * M * (K + N) + stored)
    run(benchmark, device, f"linear {point.name}", lambda: layer(x), cost)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("point", CONV_POINTS, ids=point_id)
def test_conv1d(benchmark, device, point, kind):
    s, spec = point.sizes, SPECS[kind]
    layer = nn.Conv1d(s["C"], s["N"], s["k"], s["stride"], s["padding"], groups=s["g"])
    x = torch.randn(1, s["C"], s["T"], device=device)
    stored = layer.weight.nbytes
    if spec is not None:
        layer = QConv1d.from_float(layer, spec)
        stored = layer.quantized_weight().nbytes
        # chained layers keep channel-last memory
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    layer, T_out = layer.to(device), frames_out(s)
    flops = 2 * T_out * s["N"] * s["k"] * s["C"] // s["g"]
    cost = Cost(flops, 4 * (s["C"] * s["T"] + s["N"] * T_out) + stored)
    run(benchmark, device, f"conv1d {point.name}", lambda: layer(x), cost)


@pytest.mark.parametrize("kind", ["sdpa", "lowbit"])
def test_attention(benchmark, device, kind):
    B, H, T, D = 1, 12, 499, 64
    q, k, v = torch.randn(3, B, H, T, D, device=device)
    attend = F.scaled_dot_product_attention if kind == "sdpa" else flash_attention
    cost = Cost(4 * B * H * T * T * D, 4 * 4 * q.numel())
    run(benchmark, device, f"attention {B}x{H}x{T}x{D}", lambda: attend(q, k, v), cost)


@pytest.mark.parametrize("kind", ["group_norm", "lowbit"])
def test_group_norm(benchmark, device, kind):
    B, C, T = 1, 512, 31_999
    x, weight, bias = (torch.randn(*s, device=device) for s in ((B, C, T), (C,), (C,)))
    calls = {
        "group_norm": lambda: F.group_norm(x, C, weight, bias),
        "lowbit": lambda: masked_group_norm(x, weight, bias, lengths=None, num_groups=C),
    }
    # mean, variance, and scale and shift: five operations a value
    cost = Cost(5 * x.numel(), 8 * x.numel())
    run(benchmark, device, f"group norm {B}x{C}x{T}", calls[kind], cost)
