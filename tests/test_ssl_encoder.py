"""Speech encoders in float: against transformers, padding, gradients, graphs, errors."""

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
    Wav2Vec2Model,
    audio_utils,
)

from lowbit_kernels import QuantConfig, quantize
from lowbit_kernels.testing import assert_as_accurate
from ssl_models.config import SpeechEncoderConfig
from ssl_models.encoder import SpeechEncoder
from ssl_models.fbank import log_mel_energies
from ssl_models.huggingface import from_hf
from ssl_models.squeezeformer import TimeRecovery, TimeReduction
from ssl_models.transformer import SelfAttention
from tests.fused_cases import ops
from tests.ssl_cases import KINDS, LENGTHS, SMALL, build, encode, exact, inputs, small_config


def theirs(kind: str, norm: str) -> Any:
    """A model of transformers with the same dimensions."""
    classes = {
        "conformer": (Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel),
        "pre-norm": (HubertConfig, HubertModel),
    }
    config, model = classes.get(kind, (Wav2Vec2Config, Wav2Vec2Model))
    options: dict[str, Any] = {"conv_depthwise_kernel_size": 7} if kind == "conformer" else {}
    return model(
        config(
            conv_dim=SMALL["conv_dims"], conv_kernel=SMALL["conv_kernels"],
            conv_stride=SMALL["conv_strides"], num_feat_extract_layers=2, conv_bias=norm == "layer",
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, feat_extract_norm=norm,
            do_stable_layer_norm=kind == "pre-norm", apply_spec_augment=False,
            hidden_act="silu" if kind == "conformer" else "gelu", **options,
        )
    ).eval()  # fmt: skip


def test_mel_energies_are_kaldis() -> None:
    waveform = torch.randn(2, 4321).double() * 0.1
    filters = audio_utils.mel_filter_bank(
        257, 80, 20, 8000, 16000, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    window = audio_utils.window_function(400, "povey", periodic=False)
    wanted = [
        audio_utils.spectrogram(
            row.numpy() * 2**15, window, 400, 160, 512, 2.0, center=False, preemphasis=0.97,
            mel_filters=filters, log_mel="log", mel_floor=torch.finfo(torch.float32).eps,
            remove_dc_offset=True, dtype="float64",
        ).T
        for row in waveform
    ]  # fmt: skip
    # transformers rounds spectra to fp32
    theirs = torch.tensor(numpy.stack(wanted)).float()
    assert_as_accurate(theirs, log_mel_energies(waveform.float()), log_mel_energies(waveform))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("dims", "counts"),
    # 7 windows and 3: two a frame, or convolved
    [(None, [3, 1]), ((24,), [3, 1]), ((24, 16), [3, 1])],
    ids=["stacked", "convolved", "twice"],
)
def test_mel_frames_of_a_padded_utterance_are_its_own(
    dims: tuple[int, ...] | None, counts: list[int], dtype: torch.dtype
) -> None:
    kernels, strides = ((3, 1)[: len(dims)], (2, 1)[: len(dims)]) if dims else (None, None)
    options = {
        "front_end": "fbank", "conv_dims": dims, "conv_kernels": kernels, "conv_strides": strides,
        "conv_norm": "layer",
    }  # fmt: skip
    encoder, wide = (build("squeezeformer", **options).to(t) for t in (dtype, torch.float64))
    batch = inputs()
    batch["waveforms"] = (0.1 * batch["waveforms"]).to(dtype)
    precise = batch | {"waveforms": batch["waveforms"].double()}
    frames, lengths = encoder(**batch)
    assert frames.shape == (2, counts[0], 32)
    assert lengths.tolist() == counts
    assert encoder.feature_extractor.min_samples <= 1500
    for i, row in enumerate(encode(encoder, batch)):
        assert_as_accurate(row, alone(encoder, batch, i), alone(wide, precise, i))


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("kind", ["post-norm", "pre-norm", "conformer"])
def test_outputs_are_those_of_transformers(kind: str, norm: str, is_padded: bool) -> None:
    if is_padded and (norm == "group" or kind == "conformer"):
        pytest.skip("GroupNorm and convolution modules of transformers see padding")
    ours = build(kind, conv_norm=norm, conv_bias=norm == "layer")
    reference = theirs(kind, norm)
    missing, unexpected = reference.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    # a conformer's is not used
    assert all(n == "masked_spec_embed" or "pos_conv_embed" in n for n in missing)
    batch = inputs()
    waveforms, mask = batch["waveforms"], None
    if is_padded:
        mask = (torch.arange(waveforms.shape[1]) < batch["lengths"][:, None]).long()
    else:
        batch.pop("lengths")
    with torch.inference_mode():
        low = reference(waveforms, attention_mask=mask).last_hidden_state
        high = reference.double()(waveforms.double(), attention_mask=mask).last_hidden_state
    for row, a, b in zip(encode(ours, batch), low, high, strict=True):
        assert_as_accurate(row, a[: len(row)], b[: len(row)])


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("kind", ["post-norm", "pre-norm", "conformer"])
def test_a_model_of_transformers_becomes_an_encoder(kind: str, norm: str) -> None:
    torch.manual_seed(3)
    model, waveforms = theirs(kind, norm), inputs()["waveforms"]
    encoder = from_hf(model)
    assert not encoder.training
    with torch.inference_mode():
        found, _ = encoder(waveforms)
        low = model(waveforms).last_hidden_state
        high = model.double()(waveforms.double()).last_hidden_state
    assert_as_accurate(found, low, high)
    assert from_hf(model.train()).training
    assert next(from_hf(model).parameters()).dtype == torch.float64


