"""The fused front end inside transformers' models: what it equals, and where it steps aside."""

import copy

import pytest
import torch
import transformers

from lowbit_kernels import QuantConfig, quantize
from lowbit_kernels.testing import assert_as_accurate

CALLS = "lowbit::front_end"


def build(norm="group", activation="gelu", bias=False):
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32, 48, 32),
        conv_kernel=(10, 3, 2),
        conv_stride=(5, 2, 2),
        conv_bias=bias,
        feat_extract_norm=norm,
        feat_extract_activation=activation,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    return transformers.Wav2Vec2Model(config).eval()


def calls(function):
    """Names of the lowbit ops that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = function()
    return out, [event.name for event in profile.events() if event.name.startswith("lowbit::")]


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "gelu_new"])
def test_one_call_is_as_accurate_as_the_layers(norm, activation):
    model = build(norm, activation, bias=norm == "layer")
    quantize(model, QuantConfig.small())
    encoder = model.feature_extractor
    waves = torch.randn(2, 800)
    with torch.no_grad():
        fused, names = calls(lambda: encoder(waves))
        layered, layer_names = calls(lambda: call_layers(encoder, waves))
        high = call_layers(copy.deepcopy(encoder).double(), waves.double())
    assert names == [CALLS]
    assert layer_names.count("lowbit::conv1d") == 2
    assert_as_accurate(fused.contiguous(), layered.contiguous(), high)


def call_layers(encoder, waves):
    x = waves[:, None]
    for layer in encoder.conv_layers:
        x = layer(x)
    return x


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("config", [QuantConfig.small(), QuantConfig.fast()], ids=["small", "fast"])
def test_a_padded_batch_equals_single_utterances(norm, config):
    model = build(norm, bias=norm == "layer")
    quantize(model, config)
    lengths = (900, 620)
    waves = torch.randn(2, 900)
    waves[1, 620:] = 0
    mask = (torch.arange(900) < torch.tensor(lengths)[:, None]).long()
    with torch.inference_mode():
        batch = model(waves, attention_mask=mask).last_hidden_state
        for b, length in enumerate(lengths):
            alone = model(waves[b : b + 1, :length]).last_hidden_state
            low = batch[b : b + 1, : alone.shape[1]]
            assert_as_accurate(low, alone, alone.double())


def test_training_goes_through_the_layers():
    model = build()
    quantize(model)
    waves = torch.randn(1, 800)
    out, names = calls(lambda: model(waves).last_hidden_state)
    assert CALLS not in names
    assert "lowbit::conv1d_train" in names
    out.sum().backward()
    first = model.feature_extractor.conv_layers[0].conv.weight
    assert first.grad is not None
    assert first.grad.abs().max() > 0


def test_a_compiled_model_keeps_the_one_call():
    model = build()
    quantize(model, QuantConfig.fast())
    with torch.no_grad():
        wanted = [model(torch.full((1, T), 0.1)).last_hidden_state for T in (700, 800)]
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        for T, want in zip((700, 800), wanted, strict=True):
            assert torch.equal(compiled(torch.full((1, T), 0.1)).last_hidden_state, want)


def test_other_forms_keep_their_layers():
    mixed = QuantConfig.fast()
    mixed = QuantConfig(mixed.default, overrides={r"conv_layers\.2": QuantConfig.small().default})
    for config, activation in ((mixed, "gelu"), (QuantConfig.small(), "tanh")):
        model = build(activation=activation)
        quantize(model, config)
        with torch.no_grad():
            _, names = calls(lambda model=model: model(torch.randn(1, 800)))
        assert CALLS not in names


def test_too_short_a_waveform_is_named():
    model = build()
    quantize(model)
    with torch.no_grad(), pytest.raises(ValueError, match=r"long enough for a frame, got 20"):
        model.feature_extractor(torch.randn(1, 20))


def test_the_feed_forward_and_positional_activations_are_fused():
    model = build()
    quantize(model)
    with torch.no_grad():
        model(torch.randn(1, 800))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(torch.randn(1, 800))
    assert not [event.name for event in profile.events() if event.name == "aten::gelu"]


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("config", [QuantConfig.small(), QuantConfig.fast()], ids=["small", "fast"])
def test_a_gpu_makes_one_call_in_16_bits(norm, config):
    model = build(norm, bias=norm == "layer")
    quantize(model, config)
    encoder, waves = model.cuda().half().feature_extractor, torch.randn(2, 800).cuda()
    with torch.no_grad():
        fused, names = calls(lambda: encoder(waves.half()))
        layered, layer_names = calls(lambda: call_layers(encoder, waves.half()))
        high = call_layers(copy.deepcopy(encoder).cpu().double(), waves.cpu().double())
        _, wide_names = calls(lambda: encoder.float()(waves))
    assert names == [CALLS]
    assert CALLS not in layer_names + wide_names
    assert_as_accurate(fused.cpu().contiguous(), layered.cpu().contiguous(), high)
