"""Dense strided convolutions as matrix products over views, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.conv1d.runs import conv1d_by_runs, conv1d_dw_by_runs, conv1d_dx_by_runs
from lowbit_kernels.testing import assert_as_accurate

GEOMETRIES = [(3, 2), (2, 2), (10, 5), (1, 1), (3, 1), (5, 3), (2, 3), (7, 4)]
geometries = pytest.mark.parametrize(("taps", "stride"), GEOMETRIES)


def reference(x, weight, bias, dy, taps, stride):
    """y, dx, dw of F.conv1d in the layouts of the tested functions."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    nct = weight.view(weight.shape[0], taps, -1).transpose(1, 2)
    y = F.conv1d(x.mT, nct, bias, stride=stride).mT
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


@geometries
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spare", [0, 1, 3], ids=lambda n: f"{n}-spare-frames")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forward_and_gradients(dtype, spare, batch, taps, stride, device):
    C, N, T = 12, 20, taps + 6 * stride + min(spare, stride - 1)
    x = torch.randn(batch, T, C, device=device, dtype=dtype)
    weight = (torch.randn(N, taps * C, device=device) / (taps * C) ** 0.5).to(dtype)
    bias = torch.randn(N, device=device, dtype=dtype)
    dy = torch.randn(batch, 7, N, device=device, dtype=dtype)
    geometry = Geometry(taps, stride)
    low = reference(x, weight, bias, dy, taps, stride)
    wide = (t.double() for t in (x, weight, bias, dy))
    high = reference(*wide, taps, stride)
    found = (
        conv1d_by_runs(x, weight, bias, geometry),
        conv1d_dx_by_runs(dy, weight, geometry, T),
        conv1d_dw_by_runs(dy, x, geometry).to(dtype),
    )
    for name, actual, a, b in zip(("y", "dx", "dw"), found, low, high, strict=True):
        assert_as_accurate(actual, a, b, name)
    without = conv1d_by_runs(x, weight, None, geometry)
    assert_as_accurate(without, *(reference(*t, taps, stride)[0] for t in (
        (x, weight, None, dy), (x.double(), weight.double(), None, dy.double()),
    )), "without a bias")  # fmt: skip


def test_frames_with_gaps_between_utterances(device):
    x = torch.randn(2, 15, 8, device=device)[:, 2:13]
    weight, geometry = torch.randn(4, 24, device=device), Geometry(3, 2)
    y = conv1d_by_runs(x, weight, None, geometry)
    assert torch.equal(y, conv1d_by_runs(x.contiguous(), weight, None, geometry))


@pytest.mark.parametrize("shape", [(0, 9, 8), (2, 3, 8)], ids=["no-batch", "one-frame"])
def test_small_shapes(shape, device):
    x, weight, geometry = (
        torch.randn(shape, device=device),
        torch.randn(4, 24, device=device),
        Geometry(3, 2),
    )
    y = conv1d_by_runs(x, weight, None, geometry)
    assert y.shape == (shape[0], (shape[1] - 3) // 2 + 1, 4)
    assert conv1d_dx_by_runs(y, weight, geometry, shape[1]).shape == x.shape
    assert conv1d_dw_by_runs(y, x, geometry).shape == weight.shape