def test_a_head_is_left_behind() -> None:
    model = HubertForCTC(theirs("pre-norm", "layer").config)
    encoder = from_hf(model)
    assert encoder.state_dict().keys() < model.hubert.state_dict().keys()


@pytest.mark.parametrize(
    ("key", "value"),
    [("layer_norm_eps", 1e-6), ("feat_proj_layer_norm", False), ("conv_pos_batch_norm", True),
     ("feat_extract_activation", "relu"), ("hidden_act", "quick_gelu"), ("model_type", "sew")],
)  # fmt: skip
def test_parts_that_an_encoder_has_not_are_refused(key: str, value: Any) -> None:
    model = theirs("pre-norm", "layer")
    if key == "model_type":
        model.config.__class__ = type("Config", (HubertConfig,), {"model_type": value})
        key = "HubertModel"
    else:
        setattr(model.config, key, value)
    with pytest.raises(ValueError, match=rf"{key}.*|.*{key}"):
        from_hf(model)
    with pytest.raises(ValueError, match=r"model must be one of .*, got a Linear"):
        from_hf(nn.Linear(2, 2))


def alone(encoder: nn.Module, batch: dict[str, Tensor], i: int) -> Tensor:
    length = int(batch["lengths"][i])
    return encode(encoder, {"waveforms": batch["waveforms"][i : i + 1, :length]})[0]


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_utterance_equals_a_single_one(kind: str, norm: str, device: torch.device) -> None:
    encoder, batch = build(kind, conv_norm=norm).to(device), inputs(device)
    wide = build(kind, conv_norm=norm).double().to(device)
    precise = batch | {"waveforms": batch["waveforms"].double()}
    for i, row in enumerate(encode(encoder, batch)):
        assert_as_accurate(row, alone(encoder, batch, i), alone(wide, precise, i))


# a constant for all keys, or before a norm over frames, changes nothing
NO_GRADIENT = ("k_proj.bias", "linear_k.bias", "conv_module.depthwise_conv.bias")


