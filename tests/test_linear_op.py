"""low_bit_linear: meaning, registration, gradients, dispatch and errors.

Dimension key: M rows, N output features, K input features.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels.checks import EPILOGUES
from lowbit_kernels.formats import QuantSpec, empty_depthwise_weight, quantize_weight
from lowbit_kernels.matmul import low_bit_linear, tuned
from lowbit_kernels.matmul.csrc import CsrcConfig
from lowbit_kernels.matmul.dispatch import (
    Choice,
    Gpu,
    LinearConfig,
    byte_pairs,
    candidates,
    choose_backend,
    choose_config,
    choose_linear,
    weights_per_block,
)
from lowbit_kernels.matmul.op import flatten
from lowbit_kernels.matmul.reference import epilogue_backward_reference, preactivation_reference
from tests.linear_cases import SPECS, check, make_inputs, specs


@pytest.mark.parametrize("epilogue", EPILOGUES)
@specs
def test_op_equals_its_meaning(spec, epilogue, device):
    x, weight, bias, residual = make_inputs(6, 38, 101, spec, torch.float32, device, epilogue)
    y = low_bit_linear(x, weight, bias, epilogue=epilogue, residual=residual)
    check(y, x, weight, bias, residual, epilogue)


def test_utterances_do_not_share_a_scale(device):
    spec = QuantSpec(4, inputs="int8", input_scale="utterance")
    weight = quantize_weight(torch.randn(8, 40, device=device), spec)
    x = (
        torch.randn(2, 5, 40, device=device)
        * torch.tensor([1.0, 100.0], device=device)[:, None, None]
    )
    batch = low_bit_linear(x, weight)
    assert torch.equal(batch[0], low_bit_linear(x[0], weight))
    assert torch.equal(batch[1], low_bit_linear(x[1:], weight)[0])


@pytest.mark.parametrize("rows", [(), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_any_number_of_batch_dimensions(rows, device):
    for inputs, kind in ((None, "token"), ("int8", "token"), ("int8", "utterance")):
        spec = QuantSpec(4, inputs=inputs, input_scale=kind)
        weight = quantize_weight(torch.randn(8, 40, device=device), spec)
        x = torch.randn(*rows, 40, device=device, requires_grad=True)
        y = low_bit_linear(x, weight, epilogue="gelu")
        y.sum().backward()
        assert y.shape == (*rows, 8)
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("epilogue", [None, "glu"])
@pytest.mark.parametrize("inputs", [None, "int8"])
def test_ops_are_registered_correctly(inputs, epilogue, permuted, device):
    spec = QuantSpec(4, inputs=inputs)
    x, weight, bias, residual = make_inputs(6, 16, 70, spec, torch.float32, device, epilogue)
    x, residual = x.view(2, 3, 70), residual.view(2, 3, -1)
    if permuted:  # a fake that copies the strides of x is right on contiguous inputs only
        x, residual = (t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (x, residual))
    tensors = [t.requires_grad_() for t in (x, bias, residual)]
    name = "linear" if epilogue is None else "linear_train"
    packed = flatten(weight)
    torch.library.opcheck(getattr(torch.ops.lowbit, name).default, (*tensors, epilogue, *packed))
    grad_y, z = torch.randn_like(residual), torch.randn(2, 3, 16, device=device)
    backward = torch.ops.lowbit.linear_backward.default
    torch.library.opcheck(
        backward, (grad_y.detach(), None if epilogue is None else z, epilogue, True, *packed)
    )


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("name", ["w4g64", "w4-asymmetric", "w8"])
def test_gradient_matches_finite_differences(name, epilogue):
    args = make_inputs(4, 6, 70, SPECS[name], torch.float64, "cpu", epilogue)
    x, weight, bias, residual = args

    def run(x, bias, residual):
        return low_bit_linear(x, weight, bias, epilogue=epilogue, residual=residual)

    torch.autograd.gradcheck(run, [t.requires_grad_() for t in (x, bias, residual)])


@pytest.mark.parametrize("epilogue", [None, "gelu"])
def test_int8_inputs_pass_the_gradient_straight_through(epilogue, device):
    spec = QuantSpec(4, inputs="int8")
    x, weight, bias, _ = make_inputs(4, 6, 70, spec, torch.float64, "cpu")
    x.requires_grad_()
    low_bit_linear(x, weight, bias, epilogue=epilogue).sum().backward()
    z = preactivation_reference(x.detach(), weight, bias)
    dz = epilogue_backward_reference(torch.ones_like(z), z, epilogue)
    torch.testing.assert_close(x.grad, dz @ weight.dequantize(torch.float64))


def test_only_what_is_asked_for_gets_a_gradient(device):
    x, weight, bias, residual = make_inputs(4, 6, 70, SPECS["w4g64"], torch.float32, device)
    residual.requires_grad_()
    low_bit_linear(x, weight, bias, epilogue="gelu", residual=residual).sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))
    bias.requires_grad_()
    low_bit_linear(x, weight, bias, epilogue="gelu", residual=residual).sum().backward()
    assert x.grad is None
    assert bias.grad is not None


@pytest.mark.parametrize("inputs", [None, "int8"])
def test_compiles_to_one_graph_for_three_lengths(inputs, device):
    spec = QuantSpec(4, inputs=inputs)
    x, weight, bias, _ = make_inputs(30, 16, 70, spec, torch.float32, device)
    bias.requires_grad_()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    def run(x):
        return low_bit_linear(x, weight, bias, epilogue="gelu")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for T in (4, 7, 11):
        assert torch.equal(compiled(x[None, :T]), run(x[None, :T]))
    assert len(graphs) == 1


def test_autocast_casts_like_linear(device):
    x, weight, bias, residual = make_inputs(4, 6, 70, SPECS["w4g64"], torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = low_bit_linear(x, weight, bias, residual=residual)
        assert y.dtype == F.linear(x, weight.dequantize(), bias).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"got torch\.int64"):
            low_bit_linear(x.long(), weight)
    low = (t.bfloat16() for t in (x, bias, residual))
    x, bias, residual = low
    assert torch.equal(y, low_bit_linear(x, weight, bias, residual=residual))


def test_flops_are_those_of_a_matmul(device):
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias, _ = make_inputs(4, 6, 70, SPECS["w4g64"], torch.float32, device)
    with FlopCounterMode(display=False) as counter:
        low_bit_linear(x.requires_grad_(), weight, bias, epilogue="gelu").sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 4 * 6 * 70)


def test_backends_by_capability():
    assert choose_backend(499, None, torch.bfloat16, (9, 0)) == "fused"
    assert choose_backend(16000, None, torch.bfloat16, (9, 0)) == "dequant_cublas"
    # a separate pass over the output costs more than unpacking does
    assert choose_backend(16000, None, torch.bfloat16, (9, 0), is_plain=False) == "fused"
    assert choose_backend(499, None, torch.float32, (9, 0)) == "dequant_cublas"
    assert choose_backend(16000, "int8", torch.float32, (8, 0)) == "fused"
    with pytest.raises(NotImplementedError, match=r"capability 8\.0 .* got \(7, 5\)"):
        choose_backend(499, None, torch.float16, (7, 5))


HOPPER = Gpu("NVIDIA H200", (9, 0), 132, 227 * 1024)
GPUS = {
    "sm_80": Gpu("NVIDIA A100", (8, 0), 108, 163 * 1024),
    "sm_89": Gpu("NVIDIA L4", (8, 9), 58, 99 * 1024),
    "sm_90": HOPPER,
    "gfx942": Gpu("AMD MI300X", (9, 4), 304, 64 * 1024, is_hip=True),
}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_tiles_fit_and_fill_the_device(gpu, bits, itemsize):
    pairs = byte_pairs(gpu)
    for M in (1, 16, 64, 499, 2000, 16000):
        for N, K in ((1024, 1024), (4096, 1024), (1024, 4096), (144, 324)):
            for config in candidates(M, N, K, bits, itemsize, gpu):
                weights = config.unroll * weights_per_block(bits, itemsize, pairs)
                stage = config.block_n * weights * bits // 8 + config.block_m * weights * itemsize
                assert config.num_stages * stage <= gpu.shared_bytes
                assert config.splits <= -(-K // weights)
            assert (
                choose_config(M, N, K, bits, itemsize, gpu)
                == candidates(M, N, K, bits, itemsize, gpu)[0]
            )


def test_few_tiles_are_made_smaller_or_split():
    def programs(M, N, K):
        config = choose_config(M, N, K, 4, 2, HOPPER)
        return -(-N // config.block_n) * -(-M // config.block_m) * config.splits

    assert choose_config(16000, 4096, 1024, 4, 2, HOPPER).block_m == 256
    for shape in ((1, 1024, 1024), (16, 4096, 1024), (64, 1024, 4096), (499, 1024, 1024)):
        assert programs(*shape) >= 100, shape
    assert choose_config(499, 1024, 1024, 4, 2, HOPPER).splits == 1
    assert choose_config(1, 64, 64, 4, 2, HOPPER).splits == 1


def test_registers_are_limited_only_where_nothing_spills():
    limited = [c for c in candidates(2000, 1024, 1024, 4, 2, HOPPER) if c.max_registers]
    assert limited
    for bits, itemsize, K in ((4, 2, 1000), (8, 2, 1024), (4, 1, 1024)):
        assert not any(c.max_registers for c in candidates(2000, 1024, K, bits, itemsize, HOPPER))


def choose(M, N=4096, K=1024, inputs=None, dtype=torch.bfloat16, is_plain=False, fixed=False):
    return choose_linear(M, N, K, 4, 64, inputs, dtype, is_plain, fixed, HOPPER)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes the H200's table of tuned layers."""

    def write(text):
        (tmp_path / "nvidia-h200.json").write_text(text)
        tuned.load_table.cache_clear()
        choose_linear.cache_clear()

    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    yield write
    monkeypatch.undo()
    write_nothing = (tuned.load_table, choose_linear)
    for cached in write_nothing:
        cached.cache_clear()


