"""masked_batch_norm and what trains with it: kernels, gradients, running statistics, processes."""

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from lowbit_kernels.matmul.reference import apply_epilogue
from lowbit_kernels.modules.batch_norm import normalize_frames
from lowbit_kernels.norm import batch_norm_op, masked_batch_norm
from lowbit_kernels.norm.channel_kernel import (
    CHUNK,
    channel_moments_triton,
    merge_moments_triton,
    normalize_backward_triton,
    normalize_triton,
)
from lowbit_kernels.norm.levels import is_channel_last
from lowbit_kernels.testing import assert_as_accurate
from tests.norm_cases import DTYPES, EPS, make_group_inputs

SHAPES = [  # B, C, T, lengths
    pytest.param(2, 64, 32, None, id="whole-tiles"),
    pytest.param(3, 70, 45, (45, 7, 0), id="ragged"),
    pytest.param(2, 5, CHUNK + 30, (CHUNK + 9, 60), id="several-chunks"),
    pytest.param(2, 4, 1, (1, 9), id="one-frame"),
    pytest.param(
        32, 1024, 1499, (1499, 1, 0, 700) * 8, id="conformer-large", marks=pytest.mark.gpu
    ),
]


def make_inputs(B, C, T, lengths, dtype, device):
    x, weight, bias, grad = make_group_inputs(B, C, T, dtype, device)
    if lengths is not None:
        lengths = torch.tensor(lengths, device=device)
        padding = (torch.arange(T, device=device) >= lengths[:, None])[:, None]
        # what padding holds must not matter
        x, grad = x.masked_fill(padding, torch.nan), grad.masked_fill(padding, torch.nan)
    return x, weight, bias, lengths, grad


def reference(x, weight, bias, lengths, grad, activation, dtype):
    """The output and the gradients of torch.batch_norm on valid frames alone, in ``dtype``."""
    lengths = torch.full((len(x),), x.shape[2]) if lengths is None else lengths
    valid = torch.arange(x.shape[2], device=x.device) < lengths.to(x.device)[:, None]
    frames = x.mT[valid]
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (frames, weight, bias)]
    y = apply_epilogue(torch.batch_norm(*leaves, None, None, True, 0.0, EPS, False), activation)
    dframes, *grads = torch.autograd.grad(y, leaves, grad.mT[valid].to(dtype))
    out, dx = (torch.zeros_like(x.mT, dtype=dtype) for _ in range(2))
    out[valid], dx[valid] = y.detach(), dframes
    return [out.mT, dx.mT, *grads]


def kernels(x, weight, bias, lengths, grad, activation):
    options = (lengths, EPS, activation, None)
    y, *saved = batch_norm_op._forward(
        channel_moments_triton, merge_moments_triton, normalize_triton, x, weight, bias, *options
    )
    return [y, *batch_norm_op._gradients(
        normalize_backward_triton, grad, x, weight, bias, *saved, lengths, activation, None
    )]  # fmt: skip