def train(kind: str, value: float, extra: int, dtype: torch.dtype) -> list[Tensor]:
    """Valid frames, gradients and running statistics of one step; what and how much padding."""
    encoder, batch = build(kind).train().to(dtype), inputs()
    batch["waveforms"][1, LENGTHS[1] :] = value
    waveforms = nn.functional.pad(batch["waveforms"].to(dtype), (0, extra), value=value)
    frames, lengths = encoder(waveforms, batch["lengths"])
    rows = [row[:length] for row, length in zip(frames, lengths.tolist(), strict=True)]
    torch.cat(rows).square().mean().backward()
    grads = [p.grad for n, p in encoder.named_parameters() if not n.endswith(NO_GRADIENT)]
    statistics = [m.running_var for m in encoder.modules() if isinstance(m, nn.BatchNorm1d)]
    groups = [group for group in (rows, grads, statistics) if group]
    return [torch.cat([t.detach().flatten() for t in group]) for group in groups]


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_see_padding(kind: str) -> None:
    low, high = (train(kind, 0.0, 0, dtype) for dtype in (torch.float32, torch.float64))
    for found, a, b in zip(train(kind, -50.0, 700, torch.float32), low, high, strict=True):
        assert_as_accurate(found, a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_to_every_parameter(kind: str) -> None:
    encoder = build(kind).train()
    frames, lengths = encoder(**inputs())
    weights = torch.randn_like(frames)
    for row, weight, length in zip(frames, weights, lengths.tolist(), strict=True):
        (row[:length] * weight[:length]).sum().backward(retain_graph=True)
    for name, parameter in encoder.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        assert grad.isfinite().all(), name
        assert grad.any() or name.endswith(NO_GRADIENT), name


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_this_librarys_and_nothing_grows_with_the_square(kind: str) -> None:
    encoder, batch = build(kind).train(), inputs()
    names = ops(lambda: encoder(**batch)[0].sum().backward())[1]
    assert names.count("lowbit.flash_attention.default") == 4
    assert names.count("lowbit.flash_attention_backward.default") == 4
    assert not any("scaled_dot_product" in n or "softmax" in n or "bmm" in n for n in names)


@pytest.mark.parametrize("kind", ["sliding", "block"])
def test_a_sparseformer_attends_locally(kind: str) -> None:
    attention = SelfAttention(small_config(kind)).eval()
    q, k, v = torch.randn(3, 2, 4, 23, 8).double().unbind()
    lengths = torch.tensor([23, 12])
    found = attention.attend(q.float(), k.float(), v.float(), lengths=lengths)
    frames = torch.arange(23)
    near = (frames[:, None] - frames).abs() <= 5
    if kind == "block":
        near = frames[:, None] // 5 == frames // 5
    bias = torch.where(near, 0.0, -torch.inf).double()
    valid = frames < lengths[:, None]
    mask = bias.masked_fill(~valid[:, None, None], -torch.inf)
    exactly = (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v
    low = (q.float() @ k.float().mT / 8**0.5 + mask.float()).softmax(-1) @ v.float()
    for row, a, b, length in zip(found, low, exactly, lengths.tolist(), strict=True):
        assert_as_accurate(row[:, :length], a[:, :length], b[:, :length])


def test_time_is_halved_and_comes_back() -> None:
    config = small_config("squeezeformer")
    reduce, recover = TimeReduction(config).double(), TimeRecovery(config).double()
    x = torch.randn(2, 9, 32).double()
    half, lengths = reduce(x, torch.tensor([9, 4]))
    assert half.shape == (2, 5, 32)
    assert lengths.tolist() == [5, 2]
    y = recover(half, x)
    wanted = x + recover.projection(half.repeat_interleave(2, 1)[:, :9])
    assert_as_accurate(y, wanted, wanted)


@pytest.mark.parametrize(
    ("kind", "is_quantized"), [("squeezeformer", False), ("post-norm", True)], ids=str
)
def test_an_encoder_compiles_to_one_graph(kind: str, is_quantized: bool) -> None:
    encoder, batch = build(kind), inputs()
    if is_quantized:
        quantize(encoder, QuantConfig.fast(), fuse=True)
    wanted = encode(encoder, batch)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    rows = encode(compiled, batch), wanted, exact(encoder, batch)
    for found, row, high in zip(*rows, strict=True):
        assert_as_accurate(found, row, high)


def test_dropout_acts_in_training_alone() -> None:
    encoder = build("post-norm", dropout=0.5, attention_dropout=0.5)
    batch = inputs()
    assert torch.equal(encode(encoder, batch)[0], encode(encoder, batch)[0])
    rates = {m.p for m in encoder.modules() if isinstance(m, nn.Dropout)}
    rates |= {m.dropout for m in encoder.modules() if isinstance(m, SelfAttention)}
    assert rates == {0.5}
    encoder.train()
    assert not torch.equal(encode(encoder, batch)[0], encode(encoder, batch)[0])


def test_the_smallest_batches_are_served() -> None:
    encoder = build("squeezeformer")
    assert encoder.feature_extractor.min_samples == 45
    frames, lengths = encoder(torch.randn(1, 45))
    assert frames.shape == (1, 1, 32)
    assert lengths is None
    frames, lengths = encoder(torch.randn(2, 60), torch.tensor([60, 3]))
    assert lengths.tolist() == [1, 0]
    assert frames[0].isfinite().all()


@pytest.mark.parametrize(
    ("waveforms", "lengths", "message"),
    [
        (torch.zeros(200), None, r"waveforms must be floating point \[B, S\], got .* \[200\]"),
        (torch.zeros(1, 200).int(), None, r"waveforms must be floating .*, got torch.int"),
        (torch.zeros(1, 44), None, "waveforms must have at least 45 samples, one frame, got 44"),
        (torch.zeros(1, 99), torch.tensor([99.0]), "lengths must be int32 or int64"),
        (torch.zeros(1, 99), torch.tensor([99, 3]), r"lengths must be \[1\]"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named(waveforms: Tensor, lengths: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("post-norm")(waveforms, lengths)


def test_an_encoder_comes_from_a_preset_or_a_config() -> None:
    encoder = SpeechEncoder.from_preset("conformer-s", num_layers=1)
    assert encoder.config.num_layers == 1
    again = SpeechEncoder(SpeechEncoderConfig.from_json(encoder.config.to_json()))
    again.load_state_dict(encoder.state_dict())
