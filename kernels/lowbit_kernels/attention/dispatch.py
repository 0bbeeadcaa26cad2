"""Which backend serves an attention call and why, and the calls of those that are not ours.

PyTorch's scaled_dot_product_attention serves devices that no kernel here does. Where one does, it
is not asked: an utterance alone would get other bits from it than in a padded batch, which takes
it a mask [B, 1, T, T].

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.attention.config import MAX_FP32_HEAD_DIM
from lowbit_kernels.attention.position import DenseBias, Position, Scheme
from lowbit_kernels.attention.reference import attention_mask

# looked up, not imported
FLASH_ATTN_INSTALLED = find_spec("flash_attn") is not None


class Backend(NamedTuple):
    """What serves a call.

    Attributes:
        name: ``"cpu"``; ``"triton"``; ``"triton_dense"``, the same with the position as a bias
            [B, H, T, T]; ``"flash_attn"``; or ``"sdpa"``, PyTorch's, with a bias likewise.
        reason: why, for people.
    """

    name: str
    reason: str


def choose_backend(
    device_type: str, capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, *,
    has_lengths: bool, has_position: bool, has_offsets: bool, trains: bool, capturing: bool,
    installed: bool,
) -> Backend:  # fmt: skip
    """The backend of one call.

    Args:
        device_type: of the tensors.
        capability: of a CUDA device.
        dtype: of q, k and v.
        head_dim: D.
        has_lengths: whether the call has them.
        has_position: whether it has a position.
        has_offsets: whether that is a table of offsets, not a ``DenseBias``.
        trains: whether the result has a gradient.
        capturing: whether a CUDA graph is captured or a graph is compiled around the call.
        installed: whether flash-attn is.
    """
    if device_type in ("cpu", "meta"):
        return Backend("cpu", f"q is on device {device_type!r}")
    if capability is None or capability < (8, 0):
        found = f"device {device_type!r}" + (f" of capability {capability}" if capability else "")
        return Backend("sdpa", f"kernels serve CPUs and GPUs of capability 8.0 on, q is on {found}")
    if trains and has_offsets and dtype == torch.float32 and head_dim > MAX_FP32_HEAD_DIM:
        return Backend(
            "triton_dense",
            f"gradients of offsets in fp32 fit the registers up to D = {MAX_FP32_HEAD_DIM}: the "
            "position is materialized, in memory that grows with the square of T",
        )
    obstacles = {
        "is not installed": not installed,
        "takes 16 bits": dtype not in (torch.float16, torch.bfloat16),
        "takes D in multiples of 8": head_dim % 8 != 0,
        "takes no lengths": has_lengths,
        "takes no position": has_position,
        "is not called while a graph is captured or compiled": capturing,
    }
    reasons = [reason for reason, applies in obstacles.items() if applies]
    if reasons:
        return Backend("triton", "flash-attn " + ", ".join(reasons))
    return Backend("flash_attn", "flash-attn is installed and able")


def needs_gradient(position: Position | Scheme | None, *heads: Tensor) -> bool:
    """Whether a result of these has a gradient."""
    if not torch.is_grad_enabled():
        return False
    biases = position.biases or () if isinstance(position, Scheme) else ()
    values = () if position is None else vars(position).values()
    return any(isinstance(x, Tensor) and x.requires_grad for x in (*heads, *values, *biases))


def backend_of(
    q: Tensor, *, lengths: Tensor | None = None, position: Position | Scheme | None = None,
    trains: bool | None = None,
) -> Backend:  # fmt: skip
    """Say what serves ``flash_attention`` of such inputs, and why: ``print(backend_of(q))``.

    Args:
        q: [B, H, T, D]; k and v are like it.
        lengths: as in ``flash_attention``.
        position: as in ``flash_attention``.
        trains: whether the result has a gradient. None: where q or the position needs one.
    """
    kind = position.kind if isinstance(position, Scheme) else type(position)
    device, dtype = q.device.type, q.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # while it is traced, no stream can be asked
    capturing = torch.compiler.is_compiling() or (
        q.is_cuda and torch.cuda.is_current_stream_capturing()
    )
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    return choose_backend(
        device, capability, dtype, q.shape[-1],
        has_lengths=lengths is not None, has_position=position is not None,
        has_offsets=kind not in ("dense", DenseBias, type(None)),
        trains=needs_gradient(position, q) if trains is None else trains,
        capturing=capturing, installed=FLASH_ATTN_INSTALLED,
    )  # fmt: skip


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, dropout_p: float
) -> Tensor:
    """Call the package flash-attn on [B, H, T, D]; it has a gradient of its own."""
    from flash_attn import flash_attn_func

    sides = (-1, -1) if window is None else (window, window)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = flash_attn_func(
        *heads, dropout_p=dropout_p, softmax_scale=scale, causal=False, window_size=sides
    )
    return out.transpose(1, 2)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, bias: Tensor | None,
    window: int | None, scale: float | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    """Call PyTorch's attention on [B, H, T, D] with a bias [B, H, T, T], of broadcastable sizes.

    It has a gradient of its own. Padded queries see all keys, so that no row is without one, and
    are zeroed.
    """
    T, padded = q.shape[2], None
    if lengths is not None:
        padded = torch.arange(T, device=q.device) >= lengths[:, None]
    if lengths is not None or window is not None:
        allowed = attention_mask(T, lengths, window, q.device)
        if padded is not None:
            allowed = allowed | padded[:, None, :, None]
        if bias is None:
            bias = torch.zeros((), dtype=q.dtype, device=q.device)
        bias = torch.where(allowed, bias, -torch.inf)
    mask = None if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
    if padded is not None:
        out = out.masked_fill(padded[:, None, :, None], 0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)
