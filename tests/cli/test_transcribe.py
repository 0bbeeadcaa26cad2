"""``lowbit transcribe``: what it reads, and what it does with bad and with long files."""

import json

import numpy as np
import pytest
import soundfile
import torch

from lowbit_kernels import quantize, save_quantized
from lowbit_kernels.cli import inference

RATE = 16_000


def read_alone(folder, path):
    """The transcript that transformers' own classes give for one file, without padding."""
    import transformers

    model = transformers.AutoModelForCTC.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    audio, _ = soundfile.read(path, dtype="float32")
    inputs = processor(audio, sampling_rate=RATE, return_tensors="pt")
    with torch.inference_mode():
        best = model(inputs.input_values).logits.argmax(-1)
    return processor.batch_decode(best)[0].strip()


@pytest.mark.parametrize("folder", ["float_model", "small_model"])
def test_a_batch_reads_as_single_files_do(folder, clips, lowbit, request):
    folder = request.getfixturevalue(folder)
    called = lowbit("transcribe", folder, *clips, "--json")
    assert called.code == 0
    assert called.err == ""
    assert [file["file"] for file in called.json["files"]] == [str(path) for path in clips]
    for path, file in zip(clips, called.json["files"], strict=True):
        assert file["text"] == read_alone(folder, path) != ""


def test_a_pipe_gets_lines_of_name_and_text(float_model, clips, lowbit):
    lines = lowbit("transcribe", float_model, *clips).out.splitlines()
    found = lowbit("transcribe", float_model, *clips, "--json").json["files"]
    assert lines == [f"{file['file']}\t{file['text']}" for file in found]


def test_bad_files_are_reported_and_the_rest_is_done(float_model, clips, lowbit, noise, tmp_path):
    good = dict.fromkeys(clips)
    silent, eight = tmp_path / "silent.wav", tmp_path / "eight.wav"
    soundfile.write(silent, np.zeros(RATE), RATE)
    soundfile.write(eight, noise(0.5, channels=8, rate=48_000), 48_000)
    good |= {silent: None, eight: None}
    bad = {
        "empty.wav": "empty: it holds no samples",
        "one.wav": "too short: 1 samples at 16000 Hz, the model needs 165 (0.010 s)",
        "nan.wav": "NaN or infinite samples",
        "corrupt.flac": "not an audio file",
        "missing.wav": "no such file",
    }
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "one.wav", np.zeros(1), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (tmp_path / "corrupt.flac").write_bytes(b"no" * 999)
    files = [*good, *(tmp_path / name for name in bad)]
    called = lowbit("transcribe", float_model, *files, "--json")
    assert called.code == 2
    found = {file["file"]: file for file in called.json["files"]}
    assert all("text" in found[str(path)] for path in good)
    lines = called.err.splitlines()
    assert len(lines) == len(bad)
    for name, reason in bad.items():
        assert reason in found[str(tmp_path / name)]["error"]
        assert sum(str(tmp_path / name) in line and reason in line for line in lines) == 1


def test_the_fewest_samples_are_enough(float_model, lowbit, noise, tmp_path):
    for count, code in ((164, 2), (165, 0)):
        soundfile.write(tmp_path / "short.wav", noise(1.0)[:count], RATE, subtype="FLOAT")
        assert lowbit("transcribe", float_model, tmp_path / "short.wav").code == code


def test_a_model_without_a_head_writes_no_text(make_model, clips, lowbit, tmp_path):
    folder = make_model(tmp_path / "encoder", "HubertModel")
    called = lowbit("transcribe", folder, *clips)
    assert called.code == 2
    assert "a HubertModel writes no text" in called.err


def test_a_model_without_a_processor_says_what_is_missing(float_model, clips, lowbit, tmp_path):
    import transformers

    model = transformers.AutoModelForCTC.from_pretrained(float_model)
    model.save_pretrained(tmp_path / "bare")
    called = lowbit("transcribe", tmp_path / "bare", *clips)
    assert called.code == 2
    assert "no usable tokenizer beside the model" in called.err
    assert called.err.count("\n") == 1


