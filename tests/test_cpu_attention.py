"""The CPU attention kernel against the reference."""

import pytest
import torch
from torch import Tensor

from lowbit_kernels.attention.reference import flash_attention_reference
from lowbit_kernels.cpu import attention_cpu, cpu_backend, library
from lowbit_kernels.testing import assert_as_accurate

# B, H, T, D: one frame; less than a tile; ragged in everything; more than one task of queries; wide
SHAPES = [(1, 1, 1, 16), (2, 3, 5, 36), (2, 2, 50, 64), (1, 2, 130, 49), (1, 1, 60, 256)]


@pytest.fixture(autouse=True)
def _needs_native() -> None:
    if library.native() is None:
        pytest.skip(cpu_backend())


def heads(B: int, H: int, T: int, D: int) -> list[Tensor]:
    """q, k and v as slices of one projection, as a model has them."""
    qkv = torch.randn(B, T, 3, H, D)
    return [t.transpose(1, 2) for t in qkv.unbind(2)]


def check(q: Tensor, k: Tensor, v: Tensor, lengths, bias, window) -> Tensor:
    scale = q.shape[-1] ** -0.5
    result = attention_cpu(q, k, v, lengths, bias, window, scale)
    assert result is not None
    low = flash_attention_reference(q, k, v, lengths, bias, window, scale)
    wide = None if bias is None else bias.double()
    high = flash_attention_reference(
        q.double(), k.double(), v.double(), lengths, wide, window, scale
    )
    assert_as_accurate(result[0], low[0], high[0])
    assert_as_accurate(result[1], low[1].float(), high[1], "lse")
    return result[0]


@pytest.mark.parametrize("window", [None, 0, 3, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_as_accurate_as_pytorch(shape: tuple[int, ...], window: int | None):
    B, H, T, _ = shape
    q, k, v = heads(*shape)
    out = check(q, k, v, None, None, window)
    assert out.transpose(1, 2).is_contiguous()
    lengths = torch.randint(0, T + 1, (B,))
    lengths[0] = T // 2
    check(q, k, v, lengths, None, window)
    bias = torch.randn(B, H, T, T)
    bias[0, 0, 0] = -torch.inf
    bias[..., T // 2] = -torch.inf
    check(q, k, v, lengths, bias, window)


@pytest.mark.parametrize("shape", [(1, 1, 9, 9), (2, 1, 1, 9), (1, 3, 9, 1), (9, 9)], ids=str)
def test_bias_broadcasts(shape: tuple[int, ...]):
    q, k, v = heads(2, 3, 9, 16)
    check(q, k, v, None, torch.randn(shape), None)
    # a bias whose keys are not contiguous
    if shape[-1] == 9:
        check(q, k, v, None, torch.randn(*shape[:-1], 18)[..., ::2], None)


def test_large_scores_do_not_overflow():
    q, k, v = heads(1, 2, 50, 16)
    check(100 * q, 100 * k, v, None, None, None)


def test_padded_frames_do_not_matter():
    q, k, v = heads(2, 2, 60, 16)
    lengths = torch.tensor([60, 41])
    alone = attention_cpu(q[1:, :, :41], k[1:, :, :41], v[1:, :, :41], None, None, None, 0.25)
    together = attention_cpu(q, k, v, lengths, None, None, 0.25)
    assert alone is not None
    assert together is not None
    assert torch.equal(together[0][1:, :, :41], alone[0])
    assert not together[0][1, :, 41:].any()


def test_nan_stays_nan():
    q, k, v = heads(1, 2, 50, 16)
    q[0, 0, 7, 3] = torch.nan
    result = attention_cpu(q, k, v, None, None, None, 0.25)
    assert result is not None
    assert result[0][0, 0, 7].isnan().all()
    assert result[0].isnan().sum() == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype: torch.dtype):
    q, k, v = (t.to(dtype) for t in heads(1, 2, 50, 64))
    check(q, k, v, None, None, None)


def test_empty():
    for shape in ((0, 2, 5, 16), (2, 2, 0, 16)):
        result = attention_cpu(*heads(*shape), None, None, None, 1.0)
        assert result is not None
        assert result[0].shape == shape


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "native", lambda: None)
    assert attention_cpu(*heads(1, 1, 5, 16), None, None, None, 1.0) is None
