"""Attention where nothing needs a gradient: biases of queries and int8 results in the kernel.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from dataclasses import replace

import pytest
import torch

from lowbit_kernels.attention import (
    BucketedBias,
    DenseBias,
    RelativeKey,
    TransformerXL,
    attend_int8,
    flash_attention,
)
from lowbit_kernels.attention.forward_kernel import flash_attention_triton
from lowbit_kernels.attention.position import resolve
from lowbit_kernels.matmul.reference import quantize_rows
from tests.test_attention import DTYPES, make_inputs, make_lengths

SHAPES = [  # B, H, T, D, lengths, window
    pytest.param(2, 2, 40, 64, (40, 23), None, id="lengths"),
    pytest.param(1, 3, 5, 81, None, None, id="odd-head"),
    pytest.param(2, 2, 70, 20, (0, 69), 9, id="window"),
    pytest.param(
        4, 8, 499, 64, (499, 1, 0, 400), None, id="conformer", marks=pytest.mark.gpu
    ),
]  # fmt: skip
NAMES = ["none", "dense", "bucketed", "relative-key", "transformer-xl"]


def make_position(name, B, H, T, D, dtype, device, bias_dtype=None):
    def randn(*shape, dtype=dtype):
        return torch.randn(shape, dtype=dtype, device=device)

    return {
        "none": lambda: None,
        "dense": lambda: DenseBias(randn(1, H, T, T)),
        "bucketed": lambda: BucketedBias(randn(8, H), 7, randn(B, H, T)),
        "relative-key": lambda: RelativeKey(randn(7, D), 4),
        "transformer-xl": lambda: TransformerXL(
            randn(H, 2 * T - 1, D), *randn(2, H, D, dtype=bias_dtype or dtype)
        ),
    }[name]()


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["relative-key", "transformer-xl"])
@pytest.mark.parametrize(("B", "H", "T", "D", "lengths", "window"), SHAPES)
def test_kernel_adds_as_torch_does(B, H, T, D, lengths, window, name, dtype, bias_dtype, device):
    q, k, v, _ = make_inputs(B, H, T, D, dtype, device)
    scheme = resolve(q, make_position(name, B, H, T, D, dtype, device, bias_dtype), window)
    query, added = scheme.with_rows(q)
    assert added.rows is not None
    options = (None, window, 0.2, 0.0)
    lengths = make_lengths(lengths, device)
    expected = flash_attention_triton(query, k, v, lengths, added, *options)
    actual = flash_attention_triton(q, k, v, lengths, scheme, *options)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("positions", "left"), [(7, 4), (1, 0), (5, 0), (200, 90)])
@pytest.mark.parametrize(("B", "H", "T", "D", "lengths", "window"), SHAPES)
def test_kernel_clips_offsets(B, H, T, D, lengths, window, positions, left, dtype, device):
    q, k, v, _ = make_inputs(B, H, T, D, dtype, device)
    position = RelativeKey(torch.randn(positions, D, dtype=dtype, device=device), left)
    lengths, options = make_lengths(lengths, device), (None, window, 0.2, 0.0)
    compact, expanded = (resolve(q, position, window, compact=c) for c in (True, False))
    assert compact.table.shape == (1, positions, D)
    assert expanded.left is None
    expected = flash_attention_triton(q, k, v, lengths, expanded, *options)
    actual = flash_attention_triton(q, k, v, lengths, compact, *options)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("D", [64, 256])  # a table is expanded for the larger one
def test_clipped_offsets_without_a_gradient_are_the_same_bits(D, device):
    q, k, v, _ = make_inputs(2, 3, 23, D, torch.float32, device)
    position = RelativeKey(torch.randn(7, D, device=device, requires_grad=True), 4)
    expected = flash_attention(q, k, v, position=position, window=9)
    with torch.no_grad():
        assert torch.equal(flash_attention(q, k, v, position=position, window=9), expected)


def test_biases_may_be_strided(device):
    q, k, v, _ = make_inputs(1, 2, 9, 8, torch.float32, device)
    position = make_position("transformer-xl", 1, 2, 9, 8, torch.float32, device)
    strided = replace(
        position,
        content_bias=position.content_bias.mT.contiguous().mT,
        position_bias=position.position_bias[:, :1].expand(2, 8),
    )
    position = replace(position, position_bias=strided.position_bias.contiguous())
    outs = [
        flash_attention_triton(q, k, v, None, resolve(q, p, None), None, None, 0.2, 0.0)[0]
        for p in (position, strided)
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("leaf", ["q", "k", "content_bias", "position_bias", "keys"])
def test_gradients_take_the_other_path_to_the_same_bits(leaf, device):
    q, k, v, grad = make_inputs(2, 3, 11, 8, torch.float32, device)
    position = make_position("transformer-xl", 2, 3, 11, 8, torch.float32, device)
    expected = flash_attention(q, k, v, position=position)
    needs = {"q": q, "k": k}.get(leaf)
    needs = getattr(position, leaf) if needs is None else needs
    needs.requires_grad_()
    out = flash_attention(q, k, v, position=position)
    out.backward(grad)
    assert torch.equal(out, expected)
    assert needs.grad.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(flash_attention(q, k, v, position=position), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("B", "H", "T", "D", "lengths", "window"), SHAPES)
def test_kernel_quantizes_as_the_next_layer_would(
    B, H, T, D, lengths, window, name, dtype, device
):  # fmt: skip
    q, k, v, _ = make_inputs(B, H, T, D, dtype, device)
    position = make_position(name, B, H, T, D, dtype, device)
    inputs = (q, k, v, make_lengths(lengths, device), resolve(q, position, window))
    # some beyond 127 units, which are clamped
    out_scale = torch.tensor(0.01, device=device)
    out, _ = flash_attention_triton(*inputs, None, window, 0.3, 0.0)
    levels, _ = flash_attention_triton(*inputs, None, window, 0.3, 0.0, out_scale)
    expected = quantize_rows(out.reshape(-1, D), out_scale.expand(B * H * T)).view(out.shape)
    assert torch.equal(levels, expected)
    assert levels.abs().max() == 127
    assert levels.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_attend_int8_is_what_the_next_layer_would_make(name, dtype, device):
    B, H, T, D = 2, 3, 11, 20
    q, k, v, _ = make_inputs(B, H, T, D, dtype, device)
    options = {
        "position": make_position(name, B, H, T, D, dtype, device),
        "lengths": torch.tensor([11, 4], device=device),
        "window": 5,
        "scale": 0.3,
    }
    out_scale = torch.tensor(0.02, device=device)
    out = flash_attention(q, k, v, **options)
    expected = quantize_rows(out.reshape(-1, D), out_scale.expand(B * H * T)).view(out.shape)
    levels = attend_int8(q, k, v, out_scale, **options)
    assert torch.equal(levels, expected)
    assert levels.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
def test_empty_batches_work(shape, device):
    q, out_scale = torch.randn(shape, device=device), torch.tensor(0.1, device=device)
    levels = attend_int8(q, q, q, out_scale)
    assert levels.shape == shape
    assert levels.dtype == torch.int8


def test_op_is_registered_correctly(device):
    q, k, v, _ = make_inputs(2, 3, 11, 8, torch.float32, device)
    position = make_position("transformer-xl", 2, 3, 11, 8, torch.float32, device)
    biases = position.content_bias, position.position_bias
    torch.library.opcheck(
        torch.ops.lowbit.flash_attention.default,
        (q, k, v, None, "relative", position.keys, None, None, None, None, 0.0, *biases,
         torch.tensor(0.1, device=device)),
    )  # fmt: skip


def test_int8_compiles_to_one_graph(device):
    q, k, v, _ = make_inputs(2, 3, 11, 8, torch.float32, device)
    position = make_position("transformer-xl", 2, 3, 11, 8, torch.float32, device)
    scale = torch.tensor(0.02, device=device)
    compiled = torch.compile(attend_int8, fullgraph=True, dynamic=True, backend="eager")
    levels = compiled(q, k, v, scale, position=position)
    assert torch.equal(levels, attend_int8(q, k, v, scale, position=position))


X = torch.zeros(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("q", "out_scale", "message"),
    [
        (X, torch.ones(1), r"out_scale must be \[\], got \[1\]"),
        (X, torch.ones((), dtype=torch.float64), "out_scale must be torch.float32 on cpu"),
        (X.clone().requires_grad_(), torch.ones(()), "out_scale: an int8 result has no gradient"),
        (X[0], torch.ones(()), r"q must be \[B, H, T, D\]"),
    ],
)
def test_wrong_arguments_are_named(q, out_scale, message):
    with pytest.raises(ValueError, match=message):
        attend_int8(q, X, X, out_scale)
