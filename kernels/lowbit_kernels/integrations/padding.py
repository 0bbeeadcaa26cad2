"""Small tools of the modules that ignore padding.

Dimension key: B batch, C channels, T frames.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Zero x [B, C, T] from frame ``lengths[b]`` on."""
    frames = torch.arange(x.shape[-1], device=x.device)
    return x.masked_fill(frames >= lengths[:, None, None], 0)


def remove_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a hook of ``register_forward_pre_hook(..., with_kwargs=True)``, in a copy too."""
    for key in [key for key, found in module._forward_pre_hooks.items() if found is hook]:
        del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
