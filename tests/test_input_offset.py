"""Int8 inputs around a static offset: what it computes, that it helps, and that it survives."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from lowbit_kernels import (
    QConv1d,
    QLinear,
    QuantConfig,
    QuantSpec,
    dequantize,
    load_quantized,
    quantize,
    save_quantized,
)
from lowbit_kernels.conv1d.reference import quantize_utterances
from lowbit_kernels.testing import assert_as_accurate

SPEC = QuantSpec(bits=4, inputs="int8", input_offset=True)
FAST = QuantConfig.fast()


def offset_conv(bias: bool = True) -> QConv1d:
    layer = QConv1d.from_float(nn.Conv1d(20, 33, 3, stride=2, bias=bias), SPEC)
    layer.set_input_offset(torch.randn(20))
    return layer.requires_grad_(False)


def expected(layer: QConv1d, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float convolution of what the int8 input stands for."""
    assert layer.input_offset is not None
    offset = layer.input_offset[:, None]
    q, scale = quantize_utterances(x - offset)
    rounded = q.to(dtype) * scale[:, None, None].to(dtype) + offset.to(dtype)
    weight = layer.quantized_weight().dequantize(dtype).view(33, 3, 20).transpose(1, 2)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.conv1d(rounded, weight, bias, stride=2)


