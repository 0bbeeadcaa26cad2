"""The gate of WavLM's position bias: kernel, op, errors."""

import pytest
import torch

from lowbit_kernels.attention.gate_kernel import position_gate_triton
from lowbit_kernels.attention.gate_op import position_gate, position_gate_reference
from lowbit_kernels.testing import assert_as_accurate
from tests.norm_cases import DTYPES

SIZES = [
    pytest.param((2, 37, 4, 12), id="ragged"),
    pytest.param((1, 1, 1, 1), id="one"),
    pytest.param((3, 50, 3, 81), id="odd head"),
    pytest.param((0, 5, 2, 16), id="empty batch"),
    pytest.param((2, 0, 2, 16), id="no frames"),
    pytest.param((8, 499, 12, 64), id="wavlm-base", marks=pytest.mark.gpu),
]


def inputs(sizes, dtype, device):
    B, T, H, D = sizes
    x = torch.randn(B, T, H * D, dtype=dtype, device=device)
    weight, bias = torch.randn(8, D, device=device) / 4, torch.randn(8, device=device)
    return x, weight.to(dtype), bias.to(dtype), torch.randn(1, H, 1, 1, device=device).to(dtype)


def of_wavlm(x, weight, bias, const):
    """As transformers computes it, in the dtype of x."""
    heads = x.unflatten(-1, (const.numel(), -1)).transpose(1, 2)
    sums = torch.nn.functional.linear(heads, weight, bias)
    sums = sums.view(*heads.shape[:-1], 2, 4).sum(-1)
    gate_a, gate_b = torch.sigmoid(sums).chunk(2, dim=-1)
    return (gate_a * (gate_b * const - 1.0) + 2.0).squeeze(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernel_is_as_accurate_as_torch(sizes, dtype, device):
    given = inputs(sizes, dtype, device)
    high = of_wavlm(*(t.double() for t in given))
    assert_as_accurate(position_gate_triton(*given).to(dtype), of_wavlm(*given), high)


@pytest.mark.parametrize("sizes", SIZES[:5])
def test_the_op_and_the_reference_compute_what_wavlm_does(sizes):
    given = inputs(sizes, torch.float32, "cpu")
    high = of_wavlm(*(t.double() for t in given))
    assert torch.equal(position_gate(*given), position_gate_reference(*given))
    assert_as_accurate(position_gate(*given), of_wavlm(*given), high)
    assert_as_accurate(position_gate(*(t.double() for t in given)), high, high)
    torch.library.opcheck(torch.ops.lowbit.position_gate.default, given)


def test_strided_inputs(device):
    x, *rest = inputs((2, 9, 2, 8), torch.float32, device)
    wanted = position_gate_triton(x, *rest)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        assert torch.equal(position_gate_triton(strided, *rest), wanted)


def test_wrong_arguments_are_named():
    x, weight, bias, const = inputs((2, 9, 2, 8), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"weight \[8, C / 2\], got \[2, 9, 16\] and \[8, 7\]"):
        position_gate(x, weight[:, :7], bias, const)
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \[7\]"):
        position_gate(x, weight, bias[:7], const)
    with pytest.raises(ValueError, match="x must be fp16, bf16 or fp32"):
        position_gate(x.long(), weight, bias, const)
