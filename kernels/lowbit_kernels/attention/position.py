"""What a position scheme adds to the attention scores.

Dimension key: B batch, H heads, T frames.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseBias:
    """A bias that is added to the scaled scores before the softmax.

    Attributes:
        bias: broadcastable to [B, H, T, T], any floating dtype. Differentiable. A key whose
            bias is -inf is not attended to.
    """

    bias: Tensor
