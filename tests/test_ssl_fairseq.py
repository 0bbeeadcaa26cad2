"""``from_fairseq``: weights by their names, checked against transformers; what is refused."""

import argparse
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbit_kernels.testing import assert_as_accurate
from ssl_models.encoder import SpeechEncoder
from ssl_models.fairseq import from_fairseq
from ssl_models.presets import preset
from tests.ssl_cases import SMALL, encode, inputs
from tests.test_ssl_huggingface import hidden, theirs

WAVEFORMS = inputs()["waveforms"]
KNOWN = {"num_heads": 4, "conv_strides": SMALL["conv_strides"]}
PARTS = {
    "attention": "self_attn", "layer_norm": "self_attn_layer_norm", "intermediate_dense": "fc1",
    "output_dense": "fc2", "final_layer_norm": "final_layer_norm",
}  # fmt: skip


def fairseq_name(key: str, has_layer_norms: bool) -> str | None:
    """What fairseq calls a weight of transformers; None for what has another meaning there."""
    parts = key.split(".")
    if key == "masked_spec_embed":
        return "mask_emb"
    if parts[0] == "feature_extractor":
        place = "0" if parts[3] == "conv" else "2.1" if has_layer_norms else "2"
        return f"feature_extractor.conv_layers.{parts[2]}.{place}.{parts[4]}"
    if parts[0] == "feature_projection":
        name = "layer_norm" if parts[1] == "layer_norm" else "post_extract_proj"
        return f"{name}.{parts[2]}"
    if parts[1] == "pos_conv_embed":
        last = {"original0": "weight_g", "original1": "weight_v", "bias": "bias"}[parts[-1]]
        return f"encoder.pos_conv.0.{last}"
    if parts[1] == "layer_norm":
        return key
    layer = f"encoder.layers.{parts[2]}"
    if parts[3] == "attention":
        return f"{layer}.self_attn.{parts[4]}.{parts[5]}"
    return f"{layer}.{PARTS[parts[-2]]}.{parts[-1]}"


def fairseq_state(family: str) -> tuple[Any, dict[str, Tensor]]:
    model = theirs(family)
    has_layer_norms = model.config.feat_extract_norm == "layer"
    state = {fairseq_name(k, has_layer_norms): t for k, t in model.state_dict().items()}
    heads = ("label_embs_concat", "final_proj.weight", "quantizer.vars", "project_q.bias")
    return model, {**state, **{name: torch.ones(3) for name in heads}}


def check(encoder: SpeechEncoder, model: Any) -> None:
    found = torch.stack(encode(encoder.eval(), {"waveforms": WAVEFORMS}))
    low = hidden(model, WAVEFORMS, torch.float32)
    assert_as_accurate(found, low, hidden(model, WAVEFORMS, torch.float64))


@pytest.mark.parametrize("family", ["hubert", "wav2vec2", "hubert-stable", "wav2vec2-stable"])
def test_weights_are_found_by_their_names(family: str) -> None:
    model, state = fairseq_state(family)
    encoder = from_fairseq(state, **KNOWN)
    assert encoder.config.norm_first == family.endswith("stable")
    assert encoder.config.conv_bias == (family == "wav2vec2-stable")
    check(encoder, model)


@pytest.mark.parametrize("prefix", ["", "w2v_encoder.w2v_model."], ids=["plain", "fine-tuned"])
def test_a_file_of_tensors_is_read(prefix: str, tmp_path: Path) -> None:
    model, state = fairseq_state("hubert")
    state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    state["w2v_encoder.proj.weight"] = torch.ones(3, 32)
    torch.save({"model": state, "num_updates": 3}, tmp_path / "hubert.pt")
    check(from_fairseq(tmp_path / "hubert.pt", **KNOWN), model)
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    assert next(from_fairseq(half, **KNOWN).parameters()).dtype == torch.float32


@pytest.mark.parametrize("size", ["base", "large"])
def test_published_shapes_need_no_more(size: str) -> None:
    with FakeTensorMode():
        wanted = SpeechEncoder.from_preset(f"hubert-{size}")
        state = {fairseq_name(k, size == "large"): t for k, t in wanted.state_dict().items()}
        found = from_fairseq(state).config
    assert dataclasses.replace(
        found, conv_dims=None, conv_kernels=None, conv_strides=None
    ) == preset(f"hubert-{size}")
    assert found.conv_layers == wanted.config.conv_layers


class Boom:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("extra", [argparse.Namespace(arch="hubert"), Boom()], ids=["args", "code"])
def test_files_of_more_than_tensors_are_refused(extra: Any, tmp_path: Path) -> None:
    path = tmp_path / "hubert.pt"
    torch.save({"model": fairseq_state("hubert")[1], "args": extra}, path)
    with pytest.raises(ValueError, match=r"hubert.pt must hold tensors alone") as raised:
        from_fairseq(path, **KNOWN)
    assert "\n" not in str(raised.value)
    path.write_bytes(pickle.dumps({"model": extra}, protocol=2))
    with pytest.raises(ValueError, match=r"hubert.pt must hold tensors alone"):
        from_fairseq(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"hubert.pt must hold tensors alone"):
        from_fairseq(path)
    with pytest.raises(FileNotFoundError):
        from_fairseq(tmp_path / "none.pt")


KEY, CONV = "encoder.layers.1.self_attn.q_proj.weight", "feature_extractor.conv_layers.0.0.weight"
Q = "encoder.layers.1.attention.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "changes", "message"),
    [
        ({"encoder.layers.0.conv.weight": torch.ones(1)}, {}, "encoder.layers.0.conv.weight must "
         "be a name of fairseq's"),
        ({"encoder.layers.0.self_attn.grep_a": torch.ones(1)}, {}, "grep_a must be a name of"),
        ({KEY: None}, {}, f"{Q} must be there"),
        ({KEY: torch.ones(32, 16)}, {}, rf"{Q} must be \[32, 32\], .*, got \[32, 16\]"),
        ({KEY: [1.0]}, {}, f"{KEY} must be a tensor, got list"),
        ({CONV: None}, {}, "feature_extractor.conv_layers.0.conv.weight must be there"),
        ({CONV: torch.ones(3)}, {}, r"conv.weight must have 3 dimensions, got \[3\]"),
        ({"encoder.pos_conv.0.weight_v": None}, {}, "encoder.pos_conv.0.weight_v must be there"),
        ({}, {"conv_strides": None}, "conv_strides must be"),
        ({}, {"num_heads": 5}, "num_heads must be a divisor of hidden_size 32, got 5"),
        ({}, {"layers": 2}, "changes must be of .*, got 'layers'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    edit: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    state = {**fairseq_state("hubert")[1], **edit}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        from_fairseq(state, **{**KNOWN, **changes})


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"conv_strides must be given for kernels other than"):
        from_fairseq(fairseq_state("hubert")[1], num_heads=4)
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="source must hold tensors by name, got none"):
        from_fairseq(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="source must hold tensors by name, got none"):
        from_fairseq({})
