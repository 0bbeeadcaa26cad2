"""low_bit_attention: kernels against the reference, registration, gradients, dropout, errors.

Dimension key: B batch, H heads, T frames, D head dimension, R largest offset of a table.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from lowbit_kernels.attention import BucketedBias, DenseBias, TransformerXL, low_bit_attention
from lowbit_kernels.attention.low_bit_kernel import (
    low_bit_attention_backward_triton,
    low_bit_attention_triton,
)
from lowbit_kernels.attention.low_bit_reference import (
    gradient_factor,
    low_bit_attention_backward_reference,
    low_bit_attention_reference,
)
from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.attention.reference import attention_probs
from lowbit_kernels.testing import assert_as_accurate
from tests.test_attention import DTYPES, make_inputs, make_lengths
from tests.test_attention_position import make_scheme

SHAPES = [  # B, H, T, D, lengths, window
    pytest.param(1, 2, 64, 64, None, None, id="whole-tiles"),
    pytest.param(2, 2, 70, 36, (70, 33), None, id="ragged"),
    pytest.param(3, 1, 37, 16, (37, 0, 1), None, id="length-0-and-1"),
    pytest.param(1, 3, 5, 81, None, None, id="odd-head"),
    pytest.param(1, 1, 101, 17, (97,), 7, id="window"),
    pytest.param(8, 12, 499, 64, (499, 1, 0, 400, 64, 65, 128, 498), None, id="wav2vec2-base",
                 marks=pytest.mark.gpu),
    pytest.param(2, 4, 1501, 81, (1501, 800), 256, id="window-30s", marks=pytest.mark.gpu),
]  # fmt: skip
KINDS = [None, "dense", "gated", "relative"]
# of the highest level: some probabilities are above it, most below
STEPS = {1: 0.1, 3: 0.03, 15: 0.01, 255: 0.0004}


def make_case(B, H, T, D, kind, high, dtype, device):
    tensors = make_inputs(B, H, T, D, dtype, device)
    if kind == "dense":
        scheme = Scheme("dense", torch.randn(B, H, T, T, dtype=dtype, device=device))
    else:
        scheme = kind and make_scheme(kind, B, H, T, D, T - 1, dtype, device)
    return tensors, scheme, torch.tensor(STEPS[high], device=device)


def kernels(tensors, scheme, step, high, lengths, window, scale, seed=None, dropout_p=0.0):
    """The output and the gradients of q, k, v, step, table and rows, by the Triton kernels."""
    q, k, v, grad = tensors
    options = (lengths, scheme, seed, window, scale, dropout_p, step, high)
    out, lse = low_bit_attention_triton(q, k, v, *options)
    (dq, dk, dv, dtable, drows), dstep = low_bit_attention_backward_triton(
        grad, q, k, v, lse, *options, True
    )
    of_scheme = [dtable] * (scheme is not None) + [drows] * (drows.numel() > 0)
    return [out, dq, dk, dv, dstep, *of_scheme]


def reference(tensors, scheme, step, high, lengths, window, scale, keep=None, dtype=None):
    """The same by autograd of everything materialized, in ``dtype``."""
    *heads, grad = tensors
    of_scheme = [] if scheme is None else [x for x in (scheme.table, scheme.rows) if x is not None]
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (*heads, step, *of_scheme)]
    bias = scheme and Scheme(scheme.kind, *leaves[4:]).scores(heads[0].shape[2], scale)
    out, _ = low_bit_attention_reference(
        *leaves[:3], lengths, bias, window, scale, leaves[3], high, keep
    )
    gradients = list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))
    gradients[3] = gradients[3] * gradient_factor(heads[0], high)
    return [out.detach(), *gradients]


def check(actual, *arguments, **options):
    low, high = (
        reference(*arguments, **options),
        reference(*arguments, **options, dtype=torch.double),
    )
    # a scalar of all scores, which fp16 arithmetic overflows; the kernels add in fp32
    low[4] = reference(*arguments, **options, dtype=torch.float32)[4]
    if arguments[3] == 255:
        # among so many levels some quotient lies between two to within its rounding: a level of
        # one probability may differ, in what has rounded ones
        (_, _, v, grad), _, step, *_ = arguments
        most = (grad.float() @ v.float().mT).abs().max() * gradient_factor(v, 255)
        for i, change in {0: step * v.abs().max(), 3: step * grad.abs().max(), 4: most}.items():
            low[i] = low[i] + change / 2
    names = ("out", "dq", "dk", "dv", "dstep", "dtable", "drows")
    size = size_of_terms(*arguments, **options)
    for name, *tensors in zip(names, actual, low, high, strict=False):
        if name == "dstep":  # a sum over both signs: what cancels was rounded, too
            tensors = [torch.stack([x, size.to(x.dtype)]) for x in tensors]
        assert_as_accurate(*tensors, name)


def size_of_terms(tensors, scheme, step, high, lengths, window, scale, keep=None):
    """The sum of the magnitudes of what the gradient of the step adds up."""
    q, k, v, grad = (x.double() for x in tensors)
    bias = scheme and scheme.to(torch.double).scores(q.shape[2], scale)
    probs, _ = attention_probs(q, k, lengths, bias, window, scale)
    level = (probs / step).clamp(max=high).round()
    slope = torch.where(probs <= high * step, level - probs / step, level)
    terms = (grad @ v.mT) * slope * (1 if keep is None else keep)
    return terms.abs().sum() * gradient_factor(q, high)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("high", STEPS)
@pytest.mark.parametrize(("B", "H", "T", "D", "lengths", "window"), SHAPES)
def test_kernels_are_as_accurate_as_torch(B, H, T, D, lengths, window, high, dtype, device):
    case = make_case(B, H, T, D, None, high, dtype, device)
    arguments = (*case, high, make_lengths(lengths, device), window, D**-0.5)
    check(kernels(*arguments), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_positions(kind, dtype, device):
    B, H, T, D, high = 2, 2, 45, 24, 3
    case = make_case(B, H, T, D, kind, high, dtype, device)
    arguments = (*case, high, make_lengths((45, 20), device), None, D**-0.5)
    check(kernels(*arguments), *arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_round_probabilities_as_32_do(kind, device):
    # only the result is rounded to 16 bits: by the rule against fp32 arithmetic, levels agree
    B, H, T, D, high = 2, 2, 45, 24, 15
    (q, k, v, _), scheme, step = make_case(B, H, T, D, kind, high, torch.float16, device)
    lengths = make_lengths((45, 20), device)
    options = (lengths, scheme, None, None, D**-0.5, 0.0, step, high)
    actual, _ = low_bit_attention_triton(q, k, v, *options)
    arguments = ([q, k, v, torch.zeros_like(q)], scheme, step, high, lengths, None, D**-0.5)
    low = reference(*arguments, dtype=torch.float32)[0].half()
    assert_as_accurate(actual, low, reference(*arguments, dtype=torch.float64)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_the_rounding(kind, device):
    B, H, T, D, high, dropout_p = 2, 2, 40, 64, 3, 0.3
    tensors, scheme, step = make_case(B, H, T, D, kind, high, torch.float32, device)
    lengths, seed = torch.tensor([40, 23], device=device), torch.tensor([99], device=device)
    # identity values make the output the dropped probabilities themselves, and a fine step keeps
    # all of them above 0
    identity = torch.eye(T, D, device=device).expand(B, H, T, D)
    fine = (torch.tensor(1e-9, device=device), 255)
    probs, _ = low_bit_attention_triton(
        *tensors[:2], identity, lengths, scheme, seed, None, 0.1, dropout_p, *fine
    )
    keep = (probs[..., :T] != 0) / (1 - dropout_p)
    arguments = (tensors, scheme, step, high, lengths, None, 0.1)
    check(kernels(*arguments, seed, dropout_p), *arguments, keep=keep)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_hold_anything_and_bits_repeat(kind, device):
    tensors, scheme, step = make_case(2, 2, 40, 16, kind, 3, torch.float32, device)
    arguments = (tensors, scheme, step, 3, torch.tensor([17, 40], device=device), None, 0.25)
    clean = kernels(*arguments)
    for x in (*tensors, scheme and scheme.rows):
        if x is not None:
            x[0, :, 17:] = torch.nan
    for actual, expected in zip(kernels(*arguments), clean, strict=True):
        assert torch.equal(actual, expected)


def test_many_levels_are_plain_attention(device):
    q, k, v, _ = make_inputs(2, 2, 33, 16, torch.float32, device)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    actual = low_bit_attention(q, k, v, torch.tensor(1 / 255, device=device), bits=8)
    # half a step a key, of random sign: far below all of one sign
    bound = v.abs().double().sum(2, keepdim=True) / 255 / 2
    assert ((actual - expected).abs() <= bound).all()
    assert (actual - expected).abs().max() > 1e-3


def test_binary_attention_counts_frames(device):
    # equal scores: all probabilities are 1 / 4, and half a step rounds to an even level: 0
    q, v = torch.zeros(1, 1, 4, 8, device=device), torch.randn(1, 1, 4, 8, device=device)
    low, high = (torch.tensor(x, device=device) for x in (0.49, 0.5))
    total = v.sum(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(low_bit_attention(q, q, v, low, bits=1), total * 0.49)
    assert torch.equal(low_bit_attention(q, q, v, high, bits=1), torch.zeros_like(v))


def test_backward_reference_is_autograd_of_the_forward():
    tensors, scheme, step = make_case(2, 2, 9, 5, "dense", 3, torch.float64, "cpu")
    lengths = torch.tensor([9, 4])
    keep = (torch.rand(2, 2, 9, 9) > 0.2) / 0.8
    arguments = (tensors, scheme, step, 3, lengths, 3, 0.3)
    _, *expected = reference(*arguments, keep=keep, dtype=torch.float64)
    dq, dk, dv, grad_scores, dstep = low_bit_attention_backward_reference(
        tensors[3], *tensors[:3], lengths, scheme.table, 3, 0.3, step, 3, keep
    )
    for actual, wanted in zip((dq, dk, dv, dstep, grad_scores), expected, strict=True):
        torch.testing.assert_close(actual, wanted.to(actual.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_op_is_registered_correctly(kind, device):
    (q, k, v, _), scheme, step = make_case(2, 2, 12, 16, kind, 3, torch.float32, device)
    lengths = torch.tensor([12, 5], device=device)
    for x in (q, k, v, step):
        x.requires_grad_()
    of_scheme = (None,) * 3 if scheme is None else (scheme.kind, scheme.table, scheme.rows)
    torch.library.opcheck(
        torch.ops.lowbit.low_bit_attention.default,
        (q, k, v, lengths, *of_scheme, None, step, 4, 0.25, 0.0, 3),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_everything(dtype, device):
    # on a CPU in 16 bits, too: its arithmetic is fp32
    B, H, T, D = 2, 2, 13, 8
    q, k, v, grad = make_inputs(B, H, T, D, dtype, device)
    step = torch.tensor(0.05, device=device, requires_grad=True)
    keys = torch.randn(H, 2 * T - 1, D, dtype=dtype, device=device)
    biases = [torch.randn(H, D, dtype=dtype, device=device) for _ in range(2)]
    leaves = [x.requires_grad_() for x in (q, k, v, keys, *biases)]
    lengths = torch.tensor([13, 7], device=device)

    def run(leaves, attend):
        q, k, v, keys, *biases = leaves
        position = TransformerXL(keys, *biases)
        return attend(q, k, v, step, bits=2, lengths=lengths, position=position)

    out = run(leaves, low_bit_attention)
    actual = torch.autograd.grad(out, [*leaves, step], grad)

    def materialized(q, k, v, step, *, bits, lengths, position):
        content, of_offsets = (
            rounded(q + bias[:, None]) for bias in (position.content_bias, position.position_bias)
        )
        bias = Scheme("relative", position.keys, of_offsets).scores(T, D**-0.5)
        return low_bit_attention_reference(
            content, k, v, lengths, bias, None, D**-0.5, step, 2**bits - 1
        )[0]

    def rounded(x):
        # a sum of tensors of this dtype is of this dtype
        return x + (x.detach().to(dtype).to(x.dtype) - x.detach()) * (x.dtype == torch.float32)

    results = []
    for wide in (torch.float32, torch.float64):
        copies = [x.detach().to(wide).requires_grad_() for x in leaves]
        out = run(copies, materialized)
        results.append(torch.autograd.grad(out, [*copies, step], grad.to(wide)))
    for x, *tensors in zip((*leaves, step), actual, *results, strict=True):
        factor = gradient_factor(q, 3) if x is step else 1
        assert_as_accurate(tensors[0], tensors[1].to(x.dtype) * factor, tensors[2] * factor)


def test_compiles_with_dynamic_frames(device):
    counter = CompileCounter()
    step = torch.tensor(0.05, device=device, requires_grad=True)
    table = torch.randn(8, 2, device=device, requires_grad=True)

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def attend(q, k, v, lengths):
        position = BucketedBias(table, 20)
        return low_bit_attention(q, k, v, step, bits=4, lengths=lengths, position=position)

    for T in (12, 17, 23):
        q, k, v, grad = make_inputs(2, 2, T, 8, torch.float32, device)
        lengths = torch.tensor([T, 5], device=device)
        actual = torch.autograd.grad(attend(q, k, v, lengths), [table, step], grad)
        out = low_bit_attention(
            q, k, v, step, bits=4, lengths=lengths, position=BucketedBias(table, 20)
        )
        for x, expected in zip(actual, torch.autograd.grad(out, [table, step], grad), strict=True):
            assert torch.equal(x, expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
def test_empty(shape, device):
    q = torch.randn(shape, device=device, requires_grad=True)
    step = torch.tensor(0.1, device=device, requires_grad=True)
    out = low_bit_attention(q, q, q, step, bits=2)
    assert out.shape == shape
    out.sum().backward()
    assert step.grad == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, r"bits must be one of \(1, 2, 4, 8\), got 3"),
        ({"step": torch.ones(2)}, r"step must be \[1\], got \[2\]"),
        (
            {"step": torch.ones(1, dtype=torch.int32)},
            "step must be floating point, got torch.int32",
        ),
        ({"window": -1}, "window must be"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"lengths": torch.ones(3)}, "lengths must be an int32 or int64 tensor"),
        ({"position": DenseBias(torch.ones(3, 3))}, "bias"),
    ],
)
def test_wrong_arguments(change, message):
    q = torch.randn(1, 2, 5, 8)
    arguments = {"step": torch.tensor(0.1), "bits": 2} | change
    with pytest.raises(ValueError, match=message):
        low_bit_attention(q, q, q, **arguments)
