"""``lowbit quantize`` and ``lowbit inspect``."""

import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lowbit_kernels
from lowbit_kernels.integrations.fuse import is_fused


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def logits_of(folder, audio):
    import transformers

    model = transformers.AutoModelForCTC.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(audio)[None]).logits


def test_the_result_is_what_quantize_gives(small_model, float_model, noise):
    import transformers

    assert lowbit_kernels.__version__
    audio = noise(0.5)
    model = transformers.AutoModelForCTC.from_pretrained(float_model).eval()
    lowbit_kernels.quantize(model)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(audio)[None]).logits
    assert torch.equal(logits_of(small_model, audio), wanted)


def test_a_pipeline_reads_as_transcribe_does(small_model, clips, lowbit):
    import soundfile
    import transformers

    reader = transformers.pipeline("automatic-speech-recognition", model=str(small_model))
    found = lowbit("transcribe", small_model, *clips, "--json").json["files"]
    for clip, outcome in zip(clips, found, strict=True):
        raw, rate = soundfile.read(clip, dtype="float32")
        assert reader({"raw": raw, "sampling_rate": rate})["text"].strip() == outcome["text"]


def test_the_saved_processor_returns_attention_masks(small_model):
    import transformers

    extractor = transformers.AutoFeatureExtractor.from_pretrained(small_model)
    assert extractor.return_attention_mask is True


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ([], "w4 g64"),
        (["--preset", "fast"], "w4 g64, int8 inputs"),
        (["--preset", "fast", "--inputs", "float"], "w4 g64"),
        (["--bits", "8"], "w8 channel"),
        (["--bits", "2", "--group-size", "32", "--inputs", "int8"], "w2 g32, int8 inputs"),
        (["--group-size", "channel", "--method", "hqq"], "w4 channel"),
        (["--deterministic"], "w4 g64, deterministic"),
    ],
)
def test_options_choose_the_spec(options, spec, lowbit, float_model, tmp_path):
    called = lowbit("quantize", float_model, "--dry-run", "--json", *options)
    assert called.code == 0
    assert called.err == ""
    assert called.json["out"] is None
    specs = {layer["spec"] for layer in called.json["layers"] if layer["spec"]}
    # convolutions of the front end may have one
    assert {found.replace(" around an offset", "") for found in specs} == {spec}
    assert list(tmp_path.iterdir()) == []


def test_a_fused_model_is_saved_as_one(lowbit, float_model, tmp_path):
    called = lowbit("quantize", float_model, tmp_path / "out", "--fuse", "--json")
    assert "2 encoder layers are fused" in called.json["notes"]
    assert is_fused(lowbit_kernels.load_quantized(tmp_path / "out"))


def test_a_report_is_shown_and_the_folder_named(lowbit, float_model, tmp_path):
    called = lowbit("quantize", float_model, tmp_path / "out")
    assert "layers quantized" in called.out
    assert "saved in" in called.out
    assert "encoder.layers.0-1.attention.k_proj" in called.out
    assert "on the skip list" in called.out
    assert called.err == ""
    assert names_in(tmp_path) == ["out"]


def test_an_existing_folder_is_replaced_only_with_force(lowbit, float_model, tmp_path):
    out = tmp_path / "out"
    assert lowbit("quantize", float_model, out).code == 0
    before = (out / "model.safetensors").read_bytes()
    called = lowbit("quantize", float_model, out, "--bits", "8")
    assert called.code == 2
    assert "--force replaces it" in called.err
    assert (out / "model.safetensors").read_bytes() == before
    assert lowbit("quantize", float_model, out, "--bits", "8", "--force").code == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert names_in(tmp_path) == ["out"]


