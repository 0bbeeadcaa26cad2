"""A dense strided convolution as matrix products over plain views: no windows are stored.

Taps in runs of ``stride`` read rows [T_out, stride * C] that do not overlap, so a library's matrix
product takes them: ``ceil(taps / stride)`` products that add up. Two of two taps is one, three of
two are two.

Dimension key: B batch, T frames read, T_out frames written, C input channels, N output channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit_kernels.conv1d.geometry import Geometry


def _runs(x: Tensor, geometry: Geometry) -> Iterator[tuple[Tensor, slice]]:
    """Views [B, T_out, run * C] of frames x [B, T, C], and the columns of the weight for each."""
    B, T, C = x.shape
    stride, taps = geometry.stride, geometry.kernel_size
    T_out = (T - taps) // stride + 1
    for first in range(0, taps, stride):
        width = min(stride, taps - first) * C
        strides, start = (x.stride(0), stride * C, 1), x.storage_offset() + first * C
        view = x.as_strided((B, T_out, width), strides, start)
        yield view, slice(first * C, first * C + width)


def conv1d_by_runs(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve.

    Args:
        x: [B, T, C], padded already; frames adjacent in memory.
        weight: [N, taps * C], tap-major, in the dtype of x.
        bias: [N].
        geometry: dilation 1, one group.

    Returns:
        [B, T_out, N], contiguous.
    """
    B = x.shape[0]
    y = None if bias is None else bias
    for view, columns in _runs(x, geometry):
        factor = weight[:, columns].t().expand(B, -1, -1)
        y = torch.bmm(view, factor) if y is None else torch.baddbmm(y, view, factor)
    assert y is not None, "there is a tap"
    return y


def conv1d_dx_by_runs(dz: Tensor, weight: Tensor, geometry: Geometry, T: int) -> Tensor:
    """Gradient of x [B, T, C] from dz [B, T_out, N]; see ``conv1d_by_runs``."""
    B, C = dz.shape[0], weight.shape[1] // geometry.kernel_size
    dx = dz.new_zeros(B, T, C)
    for view, columns in _runs(dx, geometry):
        view.baddbmm_(dz, weight[:, columns].expand(B, -1, -1))
    return dx


def conv1d_dw_by_runs(dz: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of the weight, [N, taps * C], fp32 or wider, summed over the batch."""
    wide = torch.promote_types(dz.dtype, torch.float32)
    parts = [torch.bmm(dz.mT, view).sum(0, dtype=wide) for view, _ in _runs(x, geometry)]
    return torch.cat(parts, 1)
