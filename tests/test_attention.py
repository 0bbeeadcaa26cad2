"""flash_attention: kernels against the reference, registration, gradients, dropout, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from lowbit_kernels.attention import DenseBias, flash_attention, flash_attention_reference
from lowbit_kernels.attention.backward_kernel import flash_attention_backward_triton
from lowbit_kernels.attention.config import default_config
from lowbit_kernels.attention.forward_kernel import flash_attention_triton
from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.testing import assert_as_accurate

SHAPES = [  # B, H, T, D, lengths, window, shape of the bias
    pytest.param(1, 2, 64, 64, None, None, None, id="whole-tiles"),
    pytest.param(2, 2, 70, 36, (70, 33), None, None, id="ragged"),
    pytest.param(3, 1, 37, 16, (37, 0, 1), None, (1, 1, 37, 37), id="length-0-and-1"),
    pytest.param(1, 3, 5, 81, None, None, None, id="odd-head"),
    pytest.param(1, 1, 130, 49, (101,), 7, None, id="window"),
    pytest.param(1, 1, 150, 16, (140,), 66, None, id="window-of-whole-tiles"),
    pytest.param(2, 2, 33, 5, None, None, (1, 2, 33, 33), id="bias-over-batch"),
    pytest.param(2, 2, 33, 16, (20, 33), 3, (2, 1, 33, 33), id="bias-over-heads"),
    pytest.param(2, 2, 20, 16, None, None, (2, 2, 1, 20), id="bias-over-queries"),
    pytest.param(1, 1, 40, 256, (40,), None, None, id="largest-head"),
    pytest.param(
        8, 12, 499, 64, (499, 1, 0, 400, 64, 65, 128, 498), None, None,
        id="wav2vec2-base", marks=pytest.mark.gpu,
    ),
    pytest.param(
        2, 12, 499, 64, (499, 311), 64, (1, 12, 499, 499),
        id="wavlm-base-window", marks=pytest.mark.gpu,
    ),
]  # fmt: skip
DTYPES = [
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter lacks bf16
]


def make_inputs(B, H, T, D, dtype, device):
    """q, k, v and the gradient of the output, heads interleaved with frames as in a model."""
    return [torch.randn(B, T, H, D, dtype=dtype, device=device).transpose(1, 2) for _ in range(4)]


def make_lengths(lengths, device):
    return None if lengths is None else torch.tensor(lengths, device=device)


def reference(q, k, v, grad, lengths, bias, window, scale, keep=None, dtype=None):
    """The output and the gradients of q, k, v and the bias, by autograd in ``dtype``."""
    leaves = [
        None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()
        for x in (q, k, v, bias)
    ]
    out, _ = flash_attention_reference(
        leaves[0], leaves[1], leaves[2], lengths, leaves[3], window, scale, keep
    )
    inputs = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def kernels(q, k, v, grad, lengths, bias, window, scale, seed=None, dropout_p=0.0):
    """The output and the gradients of q, k, v and the bias, by the Triton kernels."""
    scheme = None if bias is None else Scheme("dense", bias)
    out, lse = flash_attention_triton(q, k, v, lengths, scheme, seed, window, scale, dropout_p)
    *grads, dbias, _ = flash_attention_backward_triton(
        grad, q, k, v, out, lse, lengths, scheme, seed, window, scale, dropout_p, True
    )
    return [out, *grads] if bias is None else [out, *grads, dbias]


def assert_all_as_accurate(actual, low, high):
    names = ("out", "dq", "dk", "dv", "dbias")
    for name, *tensors in zip(names, actual, low, high, strict=False):
        assert_as_accurate(*tensors, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "T", "D", "lengths", "window", "bias_shape"), SHAPES)
def test_kernels_are_as_accurate_as_torch(B, H, T, D, lengths, window, bias_shape, dtype, device):
    q, k, v, grad = make_inputs(B, H, T, D, dtype, device)
    bias = None if bias_shape is None else torch.randn(bias_shape, dtype=dtype, device=device)
    arguments = (q, k, v, grad, make_lengths(lengths, device), bias, window, D**-0.5)
    assert_all_as_accurate(
        actual=kernels(*arguments),
        low=reference(*arguments),
        high=reference(*arguments, dtype=torch.float64),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 0])
def test_a_frame_that_sees_only_itself_returns_its_value(window, dtype, device):
    T = 1 if window is None else 21
    q, k, v, _ = make_inputs(2, 1, T, 8, dtype, device)
    out, _ = flash_attention_triton(q, k, v, None, None, None, window, 1.0, 0.0)
    assert torch.equal(out, v)


def test_kernel_zeroes_padding_whatever_it_holds(device):
    q, k, v, grad = make_inputs(2, 2, 40, 16, torch.float32, device)
    lengths = torch.tensor([17, 40], device=device)
    clean = kernels(q, k, v, grad, lengths, None, None, 0.25)
    for x in (q, k, v, grad):
        x[0, :, 17:] = torch.nan
    for actual, expected in zip(
        kernels(q, k, v, grad, lengths, None, None, 0.25), clean, strict=True
    ):
        assert torch.equal(actual, expected)
        assert (actual[0, :, 17:] == 0).all()


def test_kernels_agree_on_strided_inputs(device):
    q, k, v, grad = make_inputs(1, 2, 20, 8, torch.float32, device)
    expected = kernels(q, k, v, grad, None, None, None, 0.5)
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v, grad)]
    for actual, wanted in zip(kernels(*strided, None, None, None, 0.5), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_kernel_gives_0_to_a_query_whose_bias_is_minus_infinity(device):
    q, k, v, grad = make_inputs(1, 1, 20, 16, torch.float32, device)
    bias = torch.zeros(1, 1, 20, 20, device=device)
    bias[..., 3, :] = -torch.inf
    bias[..., 5, :18] = -torch.inf
    arguments = (q, k, v, grad, None, bias, None, 0.25)
    actual = kernels(*arguments)
    assert (actual[0][0, 0, 3] == 0).all()
    assert_all_as_accurate(
        actual, reference(*arguments), reference(*arguments, dtype=torch.float64)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_has_one_mask_in_both_directions(dtype, device):
    B, H, T, D, dropout_p = 2, 2, 40, 64, 0.3
    q, k, v, grad = make_inputs(B, H, T, D, dtype, device)
    lengths = torch.tensor([40, 23], device=device)
    bias = torch.randn(1, H, T, T, dtype=dtype, device=device)
    seed = torch.tensor([1234567890123], device=device)
    # identity values make the output the dropped probabilities themselves
    identity = torch.eye(T, D, dtype=dtype, device=device).expand(B, H, T, D)
    scheme = Scheme("dense", bias)
    probs, _ = flash_attention_triton(q, k, identity, lengths, scheme, seed, None, 0.1, dropout_p)
    keep = (probs[..., :T] != 0) / (1 - dropout_p)
    arguments = (q, k, v, grad, lengths, bias, None, 0.1)
    assert_all_as_accurate(
        actual=kernels(*arguments, seed, dropout_p),
        low=reference(*arguments, keep),
        high=reference(*arguments, keep, dtype=torch.float64),
    )


def dropped_share(seed, dropout_p, device, heads=1):
    """For uniform attention over 64 keys: which of [heads, 64, 64] weights are dropped."""
    zeros = torch.zeros(1, heads, 64, 64, device=device)
    identity = torch.eye(64, device=device).expand(1, heads, 64, 64)
    out, _ = flash_attention_triton(
        zeros, zeros, identity, None, None, torch.tensor([seed], device=device), None, 1.0,
        dropout_p,
    )  # fmt: skip
    return out[0] == 0


def test_dropout_drops_the_share_it_is_told(device):
    dropped = dropped_share(7, 0.25, device, heads=2)
    # four standard deviations of a binomial share
    bound = 4 * (0.25 * 0.75 / dropped.numel()) ** 0.5
    assert abs(dropped.float().mean().item() - 0.25) < bound
    assert not torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped, dropped_share(8, 0.25, device, heads=2))
    assert torch.equal(dropped, dropped_share(7, 0.25, device, heads=2))


def test_kernels_return_the_same_bits_every_time(device):
    q, k, v, grad = make_inputs(2, 2, 50, 16, torch.float32, device)
    bias = torch.randn(1, 1, 50, 50, device=device)
    first = kernels(q, k, v, grad, None, bias, None, 0.25)
    second = kernels(q, k, v, grad, None, bias, None, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8), (2, 0, 5, 8)])
def test_empty_batches_work(shape, device):
    q = torch.randn(shape, device=device, requires_grad=True)
    lengths = torch.zeros(shape[0], dtype=torch.int32, device=device)
    out = flash_attention(q, q, q, lengths=lengths)
    out.sum().backward()
    assert out.shape == q.grad.shape == shape
    assert flash_attention_triton(q, q, q, lengths, None, None, None, 1.0, 0.0)[0].shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [None, (11, 4, 0)])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_op_is_as_accurate_as_torch(has_bias, window, lengths, dtype, device):
    q, k, v, grad = make_inputs(3, 2, 11, 20, dtype, device)
    lengths = make_lengths(lengths, device)
    bias = torch.randn(2, 1, 11, dtype=dtype, device=device) if has_bias else None
    leaves = [None if x is None else x.detach().requires_grad_() for x in (q, k, v, bias)]
    out = flash_attention(
        *leaves[:3], lengths=lengths, window=window,
        position=None if bias is None else DenseBias(leaves[3]),
    )  # fmt: skip
    inputs = [leaf for leaf in leaves if leaf is not None]
    actual = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    arguments = (q, k, v, grad, lengths, bias, window, 20**-0.5)
    assert_all_as_accurate(
        actual, reference(*arguments), reference(*arguments, dtype=torch.float64)
    )


def test_op_equals_scaled_dot_product_attention(device):
    q, k, v, _ = make_inputs(2, 3, 12, 16, torch.float32, device)
    bias = torch.randn(2, 3, 12, 12, device=device)
    assert_as_accurate(
        actual=flash_attention(q, k, v, position=DenseBias(bias), scale=0.3),
        low=F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3),
        high=F.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), attn_mask=bias.double(), scale=0.3
        ),
    )


def test_padded_batch_equals_single_utterances(device):
    q, k, v, _ = make_inputs(2, 2, 30, 16, torch.float32, device)
    out = flash_attention(q, k, v, lengths=torch.tensor([30, 17], device=device))
    alone = [x[1:, :, :17] for x in (q, k, v)]
    assert_as_accurate(
        out[1:, :, :17], flash_attention(*alone),
        flash_attention_reference(*(x.double() for x in alone), None, None, None, 0.25)[0],
    )  # fmt: skip
    assert (out[1, :, 17:] == 0).all()


def test_lengths_out_of_range_act_as_the_nearest_bound(device):
    q, k, v, _ = make_inputs(2, 1, 9, 8, torch.float32, device)
    wild = torch.tensor([-3, 2**40], device=device)
    out = flash_attention(q, k, v, lengths=wild)
    assert torch.equal(out, flash_attention(q, k, v, lengths=torch.tensor([0, 9], device=device)))
    kernel, _ = flash_attention_triton(q, k, v, wild, None, None, None, 1.0, 0.0)
    assert (kernel[0] == 0).all()
    assert (kernel[1] != 0).all()


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_op_is_registered_correctly(permuted, device):
    q, k, v, _ = make_inputs(2, 2, 10, 16, torch.float32, device)
    if not permuted:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    lengths = torch.tensor([10, 4], device=device)
    bias = torch.randn(1, 2, 10, 10, device=device)
    seed = torch.tensor([3], device=device)
    op = torch.ops.lowbit.flash_attention.default
    for options in (
        (None, None, None, None, None, None, None, 0.0),
        (lengths, "dense", bias.clone().requires_grad_(), None, seed, 3, 0.2, 0.1),
    ):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(op, (*leaves, *options))
    options = (lengths, "dense", bias, None, seed, 3, 0.2, 0.1)
    out, lse = op(q, k, v, *options)
    torch.library.opcheck(
        torch.ops.lowbit.flash_attention_backward.default,
        (out, q, k, v, out, lse, *options, True),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradient_matches_finite_differences(dropout_p):
    q, k, v, _ = make_inputs(2, 2, 6, 5, torch.float64, "cpu")
    bias = torch.randn(2, 6, 6, dtype=torch.float64)
    lengths = torch.tensor([6, 3])

    def run(q, k, v, bias):
        torch.manual_seed(1)  # the same dropout mask at every evaluation
        return flash_attention(
            q, k, v, lengths=lengths, window=3, position=DenseBias(bias), dropout_p=dropout_p
        )

    torch.autograd.gradcheck(run, [x.detach().requires_grad_() for x in (q, k, v, bias)])


def test_dropout_on_the_cpu_is_unbiased_and_follows_the_generator():
    q = torch.zeros(1, 1, 64, 64)
    identity = torch.eye(64).expand(1, 1, 64, 64)
    torch.manual_seed(5)
    out = flash_attention(q, q, identity, dropout_p=0.25)
    assert abs((out == 0).float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / out.numel()) ** 0.5
    assert torch.equal(out[out != 0], torch.full_like(out[out != 0], 1 / 64 / 0.75))
    assert not torch.equal(out, flash_attention(q, q, identity, dropout_p=0.25))
    torch.manual_seed(5)
    assert torch.equal(out, flash_attention(q, q, identity, dropout_p=0.25))


def test_compiles_to_one_graph_for_three_lengths(device):
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def run(q, k, v, lengths, bias):
        position = DenseBias(bias)
        return flash_attention(q, k, v, lengths=lengths, window=4, position=position)

    for T in (7, 9, 13):
        q, k, v, grad = make_inputs(2, 2, T, 8, torch.float32, device)
        q.requires_grad_()
        lengths = torch.tensor([T, 3], device=device)
        bias = torch.randn(1, 2, T, T, device=device)
        out = run(q, k, v, lengths, bias)
        out.backward(grad)
        expected = flash_attention(
            q, k, v, lengths=lengths, window=4, position=DenseBias(bias)
        )  # fmt: skip
        assert torch.equal(out, expected)
    assert counter.frame_count == 1


def test_autocast_casts_the_inputs(device):
    q, k, v, _ = make_inputs(1, 1, 5, 8, torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert flash_attention(q, k, v).dtype == torch.bfloat16
    assert flash_attention(q, k, v).dtype == torch.float32


def test_output_heads_merge_without_a_copy(device):
    q, k, v, _ = make_inputs(2, 3, 7, 8, torch.float32, device)
    assert flash_attention(q, k, v).transpose(1, 2).is_contiguous()
    out, _ = flash_attention_triton(q, k, v, None, None, None, None, 1.0, 0.0)
    assert out.transpose(1, 2).is_contiguous()


X = torch.zeros(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], X, X), {}, r"q must be \[B, H, T, D\], got shape \(3, 5, 8\)"),
        ((X, X[:, :, :4], X), {}, r"k must have q's shape .* got \(2, 3, 4, 8\)"),
        ((X, X, X.half()), {}, "v must have q's dtype and device, .* got torch.float16 on cpu"),
        ((X, X.to("meta"), X), {}, "k must have q's dtype and device, .* on meta"),
        ((X.int(), X.int(), X.int()), {}, "q must be fp16, bf16 or fp32 .* got torch.int32"),
        ((X.repeat(1, 1, 1, 33),) * 3, {}, "head dimension must be 1 to 256, got 264"),
        ((X, X, X), {"lengths": [5, 5]}, "lengths must be an int32 or int64 tensor .* got list"),
        ((X, X, X), {"lengths": torch.ones(2, 5).bool()}, "lengths must be .* got torch.bool"),
        ((X, X, X), {"lengths": torch.tensor([5])}, r"lengths must be \[2\] on cpu, got \[1\]"),
        ((X, X, X), {"window": -1}, r"window must be an int >= 0 .* got -1"),
        ((X, X, X), {"window": (4, 4)}, r"window must be an int >= 0 .* got \(4, 4\)"),
        ((X, X, X), {"scale": float("inf")}, "scale must be above 0 and finite, got inf"),
        ((X, X, X), {"scale": 0.0}, "scale must be above 0 and finite, got 0"),
        ((X, X, X), {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ((X, X, X), {"position": X}, "position must be None, DenseBias, .* got Tensor"),
        ((X, X, X), {"position": DenseBias(X)}, r"position.bias must broadcast to .* got \[2, 3"),
        ((X, X, X), {"position": DenseBias(torch.ones(5, 5).bool())}, "position.bias must be fl"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*arguments, **options)


@pytest.mark.parametrize("shared_kib", [64, 99, 163, 227])
@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dkdv"])
@pytest.mark.parametrize("kind", [None, "dense", "relative"])
def test_default_tiles_hold_their_operands_in_shared_memory(kind, kernel, shared_kib):
    for head_dim in (1, 36, 64, 81, 128, 256):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for has_dropout in (False, True):
                config = default_config(
                    kernel, head_dim, dtype, kind, has_dropout, shared_kib * 1024
                )
                assert config.block_d >= head_dim
                assert min(config.block_m, config.block_n) >= 16
                # the tensors that are walked over, in every stage of the pipeline
                walked = config.block_m if kernel == "backward_dkdv" else config.block_n
                walked_bytes = 2 * walked * config.block_d * dtype.itemsize * config.num_stages
                assert walked_bytes <= shared_kib * 1024


@pytest.mark.gpu
def test_captured_graph_follows_the_lengths_and_draws_new_dropout():
    q, k, v, _ = make_inputs(2, 4, 100, 64, torch.float16, "cuda")
    lengths = torch.tensor([100, 50], device="cuda")
    flash_attention(q, k, v, lengths=lengths, dropout_p=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attention(q, k, v, lengths=lengths)
        dropped = flash_attention(q, k, v, lengths=lengths, dropout_p=0.1)
    for values in ((100, 50), (7, 0)):
        lengths.copy_(torch.tensor(values))
        graph.replay()
        assert torch.equal(out, flash_attention(q, k, v, lengths=lengths))
        before = dropped.clone()
        graph.replay()
        assert not torch.equal(dropped, before)
