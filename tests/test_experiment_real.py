"""Real weights in other programs' files: read whole, and put where they belong."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from bench.experiment.archives import read_ct2, read_hama
from bench.experiment.data import Utterance
from bench.experiment.measure import measure, subject_of
from bench.experiment.real_models import HAMA_SLOTS, HamaConformer, load_hama, load_whisper
from ssl_models.error_propagation.sources import find_sources

SIZE, INNER, TAPS, MELS, TOKENS = 32, 48, 7, 8, 5


def hama_tensors() -> dict[str, Tensor]:
    """As in the package's file, of a smaller model."""
    torch.manual_seed(0)
    prefix = "acoustic_model.model."
    tensors = {
        "mel_fb": torch.rand(201, MELS),
        "stft_real_kernel": torch.randn(201, 1, 400),
        "stft_imag_kernel": torch.randn(201, 1, 400),
    }
    shapes = {
        "ffn1.norm.weight": (SIZE,), "ffn1.norm.bias": (SIZE,), "ffn1.fc1.bias": (INNER,),
        "ffn1.fc2.bias": (SIZE,), "attn_norm.weight": (SIZE,), "attn_norm.bias": (SIZE,),
        "attn.in_proj_bias": (3 * SIZE,), "attn.out_proj.bias": (SIZE,),
        "conv.norm.weight": (SIZE,), "conv.norm.bias": (SIZE,),
        "conv.pointwise1.weight": (2 * SIZE, SIZE, 1), "conv.pointwise1.bias": (2 * SIZE,),
        "conv.pointwise2.weight": (SIZE, SIZE, 1), "conv.pointwise2.bias": (SIZE,),
        "ffn2.norm.weight": (SIZE,), "ffn2.norm.bias": (SIZE,), "ffn2.fc1.bias": (INNER,),
        "ffn2.fc2.bias": (SIZE,), "norm.weight": (SIZE,), "norm.bias": (SIZE,),
    }  # fmt: skip
    for layer in range(2):
        for name, shape in shapes.items():
            tensors[f"{prefix}blocks.{layer}.{name}"] = (
                torch.randn(shape) / max(1, shape[-1]) ** 0.5
            )
    tensors[f"{prefix}proj.weight"] = torch.randn(TOKENS, SIZE, 1)
    tensors[f"{prefix}proj.bias"] = torch.randn(TOKENS)
    convolutions = [(SIZE, MELS, 3), (SIZE,), *[(SIZE, 1, TAPS), (SIZE,)] * 2]
    for i, shape in enumerate(convolutions):
        tensors[f"onnx::Conv_{i}"] = torch.randn(shape) / 5
    layer_shapes = [(SIZE, INNER), (INNER, SIZE), (SIZE, 3 * SIZE), (SIZE, SIZE)]
    matrices = [*layer_shapes, *layer_shapes[:2]] * 2
    for i, shape in enumerate(matrices):
        tensors[f"onnx::MatMul_{i}"] = torch.randn(shape) / shape[0] ** 0.5
    return {name: tensor.half().float() for name, tensor in tensors.items()}


def write_hama(path: Path, tensors: dict[str, Tensor]) -> None:
    table, data = b"", b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().astype(np.float16).tobytes()
        table += struct.pack("<H", len(name)) + name.encode()
        table += struct.pack(f"<BB{tensor.dim()}I", 1, tensor.dim(), *tensor.shape)
        table += struct.pack("<QQ", len(data), len(raw))
        data += raw
    head = b"HAMAPK\x01\x02" + struct.pack("<I", len(tensors)) + table
    path.write_bytes(head + b"\0" * (-len(head) % 16) + data)


def test_an_archive_of_hama(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.hama", hama_tensors()
    write_hama(path, tensors)
    found = read_hama(path)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"x\.hama must be whole, got \d+ bytes"):
        read_hama(path)
    path.write_bytes(b"HAMAPK\x01\x03")
    with pytest.raises(ValueError, match=r"x\.hama must begin with b'HAMAPK"):
        read_hama(path)


