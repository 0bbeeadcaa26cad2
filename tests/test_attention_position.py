"""Position schemes of flash_attention: kernels, gradients, what each scheme means, errors.

Dimension key: B batch, H heads, T frames, D head dimension, R largest offset of a table.
"""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_kernels.attention import (
    BucketedBias,
    RelativeKey,
    TransformerXL,
    flash_attention,
    flash_attention_reference,
)
from lowbit_kernels.attention.backward_kernel import flash_attention_backward_triton
from lowbit_kernels.attention.forward_kernel import flash_attention_triton
from lowbit_kernels.attention.position import Scheme, resolve
from lowbit_kernels.testing import assert_as_accurate
from tests.interpreter_memory import round_products_alike
from tests.test_attention import DTYPES, make_inputs, make_lengths

SHAPES = [  # B, H, T, D, lengths, window, R
    pytest.param(1, 2, 64, 24, None, None, 63, id="whole-tiles"),
    pytest.param(2, 2, 70, 36, (70, 33), None, 69, id="ragged"),
    pytest.param(1, 2, 17, 16, None, None, 16, id="one-query-in-a-tile"),
    pytest.param(3, 1, 37, 16, (37, 0, 1), None, 50, id="length-0-and-1"),
    pytest.param(1, 3, 5, 81, None, None, 4, id="odd-head"),
    pytest.param(1, 2, 101, 17, (97,), 7, 7, id="window"),
    pytest.param(1, 1, 100, 16, (97,), 35, 35, id="window-of-whole-tiles"),
    pytest.param(1, 1, 30, 16, (28,), 5, 29, id="window-in-a-longer-table"),
    pytest.param(
        8, 8, 499, 64, (499, 1, 0, 400, 64, 65, 128, 498), None, 498,
        id="conformer", marks=pytest.mark.gpu,
    ),
    pytest.param(2, 4, 1501, 81, (1501, 800), 256, 256, id="window-30s", marks=pytest.mark.gpu),
]  # fmt: skip
KINDS = ["offset", "gated", "relative", "shared"]


@pytest.fixture(autouse=True)
def _products(monkeypatch):
    """numpy's fp32 sums err differently on each processor, at times twice as much as PyTorch's."""
    round_products_alike(monkeypatch)


def make_scheme(kind, B, H, T, D, R, dtype, device):
    if kind in ("offset", "gated"):
        gate = torch.randn(B, H, T, dtype=dtype, device=device) if kind == "gated" else None
        return Scheme("offset", torch.randn(H, 2 * R + 1, device=device), gate)
    keys = torch.randn(1 if kind == "shared" else H, 2 * R + 1, D, dtype=dtype, device=device)
    rows = torch.randn(B, T, H, D, dtype=dtype, device=device).transpose(1, 2)
    return Scheme("relative", keys, rows)


def kernels(q, k, v, grad, lengths, scheme, window, scale, seed=None, dropout_p=0.0):
    """The output and the gradients of q, k, v, table and rows, by the Triton kernels."""
    out, lse = flash_attention_triton(q, k, v, lengths, scheme, seed, window, scale, dropout_p)
    *grads, drows = flash_attention_backward_triton(
        grad, q, k, v, out, lse, lengths, scheme, seed, window, scale, dropout_p, True
    )
    return [out, *grads] if scheme.rows is None else [out, *grads, drows]


def reference(q, k, v, grad, lengths, scheme, window, scale, keep=None, dtype=None):
    """The same by autograd of everything materialized, in ``dtype``."""
    leaves = [
        x.detach().to(dtype or x.dtype).requires_grad_()
        for x in (q, k, v, scheme.table, scheme.rows)
        if x is not None
    ]
    bias = Scheme(scheme.kind, *leaves[3:]).scores(q.shape[2], scale)
    out, _ = flash_attention_reference(*leaves[:3], lengths, bias, window, scale, keep)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(actual, *arguments):
    low, high = reference(*arguments), reference(*arguments, dtype=torch.float64)
    names = ("out", "dq", "dk", "dv", "dtable", "drows")
    for name, *tensors in zip(names, actual, low, high, strict=False):
        assert_as_accurate(*tensors, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "H", "T", "D", "lengths", "window", "R"), SHAPES)
