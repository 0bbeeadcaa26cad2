"""What PyTorch's counter says of the attention ops."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lowbit_kernels.attention import (
    TransformerXL,
    flash_attention,
    int8_scores_attention,
    low_bit_attention,
)

B, H, T, D = 2, 3, 17, 8
PRODUCT = 2 * B * H * T * T * D


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def low_bit(q, k, v, **options):
    return low_bit_attention(q, k, v, torch.tensor(0.1), bits=2, **options)


def heads(grad=False):
    return [torch.randn(B, H, T, D, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("attend", [flash_attention, low_bit, int8_scores_attention])
def test_forward_counts_what_pytorch_counts(attend):
    q, k, v = heads()
    assert counted(lambda: attend(q, k, v)) == 2 * PRODUCT
    meta = [x.to("meta") for x in (q, k, v)]
    assert counted(lambda: F.scaled_dot_product_attention(*meta)) == 2 * PRODUCT
    # five keys of seventeen
    assert counted(lambda: attend(q, k, v, window=2)) == 2 * PRODUCT * 5 // 17
    keys, bias = torch.randn(H, 2 * T - 1, D), torch.randn(H, D)
    position = TransformerXL(keys, bias, bias)
    assert counted(lambda: attend(q, k, v, position=position)) == 3 * PRODUCT


@pytest.mark.parametrize("attend", [flash_attention, low_bit])
def test_backward(attend):
    heads_ = heads(grad=True)
    out = attend(*heads_)
    assert counted(lambda: out.sum().backward()) == 5 * PRODUCT
    keys = torch.randn(H, 2 * T - 1, D, requires_grad=True)
    bias = torch.randn(H, D)
    out = attend(*heads_, position=TransformerXL(keys, bias, bias))
    assert counted(lambda: out.sum().backward()) == 8 * PRODUCT
