"""What ``pytest --benchmark`` times: every public op and what PyTorch has for it, at three sizes.

Dimension key: B batch, M rows, K input features, N output features, C channels, T frames, H heads,
D head dimension, k taps, g groups.
"""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import cuda_peers
from bench.errors import float_error, int8_input_error
from lowbit_kernels import QConv1d, QLinear, QuantSpec, flash_attention
from lowbit_kernels.fake_quant import Levels, Quantizer, fake_quantize, initial_scale
from lowbit_kernels.norm import (
    masked_batch_norm,
    masked_group_norm,
    norm_activation,
    norm_quantize,
)

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
SIZES = ("base", "large", "odd")
Sizes = tuple[int, ...]

# of one utterance of 10 s and more on a GPU; a CPU gets the same layers with fewer frames
if ON_GPU:
    LINEAR = ((499, 768, 3072), (499, 1024, 4096), (375, 196, 784))
    CONV = ((1, 768, 1999), (1, 1024, 1999), (3, 196, 375))
    ATTENTION = ((1, 12, 499, 64), (4, 16, 499, 64), (3, 4, 375, 49))
    GROUP_NORM = ((1, 512, 31_999), (4, 512, 31_999), (3, 196, 3750))
    ROWS = ((499, 768), (7984, 1024), (375, 196))
    TAPS = 128
else:
    LINEAR = ((128, 768, 3072), (128, 1024, 4096), (37, 196, 784))
    CONV = ((1, 256, 399), (1, 512, 399), (3, 196, 75))
    ATTENTION = ((1, 12, 200, 64), (1, 16, 300, 64), (3, 4, 75, 49))
    GROUP_NORM = ((1, 512, 3999), (4, 512, 3999), (3, 196, 375))
    ROWS = ((128, 768), (512, 1024), (75, 196))
    TAPS = 32


@dataclass(frozen=True)
class Member:
    """One provider of an op, differentiable in ``x``.

    Args:
        x: what the gradient is taken of.
        call: the output.
        exact: the same in float32, or what a low-bit layer means by it.
        max_error: relative, that is not a bug.
    """

    x: Tensor
    call: Callable[[], Tensor]
    exact: Callable[[Tensor], Tensor]
    max_error: float


def _input(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE).requires_grad_()


