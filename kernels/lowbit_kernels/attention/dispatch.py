"""Which backend serves an attention call: a pure function, and the call of the optional one.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("cpu", "triton", "flash_attn")

# looked up, not imported
FLASH_ATTN_INSTALLED = find_spec("flash_attn") is not None


def choose_backend(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    has_lengths: bool,
    has_position: bool,
    capturing: bool,
    installed: bool,
) -> str:
    """The backend of one call.

    flash-attn serves what it can: 16 bits, D a multiple of 8, no lengths, no position, and not
    while a graph is captured or compiled.

    Args:
        device_type: of the tensors.
        dtype: of q, k and v.
        head_dim: D.
        has_lengths, has_position: whether the call has them.
        capturing: whether a CUDA graph is captured or a graph is compiled around the call.
        installed: whether flash-attn is.

    Returns:
        ``"cpu"``, ``"triton"`` or ``"flash_attn"``.
    """
    if device_type != "cuda":
        return "cpu"
    able = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0
    plain = not (has_lengths or has_position or capturing)
    return "flash_attn" if installed and able and plain else "triton"


def flash_attn_backend(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, dropout_p: float
) -> Tensor:
    """Call the package flash-attn on [B, H, T, D]; it has a gradient of its own."""
    from flash_attn import flash_attn_func

    sides = (-1, -1) if window is None else (window, window)
    out: Tensor = flash_attn_func(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=False,
        window_size=sides,
    )
    return out.transpose(1, 2)
