"""LowBitMatmuls: what it rounds, where it starts, and whole models trained, packed and loaded."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from lowbit_kernels import (
    LowbitConfig,
    QAttention,
    QuantConfig,
    QuantSpec,
    convert,
    dequantize,
    load_quantized,
    prepare_qat,
    quantize,
    save_quantized,
)
from lowbit_kernels.attention import TransformerXL, block_attention, low_bit_attention
from lowbit_kernels.fake_quant import Levels, Quantizer, fake_quantize
from lowbit_kernels.modules import LowBitMatmuls
from lowbit_kernels.testing import assert_as_accurate
from tests.families.models import LAYERS
from tests.fused_cases import BY_NAME, logits, ops, skip_where_attention_is_fixed

CONFIG = QuantConfig(QuantSpec(4), attention_matmuls="int4")
SHIFTED = dataclasses.replace(CONFIG, attention_shift=True)
NAMES = [
    "wav2vec2-group", "wavlm", "conformer-relative", "conformer-rotary", "wav2vec2-bert", "sew",
    "parakeet",
]  # fmt: skip


def heads(*shape):
    return [torch.randn(shape) for _ in range(3)]


def prepared(name, config=CONFIG):
    """A model that was prepared, and trained for a step that moves every scale."""
    skip_where_attention_is_fixed(name)
    model, inputs = BY_NAME[name].build(), BY_NAME[name].inputs()
    prepare_qat(model, config)
    model.train()(**inputs).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    return model.eval(), inputs


def matmuls_in(model):
    return [module for module in model.modules() if isinstance(module, LowBitMatmuls)]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("quantizer", ["lsq", "elastic"])
def test_all_four_operands_are_rounded(bits, quantizer):
    (q, k, v), matmuls = heads(2, 3, 17, 8), LowBitMatmuls(bits, quantizer)
    lengths = torch.tensor([17, 9])
    actual = matmuls(q, k, v, lengths=lengths, window=5)
    levels = Levels.of_input(bits)
    q, k, v = (
        fake_quantize(x, Quantizer(levels, step, quantizer))
        for x, step in zip((q, k, v), (matmuls.q_step, matmuls.k_step, matmuls.v_step), strict=True)
    )
    expected = low_bit_attention(q, k, v, matmuls.prob_step, bits=bits, lengths=lengths, window=5)
    assert torch.equal(actual, expected)


def test_biases_are_added_before_the_rounding_and_positions_stay_float():
    (q, k, v), matmuls = heads(1, 2, 9, 8), LowBitMatmuls(2)
    keys, biases = torch.randn(2, 17, 8), [torch.randn(2, 8) for _ in range(2)]
    actual = matmuls(q, k, v, position=TransformerXL(keys, *biases))
    quantizer = Quantizer(Levels.of_input(2), matmuls.q_step, "lsq")
    content, of_offsets = (q + bias[:, None] for bias in biases)
    steps = [
        Quantizer(Levels.of_input(2), step, "lsq") for step in (matmuls.k_step, matmuls.v_step)
    ]
    k, v = (fake_quantize(x, step) for x, step in zip((k, v), steps, strict=True))
    rounded = fake_quantize(content, quantizer)
    # the scores of the positions are the difference to what plain attention gets
    by_offset = (of_offsets @ keys.mT) / math.sqrt(8)
    bias = torch.stack([by_offset[..., t, 8 - t : 17 - t] for t in range(9)], 2)
    probs = (rounded @ k.mT / math.sqrt(8) + bias).softmax(-1)
    levels = (probs / matmuls.prob_step).clamp(max=3).round()
    torch.testing.assert_close(actual, levels * matmuls.prob_step @ v)


def test_scales_start_from_the_valid_frames_of_the_first_batch():
    (q, k, v), matmuls = heads(2, 1, 6, 4), LowBitMatmuls(4)
    for x in (q, k, v):
        x[1, :, 4:] = 1e4
    matmuls(q, k, v, lengths=torch.tensor([6, 4]))
    valid = torch.cat([k[0, 0], k[1, 0, :4]])
    torch.testing.assert_close(matmuls.k_step, 2 * valid.abs().mean() / 7**0.5)
    # ten rows that add up to 1, of 36 and 16 probabilities
    torch.testing.assert_close(matmuls.prob_step, torch.tensor(4 * 10 / 52 / 15**0.5))
    start = copy.deepcopy(matmuls.state_dict())
    matmuls(k, v, q)
    assert all(torch.equal(start[name], x) for name, x in matmuls.state_dict().items())


def test_each_feature_is_shifted_before_it_is_rounded():
    (q, k, v), matmuls = heads(2, 3, 9, 8), LowBitMatmuls(2, shifted=24)
    assert not matmuls.shift.any()
    nn.init.normal_(matmuls.shift)
    shifts = matmuls.shift.detach().view(3, 3, 1, 8)
    plain = LowBitMatmuls(2)
    expected = plain(*(x + shift for x, shift in zip((q, k, v), shifts, strict=True)))
    actual = matmuls(q, k, v)
    assert torch.equal(actual, expected)
    assert "with shifts" in repr(matmuls)
    actual.square().sum().backward()
    assert matmuls.shift.grad.abs().amin() > 0


def test_blocks_are_rounded_as_utterances_of_their_own():
    (q, k, v), matmuls = heads(2, 3, 17, 8), LowBitMatmuls(2)
    lengths = torch.tensor([17, 9])
    actual = block_attention(q, k, v, block=5, lengths=lengths, attention=matmuls)
    # with the scales that the first batch has set
    for row, length in enumerate(lengths.tolist()):
        for start in range(0, length, 5):
            frames = slice(start, min(start + 5, length))
            alone = matmuls(*(x[row : row + 1, :, frames] for x in (q, k, v)))
            torch.testing.assert_close(actual[row : row + 1, :, frames], alone)
    # ten rows that see five keys each, and a row that sees two, ...
    rows, pairs = 17 + 9, 3 * 25 + 4 + 25 + 16
    torch.testing.assert_close(matmuls.prob_step.detach(), torch.tensor(4 * rows / pairs / 3**0.5))


def test_attention_modules_find_it():
    attention = QAttention(16, 2)
    x = torch.randn(1, 5, 16)
    before = attention(x)
    attention.low_bit_matmuls = LowBitMatmuls(2)
    assert not torch.equal(attention(x), before)


@pytest.mark.parametrize("config", [CONFIG, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize("name", NAMES)
def test_models_train_and_pack(name, config):
    model, inputs = prepared(name, config)
    attention = matmuls_in(model)
    assert len(attention) == LAYERS
    for matmuls in attention:
        assert all(p.grad is not None and (p.grad != 0).any() for p in matmuls.parameters())
        assert (matmuls.shift is not None) == config.attention_shift
    trained = logits(model, inputs)
    high = logits(copy.deepcopy(model).double(), doubled(inputs))
    convert(model)
    actual, called = ops(lambda: logits(model, inputs))
    assert_as_accurate(actual, trained, high)
    assert called.count("lowbit.low_bit_attention.default") == LAYERS
    assert "lowbit.flash_attention.default" not in called


def doubled(inputs):
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


@pytest.mark.parametrize("config", [CONFIG, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize("name", ["wav2vec2-group", "conformer-relative"])
def test_checkpoints_keep_it(name, config, tmp_path):
    model, inputs = prepared(name, config)
    convert(model)
    expected = logits(model, inputs)
    save_quantized(model, tmp_path / "own")
    model.save_pretrained(tmp_path / "hf")
    for loaded in (
        load_quantized(tmp_path / "own"),
        load_quantized(tmp_path / "own", BY_NAME[name].build().eval()),
        load_quantized(tmp_path / "hf"),
        type(model).from_pretrained(tmp_path / "hf"),
    ):
        assert len(matmuls_in(loaded)) == LAYERS
        assert torch.equal(logits(loaded, inputs), expected)
    assert not matmuls_in(dequantize(model))
    # nothing refuses another attention any more
    model.set_attn_implementation("sdpa")
    logits(model, inputs)


def test_padding_changes_nothing():
    model, _ = prepared("wav2vec2-group")
    convert(model)
    family = BY_NAME["wav2vec2-group"]
    padded = logits(model, family.inputs())
    for row, alone in zip(padded, family.single_inputs(), strict=True):
        single = logits(model, alone)[0]
        assert_as_accurate(row[: len(single)], single, single.double())


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"attention_matmuls must be None or one of .*got 'int3'"):
        QuantConfig(attention_matmuls="int3")
    for shift in (True, "yes"):
        with pytest.raises(ValueError, match=f"or True with attention_matmuls, got {shift!r}"):
            QuantConfig(attention_shift=shift)
    linear = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"without attention modules .* got a Sequential"):
        prepare_qat(linear, CONFIG)
    fixed = BY_NAME["conformer-relative"].build()
    for module in fixed.modules():  # as in older versions of transformers
        if type(module).__name__ == "Wav2Vec2ConformerSelfAttention":
            module.__dict__.pop("config", None)
    with pytest.raises(ValueError, match="without attention modules that this library serves"):
        prepare_qat(fixed, CONFIG)
    model = BY_NAME["wav2vec2-group"].build()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(NotImplementedError, match="'lsq' or 'elastic', got 'ste'"):
        prepare_qat(model, CONFIG, "ste")
    with pytest.raises(NotImplementedError, match="prepare_qat serves them"):
        quantize(model, CONFIG)
    assert {name: type(module) for name, module in model.named_modules()} == before
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="prepare_qat serves them"):
        type(model).from_pretrained(
            tmp_path, quantization_config=LowbitConfig(config=CONFIG.to_dict())
        )


def test_products_alone_survive_where_a_layer_is_exposed():
    """A Squeezeformer's layer stands aside while it is converted, and comes back if nothing was."""
    from tests.ssl_cases import build

    model = build("squeezeformer")
    prepare_qat(model, QuantConfig(skip=(".",), attention_matmuls="int4"))
    assert sum(isinstance(module, LowBitMatmuls) for module in model.modules()) == 4
