"""Channel-last memory behind tensors that say [B, C, T].

Dimension key: B batch, C channels, T frames.
"""

from torch import Tensor


def empty_channel_last(x: Tensor, B: int, C: int, T: int) -> Tensor:
    """Uninitialized [B, C, T] in memory order [B, T, C], dtype and device of x."""
    return x.new_empty_strided((B, C, T), (T * C, 1, C))


def channel_last(x: Tensor) -> Tensor:
    """x [B, C, T] as [B, T, C] with adjacent channels, copied only where they are not."""
    x = x.transpose(1, 2)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def channel_first(y: Tensor) -> Tensor:
    """The memory of y [B, T, C] as a [B, C, T] tensor, copied only if it is not contiguous."""
    y = y.contiguous().transpose(1, 2)
    # not a view: autograd lets nobody write into a view that an op returned
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())