def test_kernels_are_as_accurate_as_torch(B, H, T, D, lengths, window, R, kind, dtype, device):
    tensors = make_inputs(B, H, T, D, dtype, device)
    scheme = make_scheme(kind, B, H, T, D, R, dtype, device)
    arguments = (*tensors, make_lengths(lengths, device), scheme, window, D**-0.5)
    check(kernels(*arguments), *arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_has_one_mask_in_all_kernels(kind, device):
    B, H, T, D, dropout_p = 2, 2, 40, 64, 0.3
    q, k, v, grad = make_inputs(B, H, T, D, torch.float32, device)
    scheme = make_scheme(kind, B, H, T, D, 45, torch.float32, device)
    lengths, seed = torch.tensor([40, 23], device=device), torch.tensor([99], device=device)
    # identity values make the output the dropped probabilities themselves
    identity = torch.eye(T, D, device=device).expand(B, H, T, D)
    probs, _ = flash_attention_triton(q, k, identity, lengths, scheme, seed, None, 0.1, dropout_p)
    keep = (probs[..., :T] != 0) / (1 - dropout_p)
    arguments = (q, k, v, grad, lengths, scheme, None, 0.1)
    check(kernels(*arguments, seed, dropout_p), *arguments, keep)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_hold_anything_and_bits_repeat(kind, device):
    q, k, v, grad = make_inputs(2, 2, 40, 16, torch.float32, device)
    scheme = make_scheme(kind, 2, 2, 40, 16, 39, torch.float32, device)
    lengths = torch.tensor([17, 40], device=device)
    clean = kernels(q, k, v, grad, lengths, scheme, None, 0.25)
    for x in (q, k, v, grad, scheme.rows):
        if x is not None:
            x[0, :, 17:] = torch.nan
    for actual, expected in zip(
        kernels(q, k, v, grad, lengths, scheme, None, 0.25), clean, strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("score", [-200.0, 200.0])
def test_padding_adds_nothing_where_powers_overflow(score, device):
    """The scores of padding differ from those that the softmax is of by more than fp32 holds."""
    tensors = make_inputs(1, 1, 40, 16, torch.float32, device)
    scheme = Scheme("offset", torch.randn(1, 79, device=device) + score)
    padded = kernels(*tensors, torch.tensor([17], device=device), scheme, None, 0.25)
    alone = kernels(*(x[:, :, :17] for x in tensors), None, scheme, None, 0.25)
    for actual, expected in zip(padded[:4], alone[:4], strict=True):
        assert torch.equal(actual[:, :, :17], expected)
        assert (actual[:, :, 17:] == 0).all()
    assert torch.equal(padded[4], alone[4])


@pytest.mark.parametrize("kind", KINDS)
def test_strided_tables_and_rows(kind, device):
    tensors = make_inputs(2, 2, 20, 8, torch.float32, device)
    scheme = make_scheme(kind, 2, 2, 20, 8, 19, torch.float32, device)
    expected = kernels(*tensors, None, scheme, None, 0.5)
    rows = None if scheme.rows is None else scheme.rows.mT.contiguous().mT
    strided = Scheme(scheme.kind, scheme.table.mT.contiguous().mT, rows)
    for actual, wanted in zip(kernels(*tensors, None, strided, None, 0.5), expected, strict=True):
        assert torch.equal(actual, wanted)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that was made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.nbytes = max(self.nbytes, made.numel() * made.itemsize)
        return made


@pytest.mark.parametrize("kind", KINDS)
def test_no_kernel_is_given_the_scores_to_keep(kind, device):
    T = 90
    tensors = make_inputs(1, 1, T, 8, torch.float32, device)
    scheme = make_scheme(kind, 1, 1, T, 8, T - 1, torch.float32, device)
    with Largest() as largest:
        kernels(*tensors, None, scheme, None, 0.5)
    assert largest.nbytes <= 2 * T * 16 * 4  # of a table whose keys are padded to 16 features


def shifted(raw):
    """The relative shift of Transformer-XL, [B, H, T, 2 T - 1] to [B, H, T, T], by padding."""
    B, H, T, P = raw.shape
    padded = torch.nn.functional.pad(raw, (1, 0)).view(B, H, P + 1, T)
    return padded[:, :, 1:].view(B, H, T, P)[..., :T]


def transformer_xl(q, k, position, scale):
    u, v = position.content_bias[:, None], position.position_bias[:, None]
    return ((q + u) @ k.mT + shifted((q + v) @ position.keys.mT)) * scale


def relative_key(q, k, position, scale):
    frames = torch.arange(q.shape[2])
    right = position.table.shape[0] - 1 - position.left
    offsets = (frames - frames[:, None]).clamp(-position.left, right) + position.left
    return (q @ k.mT + torch.einsum("bhld,lrd->bhlr", q, position.table[offsets])) * scale


def bucketed(q, k, position, scale):
    scores, T, n = q @ k.mT * scale, q.shape[2], position.table.shape[0] // 2
    for query in range(T):
        for key in range(T):
            distance = abs(key - query)
            if distance >= n // 2:
                growth = math.log(distance / (n // 2)) / math.log(position.max_distance / (n // 2))
                distance = min(n - 1, n // 2 + int(growth * (n - n // 2)))
            bias = position.table[distance + n * (key > query)]
            gate = 1 if position.gate is None else position.gate[:, :, query]
            scores[:, :, query, key] += bias * gate
    return scores


B, H, T, D = 2, 3, 11, 8


def positions(dtype=torch.float64, device="cpu", grad=False, T=T):
    """Each scheme, the scores by its definition, and one more form."""

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, device=device, requires_grad=grad)

    return {
        "transformer-xl": (TransformerXL(randn(H, 2 * T - 1, D), randn(H, D), randn(H, D)),
                           transformer_xl),
        "relative-key": (RelativeKey(randn(7, D), 4), relative_key),
        "relative-key-long": (RelativeKey(randn(50, D), 30), relative_key),
        "bucketed": (BucketedBias(randn(8, H), 7), bucketed),
        "gated": (BucketedBias(randn(12, H), 9, randn(B, H, T)), bucketed),
    }  # fmt: skip


NAMES = list(positions())


def tensors_of(position):
    return [x for f in fields(position) if isinstance(x := getattr(position, f.name), torch.Tensor)]


def with_tensors(position, tensors):
    tensors = iter(tensors)
    names = [f.name for f in fields(position) if torch.is_tensor(getattr(position, f.name))]
    return replace(position, **{name: next(tensors) for name in names})


@pytest.mark.parametrize("name", NAMES)
def test_schemes_mean_what_their_models_compute(name):
    position, definition = positions()[name]
    q, k, v, _ = make_inputs(B, H, T, D, torch.float64, "cpu")
    expected = definition(q, k, position, D**-0.5).softmax(-1) @ v
    assert_as_accurate(flash_attention(q, k, v, position=position), expected, expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences(name, window):
    position, _ = positions(grad=True)[name]
    q, k, v, _ = make_inputs(B, H, T, D, torch.float64, "cpu")
    lengths = torch.tensor([T, 4])

    def run(q, k, v, *tensors):
        used = with_tensors(position, tensors)
        return flash_attention(q, k, v, lengths=lengths, window=window, position=used)

    leaves = [x.detach().requires_grad_() for x in (q, k, v)] + tensors_of(position)
    torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_op_is_as_accurate_as_torch(name, dtype, device):
    position, definition = positions(dtype, device, grad=True)[name]
    q, k, v, grad = make_inputs(B, H, T, D, dtype, device)
    found = []
    for wide in (None, dtype, torch.float64):
        leaves = [
            x.detach().to(wide or dtype).requires_grad_() for x in (q, k, v, *tensors_of(position))
        ]
        used = with_tensors(position, leaves[3:])
        if wide is None:
            out = flash_attention(*leaves[:3], position=used)
        elif device == "cpu":
            out = definition(leaves[0], leaves[1], used, D**-0.5).softmax(-1) @ leaves[2]
        else:  # the definitions make their indices on a CPU
            query, scheme = resolve(leaves[0], used, None).with_rows(leaves[0])
            bias = scheme.scores(T, D**-0.5)
            out, _ = flash_attention_reference(query, *leaves[1:3], None, bias, None, D**-0.5)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    for tensors in zip(*found, strict=True):
        assert_as_accurate(*tensors)


@pytest.mark.parametrize("name", NAMES)
def test_padded_batch_equals_single_utterances(name, device):
    position, _ = positions(torch.float32, device, grad=True, T=30)[name]
    q, k, v, grad = (x.requires_grad_() for x in make_inputs(B, H, 30, D, torch.float32, device))
    short = 17

    def gradients(q, k, v, grad, position, **options):
        out = flash_attention(q, k, v, position=position, **options)
        return out, torch.autograd.grad(out, (q, k, v), grad)

    lengths = torch.tensor([30, short], device=device)
    out, grads = gradients(q, k, v, grad, position, lengths=lengths)
    alone = [x[1:, :, :short].detach().requires_grad_() for x in (q, k, v, grad)]
    cut = position
    if isinstance(position, BucketedBias) and position.gate is not None:
        cut = replace(position, gate=position.gate[1:, :, :short])
    single, single_grads = gradients(*alone, cut)
    wide = with_tensors(cut, [x.double() for x in tensors_of(cut)])
    exact, exact_grads = gradients(*(x.double() for x in alone), wide)
    assert_as_accurate(out[1:, :, :short], single, exact)
    for found, low, high in zip(grads, single_grads, exact_grads, strict=True):
        assert_as_accurate(found[1:, :, :short], low, high)
        assert (found[1, :, short:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_op_is_registered_correctly(kind, device):
    q, k, v, grad = make_inputs(2, 2, 10, 16, torch.float32, device)
    scheme = make_scheme(kind, 2, 2, 10, 16, 12, torch.float32, device)
    lengths, op = torch.tensor([10, 4], device=device), torch.ops.lowbit.flash_attention.default
    rows = None if scheme.rows is None else scheme.rows.requires_grad_()
    options = (lengths, scheme.kind, scheme.table.requires_grad_(), rows, None, 3, 0.2, 0.0)
    torch.library.opcheck(op, (q.requires_grad_(), k, v, *options))
    options = [x.detach() if isinstance(x, torch.Tensor) else x for x in options]
    q = q.detach()
    out, lse = op(q, k, v, *options)
    for needs_table in (False, True):
        torch.library.opcheck(
            torch.ops.lowbit.flash_attention_backward.default,
            (grad, q, k, v, out, lse, *options, needs_table),
        )


@pytest.mark.parametrize("name", NAMES)
def test_compiles_to_one_graph_for_three_lengths(name, device):
    counter = CompileCounter()
    compiled = torch.compile(flash_attention, fullgraph=True, dynamic=True, backend=counter)
    for T in (9, 10, 13):  # none is another size, which a graph would take for the same
        position, _ = positions(torch.float32, device, T=T)[name]
        q, k, v, grad = make_inputs(B, H, T, D, torch.float32, device)
        q.requires_grad_()
        out = compiled(q, k, v, position=position)
        out.backward(grad)
        assert torch.equal(out, flash_attention(q, k, v, position=position))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_the_scheme(name, device):
    position, _ = positions(torch.float32, device, grad=True)[name]
    q, k, v, _ = make_inputs(B, H, T, D, torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = flash_attention(q, k, v, position=position)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(x.grad.dtype == torch.float32 for x in tensors_of(position))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
def test_empty_batches_work(shape, device):
    q = torch.randn(shape, device=device, requires_grad=True)
    keys = torch.randn(2, 9, 8, device=device, requires_grad=True)
    bias = torch.randn(2, 8, device=device)
    flash_attention(q, q, q, position=TransformerXL(keys, bias, bias)).sum().backward()
    assert q.grad.shape == shape
    assert (keys.grad == 0).all()


X = torch.zeros(2, 3, 5, 8)
KEYS, BIAS = torch.zeros(3, 9, 8), torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("position", "options", "message"),
    [
        (BucketedBias(torch.ones(8, 2), 9), {}, r"table must be \[buckets, H\] = \['any', 3\]"),
        (BucketedBias(torch.ones(7, 3), 9), {}, "an even number >= 4 rows, got 7"),
        (BucketedBias(torch.ones(8, 3), 2), {}, "above a quarter of 8 buckets, got 2"),
        (BucketedBias(torch.ones(8, 3).int(), 9), {}, "table must be floating point on cpu"),
        (BucketedBias(torch.ones(8, 3), 9, X), {}, r"gate must be \[B, H, T\] = \[2, 3, 5\]"),
        (RelativeKey(torch.ones(7, 9), 3), {}, r"table must be \[positions, D\] = \['any', 8\]"),
        (RelativeKey(torch.ones(7, 8), 7), {}, "position.left must be 0 to 6, got 7"),
        (RelativeKey(torch.ones(7, 8).half(), 3), {}, "must be torch.float32 as q on cpu, got"),
        (TransformerXL(KEYS[:2], BIAS, BIAS), {}, r"keys must be \[H or 1, 2 R \+ 1, D\] = \[3"),
        (TransformerXL(KEYS, BIAS[:2], BIAS), {}, r"content_bias must be \[H, D\] = \[3, 8\]"),
        (TransformerXL(KEYS, BIAS, BIAS[:, :4]), {}, r"position_bias must be \[H, D\] = \[3, 8\]"),
        (TransformerXL(KEYS[:, :8], BIAS, BIAS), {}, r"R >= 4 \(T - 1, or the window\), got 8"),
        (TransformerXL(KEYS[:, :7], BIAS, BIAS), {}, r"R >= 4 \(T - 1, or the window\), got 7"),
        (TransformerXL(KEYS[:, :3], BIAS, BIAS), {"window": 2}, r"R >= 2 \(T - 1, or .* got 3"),
    ],
)
def test_wrong_positions_are_named(position, options, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(X, X, X, position=position, **options)
