"""Which backend serves an attention call, and how the optional flash-attn is called."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.attention import (
    BucketedBias,
    DenseBias,
    RelativeKey,
    TransformerXL,
    backend_of,
    flash_attention_packed,
    op,
)
from lowbit_kernels.attention.dispatch import Backend, choose_backend
from lowbit_kernels.testing import assert_as_accurate
from tests.test_attention import make_inputs
from tests.test_attention_inference import make_position

ABLE = {
    "device_type": "cuda",
    "capability": (9, 0),
    "dtype": torch.bfloat16,
    "head_dim": 64,
    "has_lengths": False,
    "has_position": False,
    "has_offsets": False,
    "trains": False,
    "capturing": False,
    "installed": True,
}


def test_flash_attn_serves_what_it_can():
    assert choose_backend(**ABLE).name == "flash_attn"


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({"installed": False}, "triton", "flash-attn is not installed"),
        ({"dtype": torch.float32}, "triton", "flash-attn takes 16 bits"),
        ({"head_dim": 81}, "triton", "flash-attn takes D in multiples of 8"),
        ({"has_lengths": True, "head_dim": 81}, "triton", "multiples of 8, takes no lengths"),
        ({"has_position": True}, "triton", "flash-attn takes no position"),
        ({"capturing": True}, "triton", "while a graph is captured or compiled"),
        ({"device_type": "cpu", "capability": None}, "cpu", "q is on device 'cpu'"),
        ({"capability": (7, 5)}, "sdpa", "'cuda' of capability (7, 5)"),
        ({"device_type": "mps", "capability": None}, "sdpa", "q is on device 'mps'"),
    ],
    ids=str,
)
def test_everything_else_stays_here(change, name, reason):
    backend = choose_backend(**(ABLE | change))
    assert backend.name == name
    assert reason in backend.reason


LARGE = {"dtype": torch.float32, "head_dim": 65, "has_position": True, "has_offsets": True}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"trains": True}, "triton_dense"),
        ({"trains": False}, "triton"),
        ({"trains": True, "has_offsets": False}, "triton"),
        ({"trains": True, "head_dim": 64}, "triton"),
        ({"trains": True, "dtype": torch.bfloat16}, "triton"),
    ],
    ids=str,
)
def test_gradients_of_large_heads_in_fp32_materialize_offsets(change, name):
    assert choose_backend(**(ABLE | LARGE | change)).name == name


@pytest.mark.parametrize("name", ["bucketed", "relative-key", "transformer-xl"])
def test_materialized_offsets_have_the_same_gradients(name, device, monkeypatch):
    q, k, v, grad = make_inputs(2, 3, 11, 72, torch.float64, "cpu")
    position = make_position(name, 2, 3, 11, 72, torch.float64, "cpu")
    tensors = [x for x in vars(position).values() if isinstance(x, torch.Tensor)]
    leaves = [x.requires_grad_() for x in (q, k, v, *tensors)]
    lengths, found = torch.tensor([11, 4]), []
    for backend in ("cpu", "triton_dense"):
        monkeypatch.setattr(op, "backend_of", lambda *_, n=backend, **__: Backend(n, ""))
        out = op.flash_attention(q, k, v, lengths=lengths, window=6, position=position)
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    for actual, expected in zip(*reversed(found), strict=True):
        assert_as_accurate(actual, expected, expected)


@pytest.mark.gpu
def test_gradients_of_large_heads_in_fp32():
    q, k, v, grad = make_inputs(2, 3, 11, 72, torch.float32, "cuda")
    position = make_position("transformer-xl", 2, 3, 11, 72, torch.float32, "cuda")
    tensors, found = (q, k, v, *vars(position).values()), []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float32), ("cpu", torch.float64)):
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in tensors]
        used = TransformerXL(*leaves[3:])
        if device == "cuda":
            assert backend_of(leaves[0], position=used).name == "triton_dense"
        out = op.flash_attention(*leaves[:3], position=used)
        grads = torch.autograd.grad(out, leaves, grad.to(out))
        found.append([x.cpu() for x in (out.detach(), *grads)])
    for results in zip(*found, strict=True):
        assert_as_accurate(*results)


def test_backend_of_tells_what_a_call_would_do():
    q = torch.randn(2, 3, 4, 72)
    assert backend_of(q) == ("cpu", "q is on device 'cpu'")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit_kernels.attention.dispatch.choose_backend", record(seen))
        backend_of(q)
        backend_of(q.requires_grad_(), lengths=torch.ones(2))
        backend_of(q.detach(), position=DenseBias(q))
        backend_of(q.detach(), position=RelativeKey(q[0, 0].detach().requires_grad_(), 1))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            backend_of(q, position=BucketedBias(q[0, 0], 5))
    names = ("dtype", "has_lengths", "has_position", "has_offsets", "trains")
    assert [tuple(call[name] for name in names) for call in seen] == [
        (torch.float32, False, False, False, False),
        (torch.float32, True, False, False, True),
        (torch.float32, False, True, False, True),
        (torch.float32, False, True, True, True),
        (torch.bfloat16, False, True, True, False),
    ]


def record(calls):
    def choose(device_type, capability, dtype, head_dim, **options):
        calls.append({"dtype": dtype} | options)

    return choose


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
    monkeypatch.setattr(op, "backend_of", lambda *_, **__: Backend("flash_attn", ""))
    q, k, v = torch.randn(3, 2, 4, 7, 16)
    out = op.flash_attention(q, k, v, window=window, scale=0.5, dropout_p=0.1)
    sides = (-1, -1) if window is None else (3, 3)
    assert calls == [((2, 7, 4, 16), 0.1, 0.5, False, sides)]
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [None, (11, 4, 0)], ids=["full", "ragged"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("name", [None, "dense", "bucketed", "relative-key", "transformer-xl"])
def test_pytorchs_attention_where_no_kernel_serves(name, window, lengths, dtype, monkeypatch):
    B, H, T, D = 3, 2, 11, 16
    grad, *heads = make_inputs(B, H, T, D, dtype, "cpu")
    position = name and make_position(name, B, H, T, D, dtype, "cpu")
    fields = vars(position) if name else {}
    lengths, found = lengths and torch.tensor(lengths), []
    for served, to in (("sdpa", dtype), ("cpu", dtype), ("cpu", torch.float64)):
        leaves = [x.to(to, copy=True).requires_grad_() for x in heads]
        values = {
            key: x.to(to, copy=True).requires_grad_() if isinstance(x, torch.Tensor) else x
            for key, x in fields.items()
        }
        leaves += [x for x in values.values() if isinstance(x, torch.Tensor)]
        used = type(position)(**values) if name else None
        monkeypatch.setattr(op, "backend_of", lambda *_, n=served, **__: Backend(n, ""))
        out = op.flash_attention(*leaves[:3], lengths=lengths, window=window, position=used)
        assert out.transpose(1, 2).is_contiguous()
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))])
    for results in zip(*found, strict=True):
        assert_as_accurate(*results)
    if lengths is not None:
        assert (found[0][0][1, :, 4:] == 0).all()
        assert (found[0][0][2] == 0).all()


def test_pytorchs_attention_gets_no_row_without_a_key(monkeypatch):
    """What it makes of such a row differs between its kernels."""
    seen, plain = [], F.scaled_dot_product_attention

    def spy(q, k, v, mask, *args, **options):
        seen.append(mask)
        return plain(q, k, v, mask, *args, **options)

    monkeypatch.setattr(op, "backend_of", lambda *_, **__: Backend("sdpa", ""))
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q = torch.randn(3, 2, 9, 8)
    op.flash_attention(q, q, q, lengths=torch.tensor([9, 2, 0]), window=3)
    assert (seen[0] == 0).any(-1).all()
    assert (seen[0] != 0).any()


def test_pytorchs_attention_drops_weights(monkeypatch):
    monkeypatch.setattr(op, "backend_of", lambda *_, **__: Backend("sdpa", ""))
    q, k, v, _ = make_inputs(1, 2, 400, 8, torch.float32, "cpu")
    out = op.flash_attention(q * 0, k, v * 0 + 1, dropout_p=0.25)
    assert out.mean().sub(1).abs() < 0.02
    assert out.std() > 0.005


@pytest.mark.parametrize("name", ["sdpa", "triton_dense"])
def test_packed_utterances_need_kernels(name, monkeypatch):
    monkeypatch.setattr(op, "backend_of", lambda *_, **__: Backend(name, "a reason"))
    q, starts = torch.zeros(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="such packed utterances: a reason"):
        flash_attention_packed(q, q, q, starts, 5)