def op(x, weight, bias, lengths, grad, activation):
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    y = masked_batch_norm(*leaves, lengths=lengths, eps=EPS, activation=activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_all_as_accurate(actual, arguments):
    low, high = (reference(*arguments, dtype) for dtype in (torch.float32, torch.float64))
    for name, *tensors in zip(("y", "dx", "dw", "db"), actual, low, high, strict=True):
        assert_as_accurate(tensors[0], tensors[1].to(tensors[0].dtype), tensors[2], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("B", "C", "T", "lengths"), SHAPES)
def test_kernels_are_as_accurate_as_torch(B, C, T, lengths, activation, dtype, device):
    x, *rest = make_inputs(B, C, T, lengths, dtype, device)
    for memory in (x, x.contiguous()):
        actual = kernels(memory, *rest, activation)
        assert_all_as_accurate(actual, (memory, *rest, activation))
        assert all(is_channel_last(t) == is_channel_last(memory) for t in actual[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("lengths", [None, (9, 4, 1, 0)])
def test_op_is_as_accurate_as_torch(lengths, activation, dtype, device):
    arguments = (*make_inputs(4, 6, 9, lengths, dtype, device), activation)
    assert_all_as_accurate(op(*arguments), arguments)


def test_statistics_far_from_zero_do_not_cancel(device):
    x, *rest = make_inputs(3, 6, 40, (40, 11, 0), torch.float32, device)
    arguments = (x + 300, *rest, None)
    assert_all_as_accurate(kernels(*arguments), arguments)


def test_kernels_return_the_same_bits_every_time_and_for_more_padding(device):
    x, *rest = make_inputs(2, 6, 40, (40, 11), torch.float32, device)
    first, second = kernels(x, *rest, "silu"), kernels(x, *rest, "silu")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    *parameters, grad = rest
    longer = kernels(F.pad(x, (0, 30), value=torch.nan), *parameters, F.pad(grad, (0, 30)), "silu")
    assert torch.equal(longer[0][..., :40], first[0])


def test_gradient_matches_finite_differences():
    x, weight, bias, _ = make_group_inputs(3, 4, 5, torch.float64, "cpu")
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    lengths = torch.tensor([5, 2, 0])
    torch.autograd.gradcheck(
        lambda *leaves: masked_batch_norm(*leaves, lengths=lengths, activation="silu"), leaves
    )


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
def test_op_is_registered_correctly(permuted, device):
    x, weight, bias, grad = make_group_inputs(2, 4, 6, torch.float32, device)
    x = x if permuted else x.contiguous()
    lengths = torch.tensor([6, 2], device=device)
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
    forward = torch.ops.lowbit.masked_batch_norm.default
    torch.library.opcheck(forward, (*leaves, lengths, EPS, "silu", None))
    _, *saved = forward(x, weight, bias, lengths, EPS, "silu", None)
    torch.library.opcheck(
        torch.ops.lowbit.masked_batch_norm_backward.default,
        (grad, x, weight, bias, *saved, lengths, "silu", None),
    )


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0)])
def test_without_frames_nothing_moves(shape, device):
    norm = nn.BatchNorm1d(4, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    normalize_frames(norm, x, None, None).sum().backward()
    assert x.grad.shape == shape
    nothing = torch.zeros(2, dtype=torch.int64, device=device)
    assert normalize_frames(norm, torch.randn(2, 4, 3, device=device), nothing, None).eq(0).all()
    assert norm.running_mean.eq(0).all()
    assert norm.running_var.eq(1).all()
    lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
    rest = (torch.ones(4, device=device), torch.zeros(4, device=device), lengths)
    assert kernels(x.detach(), *rest, x.detach(), "gelu")[0].shape == shape


def assert_same_buffers(norm, expected):
    for name, buffer in expected.named_buffers():
        actual = norm.get_buffer(name)
        if buffer.is_floating_point():
            assert_as_accurate(actual, buffer.to(actual.dtype), buffer, name)
        else:
            assert torch.equal(actual, buffer)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_it_is_batch_norm_where_nothing_is_padded(options, momentum, device):
    stock = nn.BatchNorm1d(6, momentum=momentum, device=device, **options)
    if stock.affine:
        nn.init.normal_(stock.weight)
    norm = copy.deepcopy(stock)
    stock.double()
    for _ in range(2):
        x = torch.randn(3, 6, 7, device=device) + 2
        low = copy.deepcopy(stock).float()(x)
        assert_as_accurate(normalize_frames(norm, x, None, None), low, stock(x.double()))
    assert_same_buffers(norm, stock)


def test_padding_is_ignored(device):
    norm = nn.BatchNorm1d(6, device=device)
    x = torch.randn(2, 6, 9, device=device)
    lengths = torch.tensor([9, 4], device=device)
    whole = copy.deepcopy(norm)
    padded = x.masked_fill(torch.arange(9, device=device) >= lengths[:, None, None], 7)
    y = normalize_frames(norm, padded, lengths, "silu")
    joined = torch.cat((x[0], x[1, :, :4]), 1)[None]
    alone = F.silu(whole(joined))
    assert_as_accurate(torch.cat((y[0], y[1, :, :4]), 1)[None], alone, alone.double())
    assert (y[1, :, 4:] == 0).all()
    assert_same_buffers(norm, whole.double())


def test_compiles_to_one_graph_and_trains(device):
    norm = nn.BatchNorm1d(4, device=device)
    plain = copy.deepcopy(norm)
    x, lengths = torch.randn(2, 4, 9, device=device), torch.tensor([9, 4], device=device)
    compiled = torch.compile(normalize_frames, fullgraph=True, backend="aot_eager")
    y = compiled(norm, x, lengths, "silu")
    wanted = normalize_frames(plain, x, lengths, "silu")
    y.square().sum().backward()
    wanted.square().sum().backward()
    assert torch.equal(y, wanted)
    assert torch.equal(norm.weight.grad, plain.weight.grad)
    assert torch.equal(norm.running_var, plain.running_var)


# utterances of two processes; the second has frames of one only
FRAMES = ((9, 4), (0, 6))


def _process(rank, path, results):
    store = dist.FileStore(path, 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    norm = nn.SyncBatchNorm(5)
    x = _shared_input()[2 * rank : 2 * rank + 2].requires_grad_()
    y = normalize_frames(norm, x, torch.tensor(FRAMES[rank]), "silu")
    y.square().sum().backward()
    results[rank] = [
        t.detach() for t in (y, x.grad, norm.weight.grad, norm.bias.grad, norm.running_var)
    ]
    dist.destroy_process_group()


def _shared_input():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 5, 9, generator=generator) + 2


def test_two_processes_are_one_batch(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_process, (str(tmp_path / "store"), results), nprocs=2)
        parts = [results[rank] for rank in range(2)]
    wanted = []
    for dtype in (torch.float32, torch.float64):
        module = nn.BatchNorm1d(5).to(dtype)
        x = _shared_input().to(dtype).requires_grad_()
        y = normalize_frames(module, x, torch.tensor(FRAMES).flatten(), "silu")
        y.square().sum().backward()
        wanted.append(
            [y.detach(), x.grad, module.weight.grad, module.bias.grad, module.running_var]
        )
    first, second = parts
    # gradients of parameters are each process's own, to be averaged by whoever wraps the model
    joined = [torch.cat((a, b)) for a, b in zip(first[:2], second[:2], strict=True)]
    joined += [a + b for a, b in zip(first[2:4], second[2:4], strict=True)]
    assert torch.equal(first[4], second[4])
    names = ("y", "dx", "dweight", "dbias", "running_var")
    for name, *tensors in zip(names, [*joined, first[4]], *wanted, strict=True):
        assert_as_accurate(*tensors, name)


X = torch.zeros(2, 4, 5)
W = torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], W, W), {}, r"x must be \[B, C, T\], got shape \(4, 5\)"),
        ((X.int(), W, W), {}, "x must be fp16, bf16 or fp32 .* got torch.int32"),
        ((X, W[:3], W), {}, r"weight must be \[4\], got \[3\]"),
        ((X, W, W), {"lengths": torch.tensor([5])}, r"lengths must be \[2\] on cpu, got \[1\]"),
        ((X, W, W), {"activation": "glu"}, "activation must be one of .* got 'glu'"),
        ((X, W, W), {"running_mean": W}, "running_mean and running_var must be given together"),
        ((X, W, W), {"running_mean": W[1:], "running_var": W}, r"running_mean must be \[4\]"),
        ((X, W, W), {"running_mean": W, "running_var": W.half()}, "running_var must be torch.fl"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        masked_batch_norm(*arguments, **{"lengths": None, **options})


@pytest.mark.gpu
def test_captured_graph_follows_the_lengths():
    x, weight, bias, _ = make_group_inputs(2, 64, 600, torch.bfloat16, "cuda")
    lengths = torch.tensor([600, 70], device="cuda")
    masked_batch_norm(x, weight, bias, lengths=lengths, activation="silu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masked_batch_norm(x, weight, bias, lengths=lengths, activation="silu")
    lengths.copy_(torch.tensor([9, 400]))
    graph.replay()
    expected = masked_batch_norm(x, weight, bias, lengths=lengths, activation="silu")
    assert torch.equal(y, expected)