def test_measured_choices_come_before_defaults(table):
    config = {"block_n": 64, "block_m": 32, "splits": 2}
    layer = {"N": 4096, "K": 1024, "bits": 4, "group_size": 64, "inputs": None, "is_plain": False}
    rows = [
        {"up_to": 512, "backend": "dequant_cublas", "config": None},
        {"up_to": 32, "backend": "fused", "config": config},
    ]
    table(json.dumps({"linear": [layer | {"rows": rows}]}))
    assert choose(20) == Choice("fused", LinearConfig(**config))
    assert choose(33) == Choice("dequant_cublas")
    # outside of what was measured
    default = Choice("fused", choose_config(513, 4096, 1024, 4, 2, HOPPER))
    assert choose(513) == default
    assert choose(20, N=1024).config != LinearConfig(**config)
    # cuBLAS may sum in an order that depends on the batch
    assert choose(20, fixed=True).backend == "fused"
    # fp32 is torch's own product
    assert choose(20, dtype=torch.float32) == Choice("dequant_cublas")


def test_the_cuda_kernel_serves_only_what_it_can(table):
    tiles = {"block_m": 16, "warps_n": 4, "splits": 2}
    layer = {"N": 4096, "K": 1024, "bits": 4, "group_size": 64, "inputs": None, "is_plain": False}
    rows = [{"up_to": 64, "backend": "csrc", "config": tiles}]
    table(json.dumps({"linear": [layer | {"rows": rows}]}))
    arguments = (4096, 1024, 4, 64, None, torch.bfloat16, False, False, HOPPER)
    assert choose_linear(16, *arguments, True) == Choice("csrc", CsrcConfig(**tiles))
    default = Choice("fused", choose_config(16, 4096, 1024, 4, 2, HOPPER))
    assert choose_linear(16, *arguments, False) == default


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"linear": [{"N": 1}]}', '{"linear": [1]}', '{"linear": [], "conv1d": [1]}'],
)
def test_a_broken_table_is_named(table, text):
    table(text)
    with pytest.raises(ValueError, match=r"nvidia-h200\.json is not a table"):
        choose(20)