def test_a_folder_of_save_quantized_says_how_to_add_the_processor(
    float_model, clips, lowbit, tmp_path
):
    import transformers

    model = transformers.AutoModelForCTC.from_pretrained(float_model)
    quantize(model)
    save_quantized(model, tmp_path / "low")
    called = lowbit("transcribe", tmp_path / "low", *clips)
    assert called.code == 2
    assert "no usable tokenizer beside the model: tokenizer_config.json is missing" in called.err
    assert (
        f"AutoProcessor.from_pretrained(MODEL).save_pretrained('{tmp_path / 'low'}')" in called.err
    )
    assert called.err.count("\n") == 1
    transformers.AutoProcessor.from_pretrained(float_model).save_pretrained(tmp_path / "low")
    assert lowbit("transcribe", tmp_path / "low", *clips).code == 0


def test_three_hours_need_bounded_memory(float_model, tmp_path, monkeypatch):
    import tracemalloc

    from lowbit_kernels.cli.load import load_speech

    path, hours = tmp_path / "long.wav", 3
    soundfile.write(path, np.zeros(0, np.int16), RATE, subtype="PCM_16")
    header = bytearray(path.read_bytes())
    size = hours * 3600 * RATE * 2
    header[4:8] = (size + len(header) - 8).to_bytes(4, "little")
    header[40:44] = size.to_bytes(4, "little")
    with path.open("wb") as file:  # a sparse file of zeros
        file.write(header)
        file.truncate(len(header) + size)
    speech = load_speech(str(float_model), torch.device("cpu"))
    cut = inference.cut_for_frames(speech)
    seconds = []

    def run(windows):
        seconds.append(sum(len(window.samples) for window in windows) / RATE)
        return [window.new_samples for window in windows]

    tracemalloc.start()
    events = list(inference.stream([path], speech, run, cut, ""))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(event.value for event in events) == hours * 3600 * RATE
    assert events[-1].last
    assert max(seconds) <= inference.WINDOW_SECONDS
    assert peak < 40e6


def test_a_long_file_is_read_in_windows(float_model, lowbit, noise, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "WINDOW_SECONDS", 4)
    monkeypatch.setattr(inference, "CONTEXT_SECONDS", 1)
    path = tmp_path / "long.flac"
    soundfile.write(path, noise(11.0), RATE)
    called = lowbit("transcribe", float_model, path, "--json")
    assert called.code == 0
    assert len(called.json["files"][0]["text"]) > 20


def make_whisper(folder):
    """A tiny Whisper whose tokens are letters."""
    import transformers

    folder.mkdir()
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>"]
    special += ["<|translate|>", "<|nospeech|>", "<|notimestamps|>"]
    vocab = {token: i for i, token in enumerate([*"abcdefghijklmnop", *special])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.WhisperTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>"
    )
    ids = {name: vocab[f"<|{name}|>"] for name in ("endoftext", "startoftranscript")}
    config = transformers.WhisperConfig(
        vocab_size=len(vocab),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_length=12,
        bos_token_id=ids["endoftext"],
        eos_token_id=ids["endoftext"],
        pad_token_id=ids["endoftext"],
        decoder_start_token_id=ids["startoftranscript"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    transformers.WhisperProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


def test_whisper_writes_text_and_frames_and_is_compared(clips, lowbit, tmp_path):
    folder = make_whisper(tmp_path / "whisper")
    called = lowbit("transcribe", folder, *clips, "--json")
    assert called.code == 0, called.err
    assert all(file["text"] for file in called.json["files"])
    called = lowbit("compare", folder, folder, *clips, "--json")
    assert called.code == 0, called.err
    assert called.json["frame_error"] is None
    assert called.json["transcripts"]["rate"] == 0
    called = lowbit("encode", folder, *clips, "--out", tmp_path / "frames", "--json")
    assert called.code == 0, called.err
    assert [file["frames"] for file in called.json["files"]] == [25, 55, 40]