def test_force_replaces_nothing_but_a_checkpoint(lowbit, float_model, tmp_path):
    (tmp_path / "notes.txt").write_text("dear diary")
    called = lowbit("quantize", float_model, tmp_path, "--force")
    assert called.code == 2
    assert "is not a checkpoint" in called.err
    assert names_in(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("step", ["weights", "processor", "move"])
def test_a_full_disk_leaves_the_old_checkpoint(step, lowbit, float_model, tmp_path, monkeypatch):
    import transformers

    out = tmp_path / "out"
    shutil.copytree(float_model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    replace = os.replace

    def replace_but_not_by_the_new(a, b):
        new = b == out and "-old-" not in a.name
        return fail() if new else replace(a, b)

    def fail_as_safetensors_does(*args, **kwargs):
        raise SafetensorError("Error while serializing: No space left on device")

    if step == "weights":
        monkeypatch.setattr(
            transformers.PreTrainedModel, "save_pretrained", fail_as_safetensors_does
        )
    elif step == "processor":
        monkeypatch.setattr(transformers.Wav2Vec2Processor, "save_pretrained", fail)
    else:
        monkeypatch.setattr(os, "replace", replace_but_not_by_the_new)
    called = lowbit("quantize", float_model, out, "--force")
    assert called.code == 2
    assert "No space left on device" in called.err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert names_in(tmp_path) == ["out"]


def test_a_low_bit_source_is_quantized_again_and_says_so(lowbit, small_model, tmp_path):
    called = lowbit("quantize", small_model, tmp_path / "again", "--bits", "2", "--json")
    assert called.code == 0
    assert "rounded again" in called.err
    assert {layer["spec"] for layer in called.json["layers"] if layer["spec"]} == {"w2 g64"}
    assert lowbit("inspect", tmp_path / "again").code == 0


def test_weights_that_are_not_finite_are_refused(lowbit, float_model, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(float_model, source)
    tensors = load_file(source / "model.safetensors")
    name = "wav2vec2.encoder.layers.0.attention.k_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    called = lowbit("quantize", source, tmp_path / "out")
    assert called.code == 2
    assert "wav2vec2.encoder.layers.0.attention.k_proj" in called.err
    assert names_in(tmp_path) == ["source"]


def make_bad_source(kind, folder, good):
    if kind == "missing":
        return folder / "nowhere", "no such folder"
    if kind == "hub":
        return "someone/unreachable-model", "no such folder, nor does the hub give it"
    folder.mkdir()
    if kind == "empty":
        return folder, "no config.json in it"
    if kind == "file":
        (folder / "model.pt").write_bytes(b"\x80\x04")
        return folder / "model.pt", "a file; a model is a folder"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    if kind == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        return folder, "cannot be loaded"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    return folder, "has no class NoSuchModel"


@pytest.mark.parametrize("kind", ["missing", "hub", "empty", "file", "truncated", "class"])
def test_a_bad_source_is_one_line(kind, lowbit, float_model, tmp_path):
    source, reason = make_bad_source(kind, tmp_path / "source", float_model)
    called = lowbit("quantize", source, tmp_path / "out")
    assert called.code == 2
    assert str(source) in called.err
    assert reason in called.err
    assert called.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_inspect_lists_the_layers(lowbit, small_model):
    info = lowbit("inspect", small_model, "--json").json
    assert info["model"] == "Wav2Vec2ForCTC"
    assert info["layers"]["wav2vec2.encoder.layers.0.attention.k_proj"]["spec"]["bits"] == 4
    shown = lowbit("inspect", small_model)
    assert shown.code == 0
    assert "w4 g64" in shown.out


def test_inspect_refuses_what_is_no_low_bit_checkpoint(lowbit, float_model, tmp_path):
    pickle = tmp_path / "model.bin"
    pickle.write_bytes(b"\x80\x04]\x94.")
    for path in (float_model, pickle, tmp_path / "nowhere"):
        called = lowbit("inspect", path)
        assert called.code == 2
        assert str(path) in called.err
        assert called.err.count("\n") == 1


def test_weights_that_do_not_fill_the_model_are_refused(lowbit, float_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(float_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights.pop("lm_head.bias")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    called = lowbit("quantize", broken, tmp_path / "out")
    assert called.code == 2
    assert "lack 1 tensors of a Wav2Vec2ForCTC, 'lm_head.bias' first" in called.err
    assert names_in(tmp_path) == ["broken"]


def test_weights_of_another_config_are_refused(lowbit, float_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(float_model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    called = lowbit("quantize", broken, tmp_path / "out")
    assert called.code == 2
    assert "do not fit its config.json" in called.err
    assert "(64,) in the file and (96,) in the model" in called.err


def test_inspect_shows_layers_that_repeat_in_one_line(lowbit, small_model):
    called = lowbit("inspect", small_model)
    assert called.code == 0
    lines = [line for line in called.out.splitlines() if "attention.k_proj" in line]
    assert [line.split() for line in lines] == [
        ["wav2vec2.encoder.layers.0-1.attention.k_proj", "2x", "QLinear", "w4", "g64"]
    ]