def test_the_conformer_computes_what_its_graph_says(tmp_path: Path) -> None:
    """One layer's branches again, from the tensors' own names."""
    tensors = hama_tensors()
    write_hama(tmp_path / "x.hama", tensors)
    model = load_hama(tmp_path / "x.hama")
    kinds = [source.kind for source in find_sources(model)]
    assert kinds == ["feed_forward", "feed_forward", "attention", "conv"] * 2
    logits, _ = model(torch.randn(2, 4000))
    assert logits.shape == (2, 13, TOKENS)
    assert logits.isfinite().all()
    x, layer = torch.randn(1, 9, SIZE), model.layers[1]

    def of(name: str) -> Tensor:
        return tensors[f"acoustic_model.model.blocks.1.{name}"]

    def norm(name: str, value: Tensor) -> Tensor:
        weight, bias = of(f"{name}.weight"), of(f"{name}.bias")
        return torch.nn.functional.layer_norm(value, (SIZE,), weight, bias)

    inner = torch.nn.functional.silu(
        norm("ffn2.norm", x) @ tensors["onnx::MatMul_10"] + of("ffn2.fc1.bias")
    )
    wanted = inner @ tensors["onnx::MatMul_11"] + of("ffn2.fc2.bias")
    torch.testing.assert_close(layer.ffn2(x), wanted)
    qkv = x @ tensors["onnx::MatMul_8"] + of("attn.in_proj_bias")
    q, k, v = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in qkv.chunk(3, -1))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    wanted = attended @ tensors["onnx::MatMul_9"] + of("attn.out_proj.bias")
    torch.testing.assert_close(layer.self_attn(x), wanted)


def test_tensors_of_another_model_are_refused() -> None:
    tensors = hama_tensors()
    tensors["acoustic_model.model.blocks.0.other"] = torch.zeros(1)
    with pytest.raises(ValueError, match="tensors must be of hama's Conformer"):
        HamaConformer(tensors)


def test_a_model_with_real_weights_is_measured_as_the_others() -> None:
    model = HamaConformer(hama_tensors()).eval()
    subject = subject_of(model, HAMA_SLOTS, lambda x: x.argmax(-1).tolist(), ("stem",), {})
    row = measure(subject, Utterance(torch.randn(4000), None), seed=0, gains=True)
    assert row["twice/J"] == pytest.approx(3.01, abs=0.1)
    assert {"w4/J(X,Y)", "w8/front_end/nsr", "sources/gain"} <= row.keys()
    assert row["w8/all/nsr"] < row["w4/all/nsr"]
    # the front end is one layer, not a module of some
    assert -60 < row["w8/front_end/nsr"] < row["w4/front_end/nsr"]


def write_ct2(path: Path, tensors: dict[str, Tensor]) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, tensor in tensors.items():
        raw = tensor.numpy().astype(np.float16).tobytes()
        data += text(name) + struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape)
        data += struct.pack("<BI", 4, len(raw)) + raw
    path.write_bytes(data)


def test_whispers_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=128, num_mel_bins=8, encoder_layers=2, encoder_attention_heads=2,
        encoder_ffn_dim=96, max_source_positions=20,
    )  # fmt: skip
    wanted = WhisperEncoder(config).eval()
    for parameter in wanted.parameters():
        parameter.data = torch.randn(parameter.shape).mul(0.1).half().float()
    state = wanted.state_dict()
    tensors = {
        f"encoder/{place}/{kind}": state[f"{place}.{kind}"]
        for place in ("conv1", "conv2")
        for kind in ("weight", "bias")
    }
    tensors["encoder/position_encodings/encodings"] = state["embed_positions.weight"]
    norms = {"encoder/layer_norm": "layer_norm"}
    for i in range(2):
        theirs, own = f"encoder/layer_{i}", f"layers.{i}"
        norms[f"{theirs}/self_attention/layer_norm"] = f"{own}.self_attn_layer_norm"
        norms[f"{theirs}/ffn/layer_norm"] = f"{own}.final_layer_norm"
        for kind in ("weight", "bias"):
            parts = [state.get(f"{own}.self_attn.{p}_proj.{kind}", torch.zeros(128)) for p in "qkv"]
            tensors[f"{theirs}/self_attention/linear_0/{kind}"] = torch.cat(parts)
            tensors[f"{theirs}/self_attention/linear_1/{kind}"] = state[
                f"{own}.self_attn.out_proj.{kind}"
            ]
            for j in (0, 1):
                tensors[f"{theirs}/ffn/linear_{j}/{kind}"] = state[f"{own}.fc{j + 1}.{kind}"]
    for theirs, own in norms.items():
        tensors |= {
            f"{theirs}/gamma": state[f"{own}.weight"], f"{theirs}/beta": state[f"{own}.bias"]
        }  # fmt: skip
    path = tmp_path / "model.bin"
    write_ct2(path, tensors)
    # in two parts, as wheels hold it
    raw = path.read_bytes()
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, half in zip(parts, (raw[:1000], raw[1000:]), strict=True):
        part.write_bytes(half)
    found = load_whisper(parts)
    features = torch.randn(1, 8, 40)
    with torch.inference_mode():
        expected, got = (each(features).last_hidden_state for each in (wanted, found))
    assert torch.equal(got, expected)
    parts[1].write_bytes(raw[1000:-4])
    with pytest.raises(ValueError, match="a must be whole"):
        read_ct2(parts)
    path.write_bytes(struct.pack("<I", 5) + raw[4:])
    with pytest.raises(ValueError, match="a WhisperSpec of version 6, got 'WhisperSpec', 5"):
        read_ct2([path])
