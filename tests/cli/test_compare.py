"""``lowbit compare``: its figures, its exit codes, the texts it takes."""

import json

import numpy as np
import pytest
import soundfile
import torch

from lowbit_kernels.cli import inference
from lowbit_kernels.cli.layer_errors import LayerErrors
from lowbit_kernels.cli.words import WordErrors, word_errors


def texts_of(lowbit, folder, clips):
    found = lowbit("transcribe", folder, *clips, "--json").json["files"]
    return [file["text"] for file in found]


def test_a_model_agrees_with_itself(small_model, clips, lowbit):
    called = lowbit("compare", small_model, small_model, *clips, "--fail-above", 0, "--json")
    assert called.code == 0
    found = called.json
    assert found["frame_disagreement"] == found["frame_error"] == 0
    assert found["transcripts"]["errors"] == 0
    assert found["frames"] == sum((n - 165) // 160 + 1 for n in (8000, 17_600, 12_800))


def test_the_figures_are_the_transcripts_own(float_model, small_model, clips, lowbit, tmp_path):
    wanted = texts_of(lowbit, float_model, clips)
    got = texts_of(lowbit, small_model, clips)
    table = tmp_path / "texts.tsv"
    table.write_text("".join(f"{c.name}\t{t}\n" for c, t in zip(clips, wanted, strict=True)))
    call = ("compare", float_model, small_model, *clips, "--texts", table)
    found = lowbit(*call, "--json").json
    assert [file["float"] for file in found["files"]] == wanted
    assert [file["quantized"] for file in found["files"]] == got
    assert wanted != got
    errors = word_errors(zip(wanted, got, strict=True))
    assert found["transcripts"] == found["quantized_wer"] == errors.to_dict()
    assert found["float_wer"]["errors"] == 0
    assert 0 < found["frame_disagreement"] < 1
    shown = lowbit(*call)
    assert shown.code == 0
    assert f"{found['frame_disagreement']:.2%}" in shown.out
    assert "WER, low-bit" in shown.out


def test_fail_above_exits_1(float_model, small_model, clips, lowbit):
    call = ("compare", float_model, small_model, *clips, "--json")
    found = lowbit(*call).json
    worst = max(found["frame_disagreement"], found["transcripts"]["rate"])
    failed = lowbit(*call, "--fail-above", worst - 1e-6)
    assert failed.code == 1
    assert "is above" in failed.err
    assert lowbit(*call, "--fail-above", worst).code == 0


def test_a_failed_file_outranks_the_limit(float_model, small_model, clips, lowbit, tmp_path):
    missing = tmp_path / "missing.wav"
    called = lowbit("compare", float_model, small_model, *clips, missing, "--fail-above", 0)
    assert called.code == 2
    assert "missing.wav: no such file" in called.err


def test_a_file_that_fails_late_does_not_count(
    float_model, small_model, clips, lowbit, noise, tmp_path, monkeypatch
):
    monkeypatch.setattr(inference, "WINDOW_SECONDS", 2)
    monkeypatch.setattr(inference, "CONTEXT_SECONDS", 0.5)
    monkeypatch.setattr(inference, "_BATCH_SECONDS", {"cpu": 4, "cuda": 4})
    samples = noise(25.0)
    samples[-1] = np.nan
    soundfile.write(tmp_path / "bad.wav", samples, 16_000, subtype="FLOAT")
    call = ("compare", float_model, small_model, *clips, "--json")
    wanted, found = lowbit(*call).json, lowbit(*call, tmp_path / "bad.wav").json
    assert "error" in found["files"].pop()
    for name in ("frames", "frame_disagreement", "frame_error", "transcripts", "files"):
        assert found[name] == wanted[name]


def test_layers_have_the_noise_that_the_report_says(float_model, small_model, clips, lowbit):
    report = lowbit("quantize", float_model, "--dry-run", "--json").json
    expected = {layer["name"]: layer["sqnr_db"] for layer in report["layers"] if layer["spec"]}
    found = lowbit("compare", float_model, small_model, *clips, "--json").json["layers"]
    assert {layer["name"]: layer["weight_sqnr_db"] for layer in found} == expected
    for layer in found:
        # with float inputs an output has the noise of the weight, give or take the input's shape
        assert abs(layer["output_sqnr_db"] - layer["weight_sqnr_db"]) < 6


def test_one_bad_layer_is_found(float_model, small_model):
    from transformers import AutoModelForCTC

    wanted = AutoModelForCTC.from_pretrained(float_model).eval()
    got = AutoModelForCTC.from_pretrained(small_model).eval()
    name = "wav2vec2.encoder.layers.1.feed_forward.output_dense"
    got.get_submodule(name).scale.mul_(1.5)
    errors = LayerErrors(wanted, got)
    with torch.inference_mode(), errors.watch_once():
        wanted(torch.randn(1, 8000))
    found = sorted(errors.results(), key=lambda layer: layer.output_sqnr_db)
    assert found[0].name == name
    assert 5 < found[0].output_sqnr_db < 7 < found[1].output_sqnr_db
    assert not any(module._forward_hooks for module in wanted.modules())


def test_encoders_without_a_head_are_compared_by_frames(make_model, clips, lowbit, tmp_path):
    folder = make_model(tmp_path / "float", "HubertModel")
    lowbit("quantize", folder, tmp_path / "small")
    call = ("compare", folder, tmp_path / "small", *clips)
    found = lowbit(*call, "--json").json
    assert found["frame_disagreement"] is None
    assert found["transcripts"] is None
    assert 0 < found["frame_error"] < 1
    assert lowbit(*call, "--fail-above", 0).code == 1
    assert "output error" in lowbit(*call).out


def test_models_must_be_of_one_kind(make_model, float_model, clips, lowbit, tmp_path):
    other = make_model(tmp_path / "other", "HubertForCTC")
    called = lowbit("compare", float_model, other, *clips)
    assert called.code == 2
    assert "one kind of model, got Wav2Vec2ForCTC and HubertForCTC" in called.err


def test_models_in_the_wrong_order_are_noted(float_model, small_model, clips, lowbit):
    called = lowbit("compare", small_model, float_model, clips[0])
    assert called.code == 0
    assert "has no low-bit layers; the float model is named first" in called.err


def test_where_every_file_fails_no_figures_are_shown(float_model, small_model, lowbit, tmp_path):
    called = lowbit("compare", float_model, small_model, tmp_path / "missing.wav")
    assert called.code == 2
    assert called.out == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not JSON"),
        ("a.json", "[1]", "an object of file names and texts"),
        ("a.tsv", "clip0 ONE\n", "line 1 has no tab"),
        ("a.tsv", "other\tONE\n", "names none of the files; it has 'other'"),
    ],
)
def test_wrong_texts_are_named(
    name, content, message, float_model, small_model, clips, lowbit, tmp_path
):
    (tmp_path / name).write_text(content)
    called = lowbit("compare", float_model, float_model, *clips, "--texts", tmp_path / name)
    assert called.code == 2
    assert message in called.err
    assert called.err.count("\n") == 1


def test_texts_by_path_name_or_stem(float_model, small_model, clips, lowbit, tmp_path):
    names = {str(clips[0]): "A", clips[1].name: "B", clips[2].stem: "C"}
    (tmp_path / "t.json").write_text(json.dumps(names))
    call = ("compare", float_model, small_model, *clips, "--texts", tmp_path / "t.json", "--json")
    files = lowbit(*call).json["files"]
    assert [file["reference"] for file in files] == ["A", "B", "C"]


def test_words_are_counted_without_case_and_punctuation():
    pairs = [("One, two!", "one too"), ("", "three"), ("it's", "it's"), ("", "")]
    assert word_errors(pairs) == WordErrors(errors=2, words=3, changed=2, transcripts=4)