def linear(sizes: Sizes, spec: QuantSpec | None, gelu: bool = True) -> Member:
    """A frozen layer and GELU."""
    M, K, N = sizes
    x, layer = _input(M, K), nn.Linear(K, N, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    if spec is None:
        twin = copy.deepcopy(layer).float()
        return Member(
            x, lambda: F.gelu(layer(x)), lambda x: F.gelu(twin(x)), 2 * float_error(K, DTYPE)
        )
    low_bit = QLinear.from_float(layer, spec)
    exact = low_bit.to_float().float().requires_grad_(False)
    bound = 2 * float_error(max(K, N), DTYPE)
    bound += 2 * int8_input_error(x.detach(), 1) if spec.inputs else 0.0
    call = functools.partial(low_bit, x, epilogue="gelu")
    return Member(x, call, lambda x: F.gelu(exact(x)), bound)


def linear_peer(sizes: Sizes, quantize: Callable[[nn.Linear], cuda_peers.Layer]) -> Member:
    """Somebody else's layer, and GELU."""
    M, K, N = sizes
    x, layer = _input(M, K), nn.Linear(K, N, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    run, twin = quantize(layer), copy.deepcopy(layer).float()
    return Member(x, lambda: F.gelu(run(x)), lambda x: F.gelu(twin(x)), 0.15)


def conv1d(
    sizes: Sizes, spec: QuantSpec | None, k: int, stride: int = 1, groups: int = 1
) -> Member:
    """One kind of convolution; ours on channel-last memory, as chained layers keep it."""
    B, C, T = sizes
    groups = C if groups == -1 else 4 if groups > 1 and C % groups else groups
    padding = k // 2 if stride == 1 else 0
    layer = nn.Conv1d(C, C, k, stride, padding, groups=groups, device=DEVICE, dtype=DTYPE)
    layer.requires_grad_(False)
    terms = k * C // groups
    if spec is None:
        x, twin = _input(B, C, T), copy.deepcopy(layer).float()
        return Member(x, lambda: layer(x), twin, 2 * float_error(terms, DTYPE))
    x = torch.randn(B, T, C, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_()
    low_bit = QConv1d.from_float(layer, spec)
    exact = low_bit.to_float().float().requires_grad_(False)
    bound = 2 * float_error(terms, DTYPE)
    bound += 2 * int8_input_error(x.detach(), (1, 2)) if spec.inputs else 0.0
    return Member(x, lambda: low_bit(x), exact, bound)


def attention(sizes: Sizes, ours: bool) -> Member:
    """Bidirectional self-attention without a mask; the gradient is that of q."""
    q = _input(*sizes)
    k, v = torch.randn(2, *sizes, device=DEVICE, dtype=DTYPE)
    attend = flash_attention if ours else F.scaled_dot_product_attention

    def exact(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.float(), v.float())

    return Member(q, lambda: attend(q, k, v), exact, 4 * float_error(sizes[2], DTYPE))


def group_norm(sizes: Sizes, ours: bool) -> Member:
    """One group a channel, as in the first layer of a front end."""
    x, C = _input(*sizes), sizes[1]
    weight, bias = torch.randn(2, C, device=DEVICE, dtype=DTYPE)
    call = functools.partial(F.group_norm, x, C, weight, bias)
    if ours:
        call = functools.partial(
            masked_group_norm, x, weight, bias, lengths=None, num_groups=C
        )  # fmt: skip
    return Member(
        x, call, lambda x: F.group_norm(x, C, weight.float(), bias.float()),
        4 * float_error(sizes[2], DTYPE),
    )  # fmt: skip


def layer_norm_int8(sizes: Sizes, ours: bool) -> Member:
    """Residual and LayerNorm, and the rows as int8 for the next layer."""
    x, K = _input(*sizes), sizes[1]
    weight, bias = torch.randn(2, K, device=DEVICE, dtype=DTYPE)
    residual = torch.randn(sizes, device=DEVICE, dtype=DTYPE)

    def eager(x: Tensor) -> Tensor:
        h = x + residual.to(x.dtype)
        y = F.layer_norm(h, (K,), weight.to(x.dtype), bias.to(x.dtype))
        scale = y.detach().abs().amax(-1, keepdim=True) / 127
        (y.detach() / scale).round().to(torch.int8)
        return y

    def fused() -> Tensor:
        return norm_quantize(x, weight, bias, residual=residual, return_normalized=True)[3]

    # a value at half a step may fall to either side
    return Member(x, fused if ours else lambda: eager(x), eager, 0.03)


def layer_norm_gelu(sizes: Sizes, ours: bool) -> Member:
    """LayerNorm over the features, then GELU, as in the front end of the large models."""
    x, K = _input(*sizes), sizes[1]
    weight, bias = torch.randn(2, K, device=DEVICE, dtype=DTYPE)

    def eager(x: Tensor) -> Tensor:
        return F.gelu(F.layer_norm(x, (K,), weight.to(x.dtype), bias.to(x.dtype)))

    def fused() -> Tensor:
        return norm_activation(x, weight, bias, activation="gelu")

    bound = 8 * float_error(K, DTYPE)
    return Member(x, fused if ours else lambda: eager(x), eager, bound)


def batch_norm_silu(sizes: Sizes, ours: bool) -> Member:
    """BatchNorm with the batch's statistics, then SiLU, as a Conformer trains; channel-last."""
    B, C, T = sizes
    x = torch.randn(B, T, C, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_()
    weight, bias = torch.randn(2, C, device=DEVICE, dtype=DTYPE)

    def eager(x: Tensor) -> Tensor:
        weights = weight.to(x.dtype), bias.to(x.dtype)
        return F.silu(F.batch_norm(x, None, None, *weights, training=True))

    def fused() -> Tensor:
        return masked_batch_norm(x, weight, bias, lengths=None, activation="silu")

    bound = 8 * float_error(B * T, DTYPE)
    return Member(x, fused if ours else lambda: eager(x), eager, bound)


def lsq(sizes: Sizes, ours: bool) -> Member:
    """Fake quantization to 4 bits with a learned scale."""
    x, levels = _input(*sizes), Levels.of_input(4)
    scale = initial_scale(x, levels).requires_grad_()

    def eager(x: Tensor) -> Tensor:
        v = (x / scale.to(x.dtype)).clamp(levels.low, levels.high)
        return (v + (v.round() - v).detach()) * scale.to(x.dtype)

    def fused() -> Tensor:
        return fake_quantize(x, Quantizer(levels, scale, "lsq"))

    # a value at half a step may fall to either side
    return Member(x, fused if ours else lambda: eager(x), eager, 0.15)


SPECS = {
    "w8": QuantSpec(bits=8),
    "w4": QuantSpec(bits=4),
    "w2": QuantSpec(bits=2),
    "w1": QuantSpec(bits=1),
    "w4-int8-inputs": QuantSpec(bits=4, inputs="int8"),
}
CONV_KINDS = {
    "strided": {"k": 3, "stride": 2},
    "grouped": {"k": TAPS, "groups": 16},
    "depthwise": {"k": 31, "groups": -1},
    "pointwise": {"k": 1},
}
LINEAR_PEERS: dict[str, tuple[Callable[[nn.Linear], cuda_peers.Layer], str]] = {
    "torchao-w4": (cuda_peers.torchao_int4, "torchao"),
    "bitsandbytes-nf4": (cuda_peers.bitsandbytes_nf4, "bitsandbytes"),
    "gemlite-w4": (functools.partial(cuda_peers.gemlite_weight_only, bits=4), "gemlite"),
    "humming-w4": (cuda_peers.humming_int4, "humming"),
}
WITH_GRADIENT = {"bitsandbytes-nf4"}
Make = Callable[[Sizes], Member]


def _ops() -> dict[str, tuple[tuple[Sizes, ...], dict[str, Make]]]:
    """Op to its sizes and its providers, PyTorch's first."""
    linears: dict[str, Make] = {"pytorch": functools.partial(linear, spec=None)}
    for name, spec in SPECS.items():
        linears[name] = functools.partial(linear, spec=spec)
    for name, (quantize, module) in LINEAR_PEERS.items():
        if ON_GPU and importlib.util.find_spec(module):
            linears[name] = functools.partial(linear_peer, quantize=quantize)
    ops = {"linear": (LINEAR, linears)}
    for kind, arguments in CONV_KINDS.items():
        convs: dict[str, Make] = {"pytorch": functools.partial(conv1d, spec=None, **arguments)}
        for name in ("w4", "w4-int8-inputs"):
            convs[name] = functools.partial(conv1d, spec=SPECS[name], **arguments)
        ops[f"conv1d-{kind}"] = (CONV, convs)
    for name, shapes, make in (
        ("flash_attention", ATTENTION, attention),
        ("masked_group_norm", GROUP_NORM, group_norm),
        ("masked_batch_norm", CONV, batch_norm_silu),
        ("norm_quantize", ROWS, layer_norm_int8),
        ("norm_activation", ROWS, layer_norm_gelu),
        ("fake_quantize", ROWS, lsq),
    ):
        pair = ("pytorch", False), ("lowbit", True)
        ops[name] = (shapes, {who: functools.partial(make, ours=ours) for who, ours in pair})
    return ops


OPS = _ops()
# peers of one group stand together: a table of pytest-benchmark shows their ratios
IDS = [
    (op, direction, size, provider)
    for op, (_, providers) in OPS.items()
    for direction in ("forward", "backward")
    for size in SIZES
    for provider in providers
    if direction == "forward" or provider not in LINEAR_PEERS or provider in WITH_GRADIENT
]
