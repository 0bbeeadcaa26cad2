"""``from_hf`` and ``to_hf``: the same outputs as transformers, both ways, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from lowbit_kernels import QuantConfig, prepare_qat, quantize
from lowbit_kernels.testing import assert_as_accurate
from ssl_models.encoder import SpeechEncoder
from ssl_models.huggingface import from_hf, to_hf
from tests.ssl_cases import LENGTHS, SMALL, build, encode, inputs

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model, {"feat_extract_norm": "group"}),
    "wav2vec2-stable": (
        Wav2Vec2Config, Wav2Vec2Model, {"do_stable_layer_norm": True, "conv_bias": True},
    ),
    "hubert": (HubertConfig, HubertModel, {"feat_extract_norm": "group"}),
    "hubert-stable": (HubertConfig, HubertModel, {"do_stable_layer_norm": True}),
    "wavlm": (
        WavLMConfig, WavLMModel,
        {"feat_extract_norm": "group", "num_buckets": 16, "max_bucket_distance": 30},
    ),
    "wavlm-stable": (
        WavLMConfig, WavLMModel,
        {"do_stable_layer_norm": True, "num_buckets": 12, "max_bucket_distance": 20},
    ),
    "data2vec-audio": (
        Data2VecAudioConfig, Data2VecAudioModel,
        {"conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 3},
    ),
    "wav2vec2-conformer": (
        Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel,
        {"conv_depthwise_kernel_size": 7, "hidden_act": "swish", "feat_extract_norm": "group"},
    ),
}  # fmt: skip
# where transformers does not see padding
CLEAN = ("wav2vec2-stable", "hubert-stable", "wavlm-stable")


def options(family: str) -> dict[str, Any]:
    return {
        "conv_dim": SMALL["conv_dims"], "conv_kernel": SMALL["conv_kernels"],
        "conv_stride": SMALL["conv_strides"], "num_feat_extract_layers": 2, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
        "feat_extract_norm": "layer",
    } | FAMILIES[family][2]  # fmt: skip


def theirs(family: str) -> Any:
    """A model as after training: no norm, gate or bias is what it began as."""
    config, kind, _ = FAMILIES[family]
    torch.manual_seed(5)
    model = kind(config(**options(family))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "pos_bias" in name or "const" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
    return model


@torch.inference_mode()
def hidden(model: Any, waveforms: Tensor, dtype: torch.dtype, mask: Any = None) -> Tensor:
    found = model.to(dtype)(waveforms.to(dtype), attention_mask=mask).last_hidden_state
    return found  # type: ignore[no-any-return]


def both(model: Any, waveforms: Tensor, mask: Any = None) -> tuple[Tensor, Tensor]:
    low = hidden(model, waveforms, torch.float32, mask)
    high = hidden(model, waveforms, torch.float64, mask)
    model.float()
    return low, high


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_has_the_models_outputs(family: str) -> None:
    model, batch = theirs(family), inputs()
    encoder = from_hf(model)
    assert isinstance(encoder, SpeechEncoder)
    assert not encoder.training
    low, high = both(model, batch["waveforms"])
    assert_as_accurate(torch.stack(encode(encoder, {"waveforms": batch["waveforms"]})), low, high)
    # padded, those of single utterances
    for i, row in enumerate(encode(encoder, batch)):
        low, high = both(model, batch["waveforms"][i : i + 1, : LENGTHS[i]])
        assert_as_accurate(row, low[0], high[0])
    if family in CLEAN:
        mask = (torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]).long()
        low, high = both(model, batch["waveforms"], mask)
        for row, a, b in zip(encode(encoder, batch), low, high, strict=True):
            assert_as_accurate(row, a[: len(row)], b[: len(row)])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_becomes_the_model_that_it_was(family: str) -> None:
    model, waveforms = theirs(family), inputs()["waveforms"]
    again = to_hf(from_hf(model), family.removesuffix("-stable"))
    assert type(again) is type(model)
    assert not again.training
    state = {key: tensor for key, tensor in model.state_dict().items() if "masked" not in key}
    idle = "pos_conv_embed" if "conformer" in family else "\n"
    for key, tensor in again.state_dict().items():
        assert idle in key or torch.equal(tensor, state[key]), key
    low, high = both(model, waveforms)
    assert_as_accurate(both(again, waveforms)[0], low, high)


@pytest.mark.parametrize("kind", ["post-norm", "pre-norm", "gated", "stacked", "conformer"])
def test_encoders_of_ours_become_models(kind: str, tmp_path: Path) -> None:
    encoder, waveforms = build(kind), inputs()["waveforms"]
    model = to_hf(encoder)
    model.save_pretrained(tmp_path)
    low = torch.stack(encode(encoder, {"waveforms": waveforms}))
    model.double()
    high = hidden(to_hf(encoder.double().train()).eval(), waveforms, torch.float64)
    assert to_hf(encoder).training
    for again in (from_hf(model).float(), from_hf(tmp_path)):
        assert_as_accurate(torch.stack(encode(again, {"waveforms": waveforms})), low, high)


def test_a_type_may_be_chosen() -> None:
    assert type(to_hf(build("post-norm"), "hubert")) is HubertModel


def saved(model: Any, folder: Path, edit: Any) -> Path:
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_path_is_read_and_a_head_left_behind(tmp_path: Path) -> None:
    model = HubertForCTC(HubertConfig(**options("hubert"))).eval()
    model.save_pretrained(tmp_path)
    wanted = encode(from_hf(model), {"waveforms": inputs()["waveforms"]})
    for path in (tmp_path, str(tmp_path)):
        found = encode(from_hf(path), {"waveforms": inputs()["waveforms"]})
        assert all(map(torch.equal, found, wanted))


FIRST = "encoder.layers.0.attention.k_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop(FIRST), f"{FIRST} must be there"),
        (
            lambda state: state.update({FIRST: torch.zeros(16, 32)}),
            rf"{FIRST} must be \[32, 32\], got \[16, 32\]",
        ),
        (
            lambda state: state.update({f"hubert.{FIRST}.more": torch.zeros(2)}),
            rf"{FIRST}.more must not be there, hubert has none",
        ),
    ],
)
def test_a_folder_whose_weights_do_not_fit_is_refused(
    edit: Any, message: str, tmp_path: Path
) -> None:
    folder = saved(theirs("hubert"), tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        from_hf(folder)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    theirs("hubert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "whisper"}))
    with pytest.raises(
        ValueError, match=r"model must be one of .*'wavlm'.*, got /.* of type 'whisper'"
    ):
        from_hf(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "model_type", "message"),
    [
        ("squeezeformer", {}, None, "encoder must be a transformer or conformer .*'squeezeformer'"),
        ("sliding", {}, None, "encoder must be a transformer or conformer .*, got 'sparseformer'"),
        ("post-norm", {"front_end": "fbank", "conv_dims": None, "conv_kernels": None,
                       "conv_strides": None}, None, "front end, got 'transformer' with 'fbank'"),
        ("stacked", {"norm_first": True}, None, "norm_first False .*, got None, True and 'layer'"),
        ("stacked", {"conv_norm": "group"}, None, "conv_norm 'layer', got None, False and 'group'"),
        ("gated", {}, "hubert", r"model_type must be one of \('wavlm',\) .*, got 'hubert'"),
        ("post-norm", {}, "bert", r"model_type must be one of \('wav2vec2', 'hubert'\)"),
    ],
)  # fmt: skip
def test_what_transformers_has_not_is_refused(
    kind: str, changes: dict[str, Any], model_type: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        to_hf(build(kind, **changes), model_type)


@pytest.mark.parametrize("lower", [quantize, prepare_qat])
def test_low_bit_encoders_are_refused(lower: Any) -> None:
    encoder = build("post-norm")
    lower(encoder, QuantConfig.small())
    with pytest.raises(ValueError, match="encoder must be in float, see dequantize, got a Q"):
        to_hf(encoder)