def error_cases():
    weight = quantize_weight(torch.randn(6, 70), QuantSpec(4))
    odd = quantize_weight(torch.randn(7, 70), QuantSpec(4))
    x, bias = torch.randn(2, 70), torch.randn(6)
    static = QuantSpec(4, inputs="int8", input_scale="static")
    int4 = quantize_weight(torch.randn(6, 70), QuantSpec(4, inputs="int4"))
    depthwise = empty_depthwise_weight(6, 3, QuantSpec(8))
    wide = quantize_weight(torch.randn(1, 140_000), QuantSpec(4, inputs="int8"))
    return {
        "weight-type": (
            (x, torch.randn(6, 70)),
            {},
            "weight must be a QuantizedWeight, got Tensor",
        ),
        "depthwise": ((x, depthwise), {}, r"weight must be packed \[N, K\], got a depthwise"),
        "inputs": (
            (x, int4),
            {},
            r"inputs must be one of \(None, 'int8', 'fp8'\) so far, got 'int4'",
        ),
        "static": (
            (x, quantize_weight(torch.randn(6, 70), static)),
            {},
            "weight.input_scale must be a tensor with a static scale, got None",
        ),
        "overflow": ((torch.randn(1, 140_000), wide), {}, "K must be at most 132104 .* got 140000"),
        "epilogue": ((x, weight), {"epilogue": "mish"}, "epilogue must be one of .* got 'mish'"),
        "glu": ((x, odd), {"epilogue": "glu"}, "'glu' needs an even number of rows, got N = 7"),
        "dtype": ((x.int(), weight), {}, "x must be fp16, bf16 or fp32 .* got torch.int32"),
        "features": (
            (x[:, :64], weight),
            {},
            r"x must be \[..., K\] with K = 70, got shape \[2, 64\]",
        ),
        "scalar": (
            (torch.tensor(1.0), weight),
            {},
            r"x must be \[..., K\] with K = 70, got shape \[\]",
        ),
        "device": ((x.to("meta"), weight), {}, "weight must be on x's device meta, got cpu"),
        "bias": ((x, weight, bias[:5]), {}, r"bias must be \[6\], got \[5\]"),
        "bias-dtype": (
            (x, weight, bias.half()),
            {},
            "bias must be torch.float32 on cpu like x, got torch.float16",
        ),
        "residual": ((x, weight), {"residual": x}, r"residual must be \[2, 6\], got \[2, 70\]"),
        "residual-glu": (
            (x, weight),
            {"residual": torch.randn(2, 6), "epilogue": "glu"},
            r"residual must be \[2, 3\], got \[2, 6\]",
        ),
    }


@pytest.mark.parametrize("name", error_cases())
def test_wrong_arguments_are_named(name):
    args, kwargs, message = error_cases()[name]
    error = NotImplementedError if name == "inputs" else ValueError
    with pytest.raises(error, match=message):
        low_bit_linear(*args, **kwargs)
