"""The Conformer's depthwise convolution alone, against cuDNN and the kernels of other projects.

causal-conv1d serves 2 to 4 taps, none of an encoder's, and is left out.

Dimension key: B batch, C channels, T frames, k taps.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import ALL_MODES, FLOOR, Case, Goal, Prepared, Provider
from bench.cases.conv1d_cpu import Inputs, cost, make_inputs, ours, unquantized
from bench.errors import float_error
from bench.shapes import depthwise_point

CUDNN, FLOAT = "cuDNN bf16", "lowbit w8, float inputs"


def peer(inputs: Inputs, call: Callable[[], Tensor], expected: Callable[[], Tensor]) -> Prepared:
    """A float convolution of somebody else's."""
    stored = inputs.conv.weight.nbytes
    bound = float_error(inputs.conv.weight.shape[-1], inputs.x.dtype)
    return Prepared(call, bound, expected, weight_bytes=stored)


def cudnn_fp16(inputs: Inputs) -> Prepared:
    """The format for which PyTorch takes another kernel."""
    conv, x = inputs.conv, inputs.x.half()
    weight, bias = conv.weight.half(), conv.bias.half()
    run = functools.partial(F.conv1d, padding=conv.padding, groups=conv.groups)
    return peer(inputs, lambda: run(x, weight, bias), lambda: run(*_wide(x, weight, bias)))


def compiled(inputs: Inputs) -> Prepared:
    """``torch.compile``, for this very shape."""
    torch.compiler.reset()
    conv: Any = torch.compile(inputs.conv, dynamic=False)
    return peer(inputs, lambda: conv(inputs.x), lambda: inputs.conv(inputs.x))


def flag_gems(inputs: Inputs) -> Prepared:
    """A two-dimensional convolution in Triton."""
    from flag_gems.ops.conv1d import conv1d

    conv, x = inputs.conv, inputs.x
    run = functools.partial(conv1d, padding=conv.padding[0], groups=conv.groups)
    return peer(inputs, lambda: run(x, conv.weight, conv.bias), lambda: conv(x))


def flash_linear_attention(inputs: Inputs) -> Prepared:
    """Causal, so of other frames: as many products."""
    from fla.modules.convolution import causal_conv1d

    conv, x = inputs.conv, inputs.x.transpose(1, 2).contiguous()
    weight, bias, taps = conv.weight[:, 0].contiguous(), conv.bias, conv.weight.shape[-1]

    def call() -> Tensor:
        y: Tensor = causal_conv1d(x, weight, bias)[0]
        return y

    def expected() -> Tensor:
        wide, weight, bias = _wide(inputs.x, conv.weight, conv.bias)
        return F.conv1d(F.pad(wide, (taps - 1, 0)), weight, bias, groups=conv.groups).mT

    return peer(inputs, call, expected)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.float() for tensor in tensors)


_GOALS = (Goal(FLOAT, 1.3, 2.0, CUDNN), Goal(FLOAT, 0.6, 0.8, FLOOR))
POINTS = tuple(
    depthwise_point(C, T, k, origin, batch=B, goals=_GOALS)
    for B, T, C, k, origin in (
        (32, 1500, 512, 31, "conformer-L, 32 x 30 s"),
        (1, 500, 1024, 31, "conformer-large, 10 s"),
        (32, 500, 1024, 31, "conformer-large, 32 x 10 s"),
        (32, 375, 324, 31, "squeezeformer-M, 32 x 15 s"),
        (32, 125, 1024, 9, "parakeet, 32 x 10 s"),
    )
)
DEPTHWISE_CUDA = Case(
    name="depthwise_cuda",
    title="Depthwise convolutions",
    points=POINTS,
    make_inputs=make_inputs,
    providers=(
        Provider(CUDNN, unquantized),
        Provider("cuDNN fp16", cudnn_fp16, gpu_only=True),
        Provider("torch.compile bf16", compiled),
        Provider("FlagGems", flag_gems, {"flag_gems": "flag-gems"}, gpu_only=True),
        Provider(
            "flash-linear-attention, causal", flash_linear_attention,
            {"fla": "flash-linear-attention"}, gpu_only=True,
        ),
        Provider(FLOAT, lambda inputs: ours(inputs, int8=False, bits=8)),
        Provider("lowbit w4, float inputs", lambda inputs: ours(inputs, int8=False)),
        Provider("lowbit w8, int8 inputs", lambda inputs: ours(inputs, int8=True, bits=8)),
    ),
    baseline=CUDNN,
    cost=cost,
    layout="goals",
    device="cuda",
    dtype=torch.bfloat16,
    modes=ALL_MODES,
    small=(depthwise_point(20, 37, 7, "small", batch=2, goals=_GOALS),),
)  # fmt: skip
