"""Small tools of the modules that ignore padding.

Dimension key: B batch, C channels, T frames.
"""

from typing import Any

import torch
from torch import Tensor


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Zero x [B, C, T] from frame ``lengths[b]`` on."""
    return x.masked_fill(_is_padding(x, lengths), 0)


def fill_padding(x: Tensor, lengths: Tensor, value: Tensor) -> Tensor:
    """Set x [B, C, T] to ``value`` [C] from frame ``lengths[b]`` on."""
    return torch.where(_is_padding(x, lengths), value[:, None].to(x.dtype), x)


def _is_padding(x: Tensor, lengths: Tensor) -> Tensor:
    frames = torch.arange(x.shape[-1], device=x.device)
    return frames >= lengths[:, None, None]


def frames_after(lengths: Tensor, conv: Any) -> Tensor:
    """Valid output frames of a convolution [B] for valid input frames [B]."""
    span = conv.dilation[0] * (conv.kernel_size[0] - 1) + 1
    padding = 2 * conv.padding[0]
    return torch.div(lengths + padding - span, conv.stride[0], rounding_mode="floor") + 1


def attention_mask_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The ``attention_mask`` of a call, which transformers' modules take as second argument."""
    return args[1] if len(args) > 1 else kwargs.get("attention_mask")
