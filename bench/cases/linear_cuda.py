"""The linear layers of wav2vec2-base and -large on a GPU, from one frame to sixteen utterances."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases.linear_cpu import Inputs, cost, make_inputs, ours, unquantized
from bench.cuda_peers import (
    BITSANDBYTES,
    GEMLITE,
    GEMLITE_HQQ,
    TORCHAO,
    bitsandbytes_nf4,
    gemlite_int4,
    gemlite_int8,
    torchao_int4,
    torchao_int8,
)
from bench.errors import float_error
from bench.harness import Case, Prepared, Provider
from bench.shapes import LINEAR_CUDA as POINTS

# weights of uniform distribution lose 7 to 9 % to 4 bits, 1 % to 8 bits with as much for the inputs
INT4_ERROR, INT8_ERROR = 0.15, 0.04


def compiled(inputs: Inputs) -> Prepared:
    """``torch.compile`` of the layer and its activation, for this very shape."""
    # a shape after another would make the compiler give up
    torch.compiler.reset()
    run = torch.compile(inputs.with_float, dynamic=False)
    bound = float_error(inputs.linear.in_features, inputs.x.dtype)
    return Prepared(lambda: run(inputs.x), bound, weight_bytes=inputs.stored)


def peer(
    name: str,
    quantize: Callable[[nn.Linear], Callable[[Tensor], Tensor]],
    needs: Mapping[str, str],
    bits: int,
) -> Provider:
    """A peer's layer, followed by GELU where the point has it."""

    def prepare(inputs: Inputs) -> Prepared:
        layer, x, gelu = quantize(inputs.linear), inputs.x, inputs.gelu
        call = lambda: F.gelu(layer(x)) if gelu else layer(x)  # noqa: E731
        stored = inputs.linear.weight.numel() * bits // 8 + inputs.linear.bias.nbytes
        int8 = "int8 inputs" in name
        return Prepared(
            call, INT4_ERROR if bits == 4 else INT8_ERROR, weight_bytes=stored, int8=int8
        )  # fmt: skip

    return Provider(name, prepare, needs)


LINEAR_CUDA = Case(
    name="linear_cuda",
    title="Linear layers on a GPU, speed against bfloat16",
    points=POINTS,
    make_inputs=make_inputs,
    providers=(
        Provider("bf16", unquantized),
        Provider("bf16 torch.compile", compiled),
        Provider("lowbit w4, float inputs", lambda inputs: ours(inputs, int8=False)),
        Provider("lowbit w8, float inputs", lambda inputs: ours(inputs, int8=False, bits=8)),
        Provider("lowbit w4, int8 inputs", lambda inputs: ours(inputs, int8=True)),
        Provider("lowbit w8, int8 inputs", lambda inputs: ours(inputs, int8=True, bits=8)),
        peer("torchao w4", torchao_int4, TORCHAO, bits=4),
        peer("torchao w8, int8 inputs", torchao_int8, TORCHAO, bits=8),
        peer("bitsandbytes nf4", bitsandbytes_nf4, BITSANDBYTES, bits=4),
        peer("gemlite w4", gemlite_int4, GEMLITE_HQQ, bits=4),
        peer("gemlite w8, int8 inputs", gemlite_int8, GEMLITE, bits=8),
    ),
    baseline="bf16",
    cost=cost,
    device="cuda",
    dtype=torch.bfloat16,
    weight=3.0,
)
