"""block_attention: against PyTorch's attention with a mask of blocks.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from lowbit_kernels.attention import (
    BucketedBias,
    DenseBias,
    RelativeKey,
    TransformerXL,
    block_attention,
    flash_attention_reference,
)
from lowbit_kernels.attention.position import resolve
from lowbit_kernels.testing import assert_as_accurate
from tests.test_attention import DTYPES, make_inputs, make_lengths

SHAPES = [  # T, block, lengths
    pytest.param(12, 4, None, id="whole"),
    pytest.param(11, 4, None, id="ragged"),
    pytest.param(12, 4, (12, 7), id="lengths"),
    pytest.param(13, 5, (0, 99), id="ragged-lengths"),
    pytest.param(21, 24, (21, 2), id="one-short-block"),
    pytest.param(6, 1, (6, 3), id="one-frame-each"),
    pytest.param(999, 50, (999, 501), id="20s", marks=pytest.mark.gpu),
]
NAMES = ["none", "gated", "relative-key", "transformer-xl"]
B, H, D = 2, 3, 8


def make_position(name, T, block, dtype, device):
    def randn(*shape):
        return torch.randn(shape, dtype=dtype, device=device)

    return {
        "none": lambda: None,
        "gated": lambda: BucketedBias(randn(8, H), 7, randn(B, H, T)),
        "relative-key": lambda: RelativeKey(randn(7, D), 4),
        "transformer-xl": lambda: TransformerXL(
            randn(H, 2 * min(T, block) - 1, D), randn(H, D), randn(H, D)
        ),
    }[name]()


def masked(q, k, v, block, lengths, position):
    """Everything materialized; by autograd."""
    T, bias = q.shape[2], None
    scheme = resolve(q, position, block - 1)
    if scheme is not None:
        q, scheme = scheme.with_rows(q)
        bias = scheme.scores(T, D**-0.5).to(q.dtype)
    frames = torch.arange(T, device=q.device) // block
    mask = torch.where(frames == frames[:, None], 0.0, -torch.inf).to(q.dtype)
    bias = mask[None, None] if bias is None else bias + mask
    return flash_attention_reference(q, k, v, lengths, bias, None, D**-0.5)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("T", "block", "lengths"), SHAPES)
def test_is_as_accurate_as_a_mask(T, block, lengths, name, dtype, device):
    q, k, v, grad = make_inputs(B, H, T, D, dtype, device)
    position, lengths = make_position(name, T, block, dtype, device), make_lengths(lengths, device)
    names = [n for n, x in vars(position).items() if torch.is_tensor(x)] if position else []
    tensors, found = [q, k, v, *(getattr(position, n) for n in names)], []
    for attend, wide in ((None, dtype), (masked, dtype), (masked, torch.float64)):
        leaves = [x.detach().to(wide).requires_grad_() for x in tensors]
        used = position and replace(position, **dict(zip(names, leaves[3:], strict=True)))
        if attend is None:
            out = block_attention(*leaves[:3], block=block, lengths=lengths, position=used)
        else:
            out = attend(*leaves[:3], block, lengths, used)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(wide))])
    for results in zip(*found, strict=True):
        assert_as_accurate(*results)


def test_equals_attention_of_each_block_alone(device):
    q, k, v, _ = make_inputs(B, H, 11, D, torch.float32, device)
    alone = [
        F.scaled_dot_product_attention(*(x[:, :, i : i + 4] for x in (q, k, v)))
        for i in range(0, 11, 4)
    ]
    exact = [
        F.scaled_dot_product_attention(*(x[:, :, i : i + 4].double() for x in (q, k, v)))
        for i in range(0, 11, 4)
    ]
    assert_as_accurate(
        block_attention(q, k, v, block=4), torch.cat(alone, 2), torch.cat(exact, 2)
    )  # fmt: skip


def test_no_block_sees_what_another_holds(device):
    q, k, v, _ = make_inputs(B, H, 11, D, torch.float32, device)
    clean = block_attention(q, k, v, block=4)
    for x in (q, k, v):
        x[:, :, 4:8] = torch.nan
    out = block_attention(q, k, v, block=4)
    assert torch.equal(out[:, :, :4], clean[:, :, :4])
    assert torch.equal(out[:, :, 8:], clean[:, :, 8:])


def test_heads_of_a_model_are_not_copied():
    q, k, v, _ = make_inputs(B, H, 12, D, torch.float32, "cpu")
    with torch.profiler.profile() as profile:
        out = block_attention(q, k, v, block=4)
    assert out.transpose(1, 2).is_contiguous()
    assert not {"aten::copy_", "aten::cat"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8), (2, 0, 5, 8)])
def test_empty_batches_work(shape, device):
    q = torch.randn(shape, device=device, requires_grad=True)
    lengths = torch.zeros(shape[0], dtype=torch.int32, device=device)
    out = block_attention(q, q, q, block=2, lengths=lengths)
    out.sum().backward()
    assert out.shape == q.grad.shape == shape


def test_compiles_to_one_graph_for_three_lengths(device):
    counter = CompileCounter()
    compiled = torch.compile(block_attention, fullgraph=True, dynamic=True, backend=counter)
    for T in (9, 10, 13):
        q, k, v, _ = make_inputs(B, H, T, D, torch.float32, device)
        assert torch.equal(compiled(q, k, v, block=4), block_attention(q, k, v, block=4))
    assert counter.frame_count == 1


X = torch.zeros(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, r"block must be an int >= 1 \(frames\), got 0"),
        ({"block": 2.5}, "block must be an int >= 1 .* got 2.5"),
        ({"block": 2, "position": DenseBias(X)}, "scheme of offsets, .* got DenseBias"),
        ({"block": 2, "position": X}, "position must be None, DenseBias, .* got Tensor"),
        ({"block": 2, "lengths": torch.tensor([5])}, r"lengths must be \[2\] on cpu, got \[1\]"),
        (
            {"block": 3, "position": TransformerXL(X[0, :, :3], X[0, :, 0], X[0, :, 0])},
            r"R >= 2 \(T - 1, or the window\), got 3",
        ),
        ({"block": 2, "position": BucketedBias(X[0, 0, :, :3][:4], 7, X[0])}, "gate must be"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        block_attention(X, X, X, **options)
