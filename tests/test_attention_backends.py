"""Which backend serves an attention call, and how the optional flash-attn is called."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.attention import op
from lowbit_kernels.attention.dispatch import choose_backend

ABLE = {
    "device_type": "cuda",
    "dtype": torch.bfloat16,
    "head_dim": 64,
    "has_lengths": False,
    "has_position": False,
    "capturing": False,
    "installed": True,
}


def test_flash_attn_serves_what_it_can():
    assert choose_backend(**ABLE) == "flash_attn"


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({"installed": False}, "triton"),
        ({"dtype": torch.float32}, "triton"),
        ({"head_dim": 81}, "triton"),
        ({"has_lengths": True}, "triton"),
        ({"has_position": True}, "triton"),
        ({"capturing": True}, "triton"),
        ({"device_type": "cpu"}, "cpu"),
    ],
    ids=str,
)
def test_everything_else_stays_here(change, backend):
    assert choose_backend(**(ABLE | change)) == backend


@pytest.mark.parametrize("window", [None, 3])
def test_the_call_of_flash_attn(window, monkeypatch):
    """A recording stand-in: the layout, the argument names and the result's layout."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size):
        calls.append((tuple(q.shape), dropout_p, softmax_scale, causal, window_size))
        heads = (x.transpose(1, 2) for x in (q, k, v))  # [B, T, H, D] comes in
        return F.scaled_dot_product_attention(*heads, scale=softmax_scale).transpose(1, 2)

    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(op, "choose_backend", lambda *args, **kwargs: "flash_attn")
    q, k, v = torch.randn(3, 2, 4, 7, 16)
    out = op.flash_attention(q, k, v, window=window, scale=0.5, dropout_p=0.1)
    sides = (-1, -1) if window is None else (3, 3)
    assert calls == [((2, 7, 4, 16), 0.1, 0.5, False, sides)]
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=0.5))
