"""What ``torch.utils.flop_counter`` counts for the attention ops, once this module is imported.

A module of its own because the counter imports Triton, which ``import lowbit_kernels`` must not.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from lowbit_kernels.attention import gate_op as _gate_op  # noqa: F401  (defines the op)
from lowbit_kernels.attention import int8_op as _int8_op  # noqa: F401  (defines the op)
from lowbit_kernels.attention import low_bit_op as _low_bit_op  # noqa: F401  (defines the ops)
from lowbit_kernels.attention import op as _op  # noqa: F401  (defines the ops)


def _register(op: Any, products: int, of_offsets: int) -> None:
    """Count products of T frames with those that they see.

    Args:
        op: the op.
        products: with keys or values; PyTorch counts 2 forward, and 5 backward, too.
        of_offsets: more with a table of keys of offsets, each computed once.
    """
    names = [argument.name for argument in op.default._schema.arguments]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs
        (B, H, T, D), window = given["q"], given.get("window")
        # of packed utterances no more than of the longest
        longest = given.get("longest") or T
        seen = longest if window is None else min(longest, 2 * window + 1)
        more = of_offsets if given.get("kind") == "relative" else 0
        flops: int = 2 * B * H * T * seen * D * (products + more)
        return flops

    register_flop_formula(op)(count)


_ops = torch.ops.lowbit
_register(_ops.flash_attention, 2, 1)
_register(_ops.flash_attention_backward, 5, 3)
_register(_ops.low_bit_attention, 2, 1)
_register(_ops.low_bit_attention_backward, 5, 3)
_register(_ops.int8_scores_attention, 2, 1)


@register_flop_formula(_ops.position_gate)
def _gate_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    """2 a feature of x and row of the weight."""
    return int(2 * math.prod(x_shape) * weight_shape[0])
