"""flash_attention_packed: what each utterance alone gives, in kernels and op; errors.

Dimension key: B utterances, H heads, D head dimension, R largest offset of a table; total the
frames of all utterances.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lowbit_kernels.attention import (
    BucketedBias,
    DenseBias,
    RelativeKey,
    TransformerXL,
    backend_of,
    flash_attention,
    flash_attention_packed,
)
from lowbit_kernels.attention.backward_kernel import flash_attention_backward_triton
from lowbit_kernels.attention.forward_kernel import flash_attention_triton
from lowbit_kernels.attention.position import Scheme, resolve
from lowbit_kernels.testing import assert_as_accurate
from tests.test_attention import DTYPES
from tests.test_attention_position import make_scheme, tensors_of, with_tensors
from tests.test_attention_position import reference as materialized

SHAPES = [  # frames of each utterance, H, D, window, max_seqlen
    pytest.param((35, 0, 1, 66), 2, 16, None, 66, id="empty-and-1"),
    pytest.param((64, 64), 1, 16, None, 64, id="whole-tiles"),
    pytest.param((5, 33), 3, 36, None, 50, id="odd-head-and-room"),
    pytest.param((17, 70), 1, 17, 9, 70, id="window"),
    pytest.param((3, 100), 1, 16, 35, 100, id="window-of-whole-tiles"),
    pytest.param(
        (499, 1, 0, 400, 64, 65, 128, 498), 8, 64, None, 499, id="base", marks=pytest.mark.gpu
    ),
]
KINDS = [None, "offset", "gated", "relative", "shared"]


def starts_of(counts, device):
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


def slices(counts):
    return [slice(*ends) for ends in pairwise(starts_of(counts, "cpu").tolist())]


def make_heads(counts, H, D, dtype, device):
    """q, k and v in one tensor, as views [1, H, total, D], and the gradient of the output."""
    joined = torch.randn(sum(counts), 3, H, D, dtype=dtype, device=device)
    grad = torch.randn(sum(counts), H, D, dtype=dtype, device=device)
    return [x.transpose(0, 1)[None] for x in (*joined.unbind(1), grad)]


def kernels(q, k, v, grad, counts, longest, scheme, window, scale, seed=None, dropout_p=0.0):
    """The output and the gradients of q, k, v, table and rows, by the Triton kernels."""
    starts = starts_of(counts, q.device)
    options = (starts, scheme, seed, window, scale, dropout_p)
    out, lse = flash_attention_triton(q, k, v, *options, longest=longest)
    gradients = flash_attention_backward_triton(
        grad, q, k, v, out, lse, *options, True, longest=longest
    )
    found = [out, *gradients[:3]]
    if scheme is not None:
        found += [gradients[3]] if scheme.rows is None else gradients[3:]
    return found


def each_alone(q, k, v, grad, counts, scheme, window, scale, keep=None, dtype=None):
    """The same, utterance by utterance, with everything materialized."""
    found = []
    for i, at in enumerate(slices(counts)):
        if at.stop > at.start:
            T = at.stop - at.start
            used = Scheme("dense", q.new_zeros(1, 1, T, T)) if scheme is None else scheme.at(at)
            heads = (x[:, :, at] for x in (q, k, v, grad))
            mask = None if keep is None else keep[i : i + 1, :, :T, :T]
            found.append(materialized(*heads, None, used, window, scale, mask, dtype))
    parts = [torch.cat(frames, 2) for frames in list(zip(*found, strict=True))[:4]]
    of_scheme = list(zip(*found, strict=True))[4:]
    if scheme is not None:
        parts.append(torch.stack(of_scheme[0]).sum(0))
    if scheme is not None and scheme.rows is not None:
        parts.append(torch.cat(of_scheme[1], 2))
    return parts


def check(actual, arguments, keep=None):
    low, high = (each_alone(*arguments, keep, dtype) for dtype in (None, torch.float64))
    names = ("out", "dq", "dk", "dv", "dtable", "drows")
    for name, *tensors in zip(names, actual, low, high, strict=False):
        assert_as_accurate(*tensors, name)


def make_packed(kind, counts, H, D, R, dtype, device):
    if kind is None:
        return None
    scheme = make_scheme(kind, 1, H, sum(counts), D, R, dtype, device)
    if kind == "gated":
        gate = torch.randn(sum(counts), H, dtype=dtype, device=device)
        scheme = replace(scheme, rows=gate.t()[None])
    return scheme


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("counts", "H", "D", "window", "longest"), SHAPES)
def test_kernels_are_as_accurate_as_torch(counts, H, D, window, longest, kind, dtype, device):
    heads = make_heads(counts, H, D, dtype, device)
    R = longest - 1 if window is None else window
    scheme = make_packed(kind, counts, H, D, R, dtype, device)
    actual = kernels(*heads, counts, longest, scheme, window, D**-0.5)
    for at in slices(counts):
        # the same tiles, so the same bits; tables get a sum over the utterances
        alone = [x[:, :, at] for x in heads]
        used = None if scheme is None else scheme.at(at)
        T = at.stop - at.start
        expected = kernels(*alone, (T,), T, used, window, D**-0.5)
        for whole, part in zip(actual[:4], expected, strict=False):
            assert torch.equal(whole[:, :, at], part)
    if dtype != torch.float32:
        check(actual, (*heads, counts, scheme, window, D**-0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_has_one_mask_in_all_kernels(kind, device):
    counts, H, D, dropout_p = (40, 0, 23), 2, 64, 0.3
    q, k, v, grad = make_heads(counts, H, D, torch.float32, device)
    scheme = make_packed(kind, counts, H, D, 39, torch.float32, device)
    seed = torch.tensor([99], device=device)
    # identity values make the output the dropped probabilities themselves
    identity = torch.cat([torch.eye(T, D, device=device) for T in counts]).expand_as(q)
    probs, _ = flash_attention_triton(
        q, k, identity, starts_of(counts, device), scheme, seed, None, 0.1, dropout_p, longest=40
    )
    keep = torch.zeros(3, H, 40, 40, device=device)
    for i, at in enumerate(slices(counts)):
        T = at.stop - at.start
        keep[i, :, :T, :T] = (probs[0, :, at, :T] != 0) / (1 - dropout_p)
    actual = kernels(q, k, v, grad, counts, 40, scheme, None, 0.1, seed, dropout_p)
    check(actual, (q, k, v, grad, counts, scheme, None, 0.1), keep)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_return_the_same_bits_every_time(kind, device):
    counts = (33, 2)
    heads = make_heads(counts, 2, 16, torch.float32, device)
    scheme = make_packed(kind, counts, 2, 16, 32, torch.float32, device)
    runs = [kernels(*heads, counts, 33, scheme, None, 0.25) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", [None, "gated", "relative"])
def test_kernels_write_no_frame_of_another_utterance(kind, device):
    """A frame that no utterance claims stays as the memory was, which tests fill with NaN."""
    heads = make_heads((40,), 2, 16, torch.float32, device)
    scheme = make_packed(kind, (40,), 2, 16, 39, torch.float32, device)
    out, dq, dk, dv, *rest = kernels(*heads, (17,), 40, scheme, None, 0.25)
    for x in (out, dq, dk, dv, *rest[1:]):
        assert x[:, :, :17].isfinite().all()
        assert x[:, :, 17:].isnan().all()


COUNTS, H, D = (7, 0, 13, 1), 2, 8
TOTAL = sum(COUNTS)


def positions(dtype=torch.float32, device="cpu", grad=False):
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, device=device, requires_grad=grad)

    return {
        "none": None,
        "relative-key": RelativeKey(randn(7, D), 4),
        "bucketed": BucketedBias(randn(8, H), 7),
        "gated": BucketedBias(randn(8, H), 7, randn(TOTAL, H)),
        "transformer-xl": TransformerXL(randn(H, 25, D), randn(H, D), randn(H, D)),
    }


def of_utterance(position, at):
    """The position, for one utterance in ``flash_attention``."""
    if isinstance(position, BucketedBias) and position.gate is not None:
        return replace(position, gate=position.gate[at].t()[None])
    return position


def one_by_one(q, k, v, position, **options):
    parts = [
        flash_attention(
            *(x[at].transpose(0, 1)[None] for x in (q, k, v)),
            position=of_utterance(position, at), **options,
        )[0].transpose(0, 1)
        for at in slices(COUNTS)
    ]  # fmt: skip
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", positions())
def test_packed_equals_each_utterance_alone(name, dtype, window, device):
    position = positions(dtype, device, grad=True)[name]
    tensors = [] if position is None else tensors_of(position)
    qkv = torch.randn(TOTAL, 3, H, D, dtype=dtype, device=device)
    grad = torch.randn(TOTAL, H, D, dtype=dtype, device=device)
    starts = starts_of(COUNTS, device)
    found = []
    for wide in (None, dtype, torch.float64):
        leaves = [x.detach().to(wide or dtype).requires_grad_() for x in (qkv, *tensors)]
        used = None if position is None else with_tensors(position, leaves[1:])
        heads = leaves[0].unbind(1)
        if wide is None:
            out = flash_attention_packed(*heads, starts, 13, position=used, window=window)
            assert out.is_contiguous()
        else:
            cpu = wide == torch.float64 and device != "cpu"  # fp64 is served on a CPU alone
            heads, used = (moved(heads, "cpu"), moved_position(used)) if cpu else (heads, used)
            out = one_by_one(*heads, used, window=window)
        gradients = torch.autograd.grad(out, leaves, grad.to(out))
        found.append([x.detach().to(device) for x in (out, *gradients)])
    for tensors in zip(*found, strict=True):
        assert_as_accurate(*tensors)


def moved(tensors, device):
    return [x.to(device) for x in tensors]


def moved_position(position):
    return position and with_tensors(position, moved(tensors_of(position), "cpu"))


@pytest.mark.parametrize("name", positions())
def test_inference_takes_the_same_bits(name, device):
    position = positions(device=device, grad=True)[name]
    q, k, v = torch.randn(TOTAL, 3, H, D, device=device, requires_grad=True).unbind(1)
    arguments = (q, k, v, starts_of(COUNTS, device), 13)
    out = flash_attention_packed(*arguments, position=position)
    with torch.no_grad():
        assert torch.equal(flash_attention_packed(*arguments, position=position), out)


def test_dropout_repeats_with_the_generator_and_spares_no_utterance(device):
    q = torch.zeros(80, 1, 64, device=device)
    v = torch.eye(40, 64, device=device).repeat(2, 1)[:, None]
    starts = torch.tensor([0, 40, 80], dtype=torch.int32, device=device)
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(flash_attention_packed(q, q, v, starts, 40, dropout_p=0.25))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    first, second = (runs[0][at, 0, :40] == 0 for at in (slice(40), slice(40, 80)))
    assert not torch.equal(first, second)
    for dropped in (first, second):
        # four standard deviations of a binomial share
        assert abs(dropped.float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 1600) ** 0.5


@pytest.mark.parametrize("name", ["none", "gated", "transformer-xl"])
def test_op_is_registered_correctly(name, device):
    position = positions(device=device)[name]
    if name == "gated":
        position = replace(position, gate=position.gate.t()[None])
    q, k, v, grad = make_heads(COUNTS, H, D, torch.float32, device)
    scheme = resolve(q, position, 12)
    if scheme is not None:
        q, scheme = scheme.with_rows(q)
    of_scheme = (None,) * 3 if scheme is None else (scheme.kind, scheme.table, scheme.rows)
    options = (starts_of(COUNTS, device), *of_scheme, torch.tensor([3], device=device), 5, 0.2, 0.1)
    op = torch.ops.lowbit.flash_attention.default
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(op, (*leaves, *options, None, None, None, None, 13))
    out, lse = op(q, k, v, *options, None, None, None, None, 13)
    torch.library.opcheck(
        torch.ops.lowbit.flash_attention_backward.default,
        (grad, q, k, v, out, lse, *options, True, 13),
    )


@pytest.mark.parametrize("name", positions())
def test_compiles_to_one_graph_for_three_batches(name, device):
    counter = CompileCounter()
    compiled = torch.compile(flash_attention_packed, fullgraph=True, dynamic=True, backend=counter)
    for counts in ((3, 4, 11), (7, 9), (5, 6, 10, 12)):  # none is another size
        position = positions(device=device)[name]
        if name == "gated":
            position = replace(position, gate=torch.randn(sum(counts), H, device=device))
        q, k, v = torch.randn(sum(counts), 3, H, D, device=device, requires_grad=True).unbind(1)
        starts = starts_of(counts, device)
        out = compiled(q, k, v, starts, max(counts), position=position)
        out.sum().backward()
        expected = flash_attention_packed(q, k, v, starts, max(counts), position=position)
        assert torch.equal(out, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("counts", [(), (0,), (0, 0)])
def test_no_frames_work(counts, device):
    q = torch.randn(0, 2, 8, device=device, requires_grad=True)
    table = torch.randn(7, 8, device=device, requires_grad=True)
    position = RelativeKey(table, 3)
    out = flash_attention_packed(q, q, q, starts_of(counts, device), 0, position=position)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 2, 8)
    assert (table.grad == 0).all()


def test_autocast_casts_the_inputs(device):
    q = torch.randn(5, 2, 8, device=device)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert flash_attention_packed(q, q, q, starts, 3).dtype == torch.bfloat16


def test_fp32_gradients_of_large_heads_with_offsets_are_not_served(monkeypatch):
    backend = backend_of(torch.zeros(1, 1, 2, 2))._replace(name="triton_dense", reason="so it is")
    monkeypatch.setattr("lowbit_kernels.attention.op.backend_of", lambda *_, **__: backend)
    q = torch.zeros(5, 2, 128, requires_grad=True)
    starts, position = torch.tensor([0, 5], dtype=torch.int32), RelativeKey(torch.zeros(3, 128), 1)
    with pytest.raises(NotImplementedError, match=r"such packed utterances: so it is"):
        flash_attention_packed(q, q, q, starts, 5, position=position)


X = torch.zeros(10, 3, 8)


def cu_seqlens(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


GOOD = cu_seqlens(0, 4, 10)
KEYS, BIAS = torch.zeros(3, 9, 8), torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], X, X, GOOD, 6), {}, r"q must be \[total, H, D\], got shape \[3, 8\]"),
        ((X, X[:9], X, GOOD, 6), {}, r"k must have q's shape \[10, 3, 8\], got \[9, 3, 8\]"),
        ((X, X, X.half(), GOOD, 6), {}, "v must have q's dtype and device"),
        ((X, X, X, [0, 4, 10], 6), {}, "cu_seqlens must be an int32 tensor, got list"),
        ((X, X, X, GOOD.long(), 6), {}, "cu_seqlens must be an int32 tensor, got torch.int64"),
        ((X, X, X, GOOD[None], 6), {}, r"cu_seqlens must be \[B \+ 1\] on cpu, got \[1, 3\]"),
        ((X, X, X, GOOD[:0], 6), {}, r"cu_seqlens must be \[B \+ 1\] on cpu, got \[0\]"),
        ((X, X, X, GOOD.to("meta"), 6), {}, r"cu_seqlens must be .* got \[3\] on meta"),
        ((X, X, X, GOOD, 6.0), {}, r"max_seqlen must be an int >= 0 \(frames\), got 6.0"),
        ((X, X, X, GOOD, True), {}, "max_seqlen must be an int >= 0 .* got True"),
        ((X, X, X, GOOD, -1), {}, "max_seqlen must be an int >= 0 .* got -1"),
        ((X, X, X, GOOD, torch.tensor(6)), {}, r"max_seqlen must be an int .* got tensor\(6\)"),
        ((X, X, X, GOOD, 4), {}, "max_seqlen must hold q's 10 frames in 2 utterances, got 4"),
        ((X, X, X, GOOD, 5), {}, "max_seqlen must be at least the longest 6, got 5"),
        ((X, X, X, cu_seqlens(1, 4, 10), 9), {}, r"from 0 to the 10 frames of q, got \[1, 4, 10"),
        ((X, X, X, cu_seqlens(0, 4, 9), 9), {}, r"from 0 to the 10 frames of q, got \[0, 4, 9\]"),
        ((X, X, X, cu_seqlens(0, 12, 10), 12), {}, r"must rise from 0 to .* got \[0, 12, 10\]"),
        ((X, X, X, GOOD, 6), {"window": -1}, "window must be an int >= 0"),
        ((X, X, X, GOOD, 6), {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ((X, X, X, GOOD, 6), {"position": DenseBias(X)}, "a bias of their own is served by flash"),
        (
            (X, X, X, GOOD, 6), {"position": BucketedBias(torch.ones(8, 3), 9, X[..., 0].t())},
            r"position.gate must be \[total, H\] = \[10, 3\], got \[3, 10\]",
        ),
        (
            (X, X, X, GOOD, 6), {"position": TransformerXL(KEYS, BIAS, BIAS)},
            r"R >= 5 \(T - 1, or the window\), got 9",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        flash_attention_packed(*arguments, **options)
