"""torch.ops.lowbit.position_gate: the gate of WavLM's position bias (arXiv 2110.13900).

Dimension key: B batch, T frames, H heads, D head dimension, C = H * D.
"""

import torch
from torch import Tensor

from lowbit_kernels.checks import check_dtype
from lowbit_kernels.device import implement_on_cuda

torch.library.define(
    "lowbit::position_gate", "(Tensor x, Tensor weight, Tensor bias, Tensor const) -> Tensor"
)


@torch.library.register_fake("lowbit::position_gate")
def _fake(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], const.numel(), x.shape[1], dtype=dtype)


def position_gate_reference(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> Tensor:
    """What ``position_gate`` means, in fp32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    heads = x.to(wide).view(*x.shape[:2], const.numel(), weight.shape[1]).transpose(1, 2)
    sums = torch.nn.functional.linear(heads, weight.to(wide), bias.to(wide))
    update, reset = sums.view(*sums.shape[:-1], 2, 4).sum(-1).sigmoid().unbind(-1)
    gate: Tensor = update * (reset * const.to(wide).view(1, -1, 1) - 1) + 2
    return gate.contiguous()


torch.library.impl("lowbit::position_gate", "cpu", position_gate_reference)
implement_on_cuda(
    "lowbit::position_gate", "lowbit_kernels.attention.gate_kernel.position_gate_triton"
)


def position_gate(x: Tensor, weight: Tensor, bias: Tensor, const: Tensor) -> Tensor:
    """What multiplies the position bias of each query, in one pass. It has no gradient.

    Equivalent to ``update * (reset * const - 1) + 2``, of the sigmoids of the sums of the first and
    the last 4 features that a linear layer makes of a query's share of x.

    Args:
        x: [B, T, C], the input of the attention, fp16, bf16 or fp32 (fp64 on a CPU).
        weight: [8, D] of the linear layer, any floating dtype.
        bias: [8].
        const: [1, H, 1, 1], or any shape of H numbers.

    Returns:
        [B, H, T], fp32 (fp64 for fp64).

    Raises:
        ValueError: on a wrong shape or dtype, naming the argument.
    """
    check_dtype("x", x)
    H = const.numel()
    if x.dim() != 3 or weight.shape != (8, x.shape[-1] // H) or x.shape[-1] % H:
        raise ValueError(
            f"x must be [B, T, C] and weight [8, C / {H}], got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    if bias.shape != (8,):
        raise ValueError(f"bias must be [8], got {list(bias.shape)}")
    gate: Tensor = torch.ops.lowbit.position_gate.default(x, weight, bias, const)
    return gate
