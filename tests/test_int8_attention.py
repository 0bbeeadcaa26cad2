"""int8_scores_attention: kernels against the reference, what smoothing is for, errors.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from lowbit_kernels import QuantConfig, prepare_qat, quantize
from lowbit_kernels.attention import (
    RelativeKey,
    TransformerXL,
    flash_attention,
    flash_attention_reference,
    forward_kernel,
    int8_op,
    int8_scores_attention,
)
from lowbit_kernels.attention.config import default_config
from lowbit_kernels.attention.forward_kernel import flash_attention_triton
from lowbit_kernels.attention.int8_kernel import quantize_heads_triton
from lowbit_kernels.attention.int8_reference import (
    BLOCK_FRAMES,
    dequantize_heads,
    quantize_heads_reference,
)
from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.integrations.chosen_attention import attend
from lowbit_kernels.testing import assert_as_accurate
from tests.families.models import LAYERS
from tests.fused_cases import BY_NAME, build, logits, ops, skip_where_attention_is_fixed
from tests.test_attention import DTYPES, make_inputs, make_lengths
from tests.test_attention_position import make_scheme

SHAPES = [  # B, H, T, D, lengths, window
    pytest.param(1, 2, 128, 64, None, None, id="whole-tiles"),
    pytest.param(2, 2, 150, 36, (150, 70), None, id="ragged"),
    pytest.param(2, 1, 300, 8, (299, 257), 9, id="more-frames-than-the-mean-takes"),
    pytest.param(3, 1, 37, 16, (37, 0, 1), None, id="length-0-and-1"),
    pytest.param(1, 3, 5, 81, None, None, id="odd-head"),
    pytest.param(1, 1, 101, 17, (97,), 7, id="window"),
    pytest.param(8, 12, 499, 64, (499, 1, 0, 400, 64, 65, 128, 498), None, id="wav2vec2-base",
                 marks=pytest.mark.gpu),
    pytest.param(2, 4, 1501, 81, (1501, 800), 256, id="window-30s", marks=pytest.mark.gpu),
]  # fmt: skip
KINDS = [None, "dense", "gated", "relative"]


def scheme_of(kind, B, H, T, D, dtype, device):
    if kind == "dense":
        return Scheme("dense", torch.randn(B, H, T, T, dtype=dtype, device=device))
    return kind and make_scheme(kind, B, H, T, D, T - 1, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "H", "T", "D", "lengths", "window"), SHAPES)
def test_rounding(B, H, T, D, lengths, window, dtype, device):
    q, k, _, _ = make_inputs(B, H, T, D, dtype, device)
    k += 3  # as a feature whose keys all have an offset
    lengths = make_lengths(lengths, device)
    for x in (q, k) if lengths is not None else ():
        x.masked_fill_(
            (torch.arange(T, device=device) >= lengths[:, None])[:, None, :, None], torch.nan
        )
    q8, k8, scales = quantize_heads_triton(q, k, lengths)
    low = quantize_heads_reference(q, k, lengths)
    high = quantize_heads_reference(q.double(), k.double(), lengths)
    assert_as_accurate(scales, low[2], high[2])
    assert scales.shape == (B, H, 2, -(-T // BLOCK_FRAMES))
    for ours, theirs in ((q8, high[0]), (k8, high[1])):
        change = (ours.int() - theirs.int()).abs()
        # where a quotient lies between two levels to within its rounding
        assert change.max() <= 1
        assert change.float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "H", "T", "D", "lengths", "window"), SHAPES)
def test_kernel_is_as_accurate_as_torch(B, H, T, D, lengths, window, kind, dtype, device):
    q, k, v, _ = make_inputs(B, H, T, D, dtype, device)
    scheme = scheme_of(kind, B, H, T, D, dtype, device)
    lengths = make_lengths(lengths, device)
    q8, k8, scales = quantize_heads_triton(q, k, lengths)
    actual, _ = flash_attention_triton(
        q8, k8, v, lengths, scheme, None, window, D**-0.5, 0.0, block_scales=scales
    )

    def reference(wide):
        rounded = dequantize_heads(q8, k8, scales.to(wide))
        bias = scheme and scheme.to(wide).scores(T, D**-0.5)
        return flash_attention_reference(*rounded, v.to(wide), lengths, bias, window, D**-0.5)[0]

    assert_as_accurate(actual, reference(torch.float32).to(dtype), reference(torch.float64))


def test_tiles_of_more_queries_than_share_a_scale(device, monkeypatch):
    # those of a large GPU
    monkeypatch.setattr(forward_kernel, "shared_bytes", lambda device: 227 * 1024)
    assert default_config("forward", 64, torch.float16, None, False, 227 * 1024).block_m == 128
    q, k, v, _ = make_inputs(1, 1, 200, 64, torch.float16, device)
    q *= torch.linspace(0.1, 2, 200, device=device)[:, None]
    q8, k8, scales = quantize_heads_triton(q, k, None)
    actual, _ = flash_attention_triton(
        q8, k8, v, None, None, None, None, 0.125, 0.0, block_scales=scales
    )
    rounded = dequantize_heads(q8, k8, scales.double())
    high, _ = flash_attention_reference(*rounded, v.double(), None, None, None, 0.125)
    assert_as_accurate(actual, high.half(), high)


@pytest.mark.parametrize("kind", KINDS)
def test_devices_agree(kind, device):
    q, k, v, _ = make_inputs(2, 3, 70, 16, torch.float16, device)
    scheme, lengths = (
        scheme_of(kind, 2, 3, 70, 16, torch.float16, device),
        make_lengths((70, 33), device),
    )
    of_scheme = (None,) * 3 if scheme is None else (scheme.kind, scheme.table, scheme.rows)
    arguments = (q, k, v, lengths, *of_scheme, 20, 0.25)
    op = torch.ops.lowbit.int8_scores_attention
    expected = op(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments))
    actual = int8_op._cuda(*arguments).cpu()
    # one level of one product may differ
    assert_as_accurate(actual, expected, expected.double() + 1e-3)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_is_close_to_attention_whatever_the_offset_of_the_keys(offset, device):
    # without smoothing, keys of mean 30 and deviation 1 would have four levels a deviation
    q, k, v, _ = make_inputs(2, 2, 150, 64, torch.float32, device)
    lengths = make_lengths((150, 80), device)
    actual = int8_scores_attention(q, k + offset, v, lengths=lengths)
    expected = flash_attention(
        q.double().cpu(), k.double().cpu(), v.double().cpu(), lengths=lengths.cpu()
    )
    error = (actual.cpu() - expected).square().mean() / expected.square().mean()
    assert 1e-6 < error < 4e-4  # 34 dB


@pytest.mark.parametrize(
    "position",
    [
        lambda D: RelativeKey(torch.randn(9, D), 4),
        lambda D: TransformerXL(torch.randn(2, 41, D), torch.randn(2, D), torch.randn(2, D)),
    ],
    ids=["relative-key", "transformer-xl"],
)
def test_positions_stay_in_float(position):
    q, k, v, _ = make_inputs(2, 2, 21, 32, torch.float64, "cpu")
    position = position(32)
    position = type(position)(
        *(x.double() if isinstance(x, torch.Tensor) else x for x in vars(position).values())
    )
    actual = int8_scores_attention(q, k, v, position=position)
    expected = flash_attention(q, k, v, position=position)
    error = (actual - expected).square().mean() / expected.square().mean()
    assert 1e-6 < error < 1e-3


def test_op_is_registered_correctly(device):
    q, k, v, _ = make_inputs(2, 2, 12, 16, torch.float32, device)
    torch.library.opcheck(
        torch.ops.lowbit.int8_scores_attention.default,
        (q, k, v, torch.tensor([12, 5], device=device), None, None, None, 4, 0.25),
    )


def test_compiles_with_dynamic_frames(device):
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def attend(q, k, v, lengths):
        return int8_scores_attention(q, k, v, lengths=lengths)

    for T in (12, 17, 23):
        q, k, v, _ = make_inputs(2, 2, T, 8, torch.float32, device)
        lengths = torch.tensor([T, 5], device=device)
        expected = int8_scores_attention(q, k, v, lengths=lengths)
        assert torch.equal(attend(q, k, v, lengths), expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
def test_empty(shape, device):
    q = torch.randn(shape, device=device)
    assert int8_scores_attention(q, q, q).shape == shape


def test_wrong_arguments():
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="q: int8 scores have no gradient"):
        int8_scores_attention(q.clone().requires_grad_(), q, q)
    with pytest.raises(ValueError, match="window must be an int >= 0"):
        int8_scores_attention(q, q, q, window=-1)
    table = TransformerXL(torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"position.keys must have 2 R \+ 1 offsets"):
        int8_scores_attention(q, q, q, position=table)


@pytest.mark.parametrize(
    "name",
    ["wav2vec2-group", "conformer-relative", "conformer-rotary", "wav2vec2-bert", "parakeet"],
)
def test_transformers_choose_it_by_name(name):
    skip_where_attention_is_fixed(name)
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs()
    quantize(model)
    model.set_attn_implementation("lowbit")
    expected = logits(model, inputs)
    model.set_attn_implementation("lowbit_int8")
    actual, called = ops(lambda: logits(model, inputs))
    assert called.count("lowbit.int8_scores_attention.default") == LAYERS
    error = (actual - expected).square().mean() / expected.square().mean()
    assert 0 < error < 1e-3
    for row, alone in zip(actual, family.single_inputs(), strict=True):
        single = logits(model, alone)[0]
        # padding joins no block's scale and no mean
        assert_as_accurate(row[: len(single)], single, single.double() + 1e-3)
    with pytest.raises(ValueError, match=r"int8 scores have no gradient|must be 'lowbit'"):
        model.train()(**inputs)


@pytest.mark.parametrize("preset", ["small", "static"])
@pytest.mark.parametrize("name", ["wav2vec2-group", "conformer-relative"])
def test_fused_layers_choose_it_too(name, preset):
    model, inputs = build(name, preset, fuse=True), BY_NAME[name].inputs()
    expected, before = ops(lambda: logits(model, inputs))
    model.set_attn_implementation("lowbit_int8")
    actual, called = ops(lambda: logits(model, inputs))
    assert called.count("lowbit.int8_scores_attention.default") == LAYERS
    # attention with int8 scores leaves the rounding by a static scale to the layer behind it
    assert len(called) <= len(before) + (LAYERS if preset == "static" else 0)
    assert "lowbit.flash_attention.default" not in called
    assert 0 < (actual - expected).square().mean() / expected.square().mean() < 1e-2


def test_low_bit_products_and_dropout_are_refused_by_that_name():
    model, inputs = BY_NAME["wav2vec2-group"].build(), BY_NAME["wav2vec2-group"].inputs()
    prepare_qat(model, QuantConfig(attention_matmuls="int8"))
    model.set_attn_implementation("lowbit_int8")
    with pytest.raises(ValueError, match="must be 'lowbit' for a model with attention_matmuls"):
        logits(model, inputs)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"must be 'lowbit' .* got 'sdpa'"):
        logits(model, inputs)
    model.set_attn_implementation("lowbit_int8")
    module = model.wav2vec2.encoder.layers[0].attention
    with pytest.raises(ValueError, match="must be 'lowbit' for training"):
        attend(module, *heads(), dropout_p=0.1)


def heads():
    return [torch.randn(1, 2, 5, 8) for _ in range(3)]
