"""The convolutions of a speech encoder on a GPU, against cuDNN."""

import torch

from bench.case import Case, Provider
from bench.cases.conv1d_cpu import cost, make_inputs, ours, unquantized
from bench.shapes import CONV1D_CUDA as POINTS

CONV1D_CUDA = Case(
    name="conv1d_cuda",
    title="Convolutions on a GPU, speed against bfloat16",
    points=POINTS,
    make_inputs=make_inputs,
    providers=(
        Provider("bf16", unquantized),
        Provider("lowbit w4, int8 inputs", lambda inputs: ours(inputs, int8=True)),
        Provider("lowbit w4, float inputs", lambda inputs: ours(inputs, int8=False)),
    ),
    baseline="bf16",
    cost=cost,
    device="cuda",
    dtype=torch.bfloat16,
)