def model(norm: str = "group", seed: int = 0) -> transformers.Wav2Vec2Model:
    """A tiny encoder whose norms are not at their initial values: silence is not zero."""
    torch.manual_seed(seed)
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32, 48, 32),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        conv_bias=norm == "layer",
        feat_extract_norm=norm,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    built = transformers.Wav2Vec2Model(config).eval()
    for layer in built.feature_extractor.conv_layers:
        if getattr(layer, "layer_norm", None) is not None:
            nn.init.normal_(layer.layer_norm.bias)
    return built


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_it_convolves_the_rounded_distance_and_the_offset(bias: bool, scale: float):
    layer = offset_conv(bias)
    assert layer.input_offset is not None
    x = torch.randn(2, 20, 41) * scale + layer.input_offset[:, None]
    low, high = (expected(layer, x, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_accurate(layer(x).contiguous(), low, high)


def test_an_input_at_the_offset_loses_nothing():
    layer = offset_conv()
    assert layer.input_offset is not None
    x = layer.input_offset[:, None].expand(1, 20, 41).clone()
    x[..., 30:] += 100.0 * torch.randn(20, 11)  # a loud end must not coarsen the quiet beginning
    plain = layer.to_float()
    low, high = plain(x)[..., :14], plain.double()(x.double())[..., :14]
    assert_as_accurate(layer(x)[..., :14].contiguous(), low.contiguous(), high)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_layer_keeps_its_offset_in_float32(dtype: torch.dtype):
    layer = offset_conv()
    wide = copy.deepcopy(layer)
    layer.to(dtype)
    assert layer.input_offset is not None
    assert layer.offset_bias is not None
    assert layer.input_offset.dtype == layer.offset_bias.dtype == torch.float32
    assert torch.equal(layer.input_offset, wide.input_offset)
    assert layer(torch.randn(1, 20, 41, dtype=dtype)).dtype == dtype


def test_gradients_reach_the_input_and_the_bias():
    layer = offset_conv().requires_grad_(True)
    x = torch.randn(1, 20, 41, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias.grad, 20.0))


def test_a_new_weight_gets_a_new_share_of_the_bias():
    layer, other = offset_conv(), nn.Conv1d(20, 33, 3, stride=2)
    x = torch.randn(1, 20, 41)
    with pytest.warns(UserWarning, match="requantized"):
        layer.weight = other.weight
    assert_as_accurate(
        layer(x).contiguous(), expected(layer, x, torch.float32), expected(layer, x, torch.float64)
    )
    loaded = offset_conv()
    loaded.set_input_offset(layer.input_offset)
    loaded.load_state_dict(other.state_dict())  # a float checkpoint is quantized on the way in
    loaded.bias, layer.bias = None, None
    assert torch.equal(loaded(x), layer(x))


def test_a_merged_adapter_gets_a_new_share_of_the_bias():
    layer, x = offset_conv(), torch.randn(1, 20, 41)
    with pytest.warns(UserWarning, match="requantized"):
        layer.weight.data += torch.randn(33, 20, 3)
    assert_as_accurate(
        layer(x).contiguous(), expected(layer, x, torch.float32), expected(layer, x, torch.float64)
    )


@pytest.mark.parametrize(
    "offset", [torch.randn(()), torch.randn(1, 20), torch.randn(33), torch.full((20,), torch.inf)]
)
def test_wrong_offsets_are_refused(offset: torch.Tensor):
    layer = offset_conv()
    before = layer.input_offset.clone()
    with pytest.raises(ValueError, match=r"offset must be finite and of shape \(20,\), got"):
        layer.set_input_offset(offset)
    assert torch.equal(layer.input_offset, before)
    plain = QConv1d(20, 33, 3, spec=QuantSpec(inputs="int8"))
    with pytest.raises(ValueError, match=r"spec\.input_offset must be True to set"):
        plain.set_input_offset(torch.randn(20))


def test_an_offset_that_needs_gradients_is_a_constant():
    layer = offset_conv()
    layer.set_input_offset(torch.randn(20, requires_grad=True))
    assert not layer.input_offset.requires_grad
    assert not layer.offset_bias.requires_grad


def test_wrong_layers_are_refused():
    for conv in (nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(4, 8, 3, groups=2), nn.Conv1d(4, 8, 1)):
        with pytest.raises(ValueError, match=r"spec\.input_offset must be False .* got True"):
            QConv1d.from_float(conv, SPEC)
    with pytest.raises(ValueError, match=r"spec\.input_offset must be False for a linear"):
        QLinear(8, 8, spec=SPEC)
    with pytest.raises(ValueError, match="input_offset must be False, or True"):
        QuantSpec(input_offset=True)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_quantize_finds_what_the_front_end_sees_in_silence(norm: str):
    plain = model(norm)
    seen = []
    for layer in plain.feature_extractor.conv_layers[1:]:
        layer.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        plain.feature_extractor(torch.zeros(1, 4000))
    quantized = model(norm)
    quantize(quantized, FAST)
    convs = [layer.conv for layer in quantized.feature_extractor.conv_layers[1:]]
    for x, conv in zip(seen, convs, strict=True):
        assert conv.spec.input_offset
        assert conv.input_offset.abs().max() > 0
        torch.testing.assert_close(conv.input_offset, x[0, :, x.shape[2] // 2])
    assert not quantized.encoder.pos_conv_embed.conv.spec.input_offset


def offsets_of(quantized: nn.Module) -> list[torch.Tensor]:
    layers = quantized.feature_extractor.conv_layers[1:]
    return [layer.conv.input_offset for layer in layers]


def with_random_layers() -> transformers.Wav2Vec2Model:
    built = model("layer")
    for layer, channels in zip(built.feature_extractor.conv_layers, (32, 48, 32), strict=True):
        layer.activation = nn.Sequential(nn.BatchNorm1d(channels), nn.Dropout(0.5))
    return built


def test_the_run_on_silence_leaves_no_trace_in_a_model_in_training():
    still, training = with_random_layers(), with_random_layers().train()
    training.feature_extractor.conv_layers[1].eval()
    norm = training.feature_extractor.conv_layers[0].activation[0]
    mean, random = norm.running_mean.clone(), torch.get_rng_state()
    quantize(still, FAST)
    quantize(training, FAST)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(norm.running_mean, mean)
    assert norm.num_batches_tracked == 0
    assert training.training
    modes = [layer.training for layer in training.feature_extractor.conv_layers]
    assert modes == [True, False, True]
    for wanted, got in zip(offsets_of(still), offsets_of(training), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_a_front_end_quantized_after_the_rest_gets_its_offsets(norm: str):
    at_once, in_parts = model(norm), model(norm)
    quantize(at_once, FAST)
    quantize(in_parts, QuantConfig(FAST.default, overrides={"feature_extractor": None}))
    quantize(in_parts, FAST)
    for wanted, got in zip(offsets_of(at_once), offsets_of(in_parts), strict=True):
        assert torch.equal(got, wanted)


def test_a_half_precision_model_gets_offsets_where_they_are_finite():
    half, large = model("layer").half(), model("layer").half()
    large.feature_extractor.conv_layers[0].layer_norm.bias.data.fill_(torch.inf)
    quantize(half, FAST)
    quantize(large, FAST)
    assert all(offset.dtype == torch.float32 for offset in offsets_of(half))
    assert offsets_of(large) == [None, None]


def test_a_model_on_meta_is_refused_before_it_is_run():
    with pytest.raises(ValueError, match="layers on the meta device"):
        quantize(model().to("meta"), FAST)


def test_a_dry_run_says_what_will_get_an_offset():
    quantized = model()
    before = copy.deepcopy(quantized.state_dict())
    dry = quantize(quantized, FAST, dry_run=True)
    assert all(torch.equal(before[key], value) for key, value in quantized.state_dict().items())
    assert sum("around an offset" in (layer.spec or "") for layer in dry.layers) == 2
    assert quantize(quantized, FAST).to_dict() == dry.to_dict()


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_quiet_speech_beside_loud_speech_keeps_its_features(norm: str):
    wave = torch.randn(1, 4000)
    wave[:, 1000:] *= 1e-3
    plain, quantized, without = model(norm), model(norm), model(norm)
    for each in (quantized, without):
        quantize(each, QuantConfig.fast(8))
    for layer in without.feature_extractor.conv_layers[1:]:
        layer.conv.set_input_offset(torch.zeros_like(layer.conv.input_offset))
    with torch.no_grad():
        wanted, y, y_without = (
            m.feature_extractor(wave)[..., 100:] for m in (plain, quantized, without)
        )
    error, error_without = (y - wanted).norm(), (y_without - wanted).norm()
    assert error < error_without / 2


def test_static_scales_are_of_the_distance():
    clips = [torch.randn(2000) for _ in range(3)]
    plain, quantized = model("layer"), model("layer")
    largest = [torch.zeros(())]
    quantize(quantized, FAST, calibration=clips)
    conv = quantized.feature_extractor.conv_layers[1].conv

    def watch(_, args):
        distance = (args[0] - conv.input_offset[:, None]).abs().amax()
        largest.append(torch.maximum(largest[-1], distance))

    plain.feature_extractor.conv_layers[1].conv.register_forward_pre_hook(watch)
    with torch.no_grad():
        for clip in clips:
            plain(clip[None])
    assert conv.spec.input_offset
    torch.testing.assert_close(conv.input_scale, largest[-1] / 127)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_a_padded_batch_equals_single_utterances_layer_by_layer(norm: str):
    quantized = model(norm)
    quantize(quantized, FAST)
    waves, lengths = torch.randn(2, 900), (900, 620)
    waves[1, 620:] = 0
    mask = (torch.arange(900) < torch.tensor(lengths)[:, None]).long()
    # gradients keep the model from its fused call
    batch = quantized(waves, attention_mask=mask).last_hidden_state.detach()
    for b, length in enumerate(lengths):
        alone = quantized(waves[b : b + 1, :length]).last_hidden_state.detach()
        low = batch[b : b + 1, : alone.shape[1]]
        assert_as_accurate(low.contiguous(), alone, alone.double())


def test_checkpoints_keep_the_offsets(tmp_path):
    quantized, wave = model(), torch.randn(1, 2000)
    quantize(quantized, FAST)
    with torch.no_grad():
        wanted = quantized(wave).last_hidden_state
        save_quantized(quantized, tmp_path / "a")
        assert torch.equal(load_quantized(tmp_path / "a")(wave).last_hidden_state, wanted)
        quantized.save_pretrained(tmp_path / "b")
        again = transformers.Wav2Vec2Model.from_pretrained(tmp_path / "b").eval()
        assert torch.equal(again(wave).last_hidden_state, wanted)
        half = transformers.Wav2Vec2Model.from_pretrained(tmp_path / "b", dtype=torch.float16)
    conv, wide = (m.feature_extractor.conv_layers[1].conv for m in (half, quantized))
    assert conv.input_offset.dtype == torch.float32
    assert torch.equal(conv.input_offset, wide.input_offset)


def test_dequantize_gives_plain_convolutions_back():
    quantized = model()
    quantize(quantized, FAST)
    dequantize(quantized)
    conv = quantized.feature_extractor.conv_layers[1].conv
    assert type(conv) is nn.Conv1d
    assert not dict(conv.named_buffers())
