"""``lowbit encode``: the frames it writes, and how it goes on after a stop."""

import os

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open

from lowbit_kernels.cli import inference
from lowbit_kernels.cli.frames_file import FramesWriter, read_shape
from lowbit_kernels.testing import assert_as_accurate

RATE = 16_000


def read_frames(path):
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path))
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("frames")


def encode_alone(folder, path, dtype):
    """What transformers' own classes give for one file, without padding."""
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    audio, _ = soundfile.read(path, dtype="float32")
    inputs = extractor(audio, sampling_rate=RATE, return_tensors="pt")
    with torch.inference_mode():
        return model(inputs.input_values.to(dtype)).last_hidden_state[0]


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_frames_of_a_padded_batch_are_those_of_single_files(
    form, float_model, clips, lowbit, tmp_path
):
    out = tmp_path / "frames"
    called = lowbit("encode", float_model, *clips, "--out", out, "--format", form, "--json")
    assert called.code == 0
    assert called.err == ""
    for path, file in zip(clips, called.json["files"], strict=True):
        frames = read_frames(out / f"{path.stem}.{form}")
        low = encode_alone(float_model, path, torch.float32)
        assert_as_accurate(frames, low, encode_alone(float_model, path, torch.float64))
        assert file["frames"] == len(low)


@pytest.mark.parametrize(
    "class_name",
    ["HubertModel", "WavLMModel", "Data2VecAudioModel", "SEWModel", "Wav2Vec2ConformerModel"],
)
def test_no_family_lets_padding_in(class_name, make_model, clips, lowbit, tmp_path):
    folder = make_model(tmp_path / "model", class_name)
    assert lowbit("encode", folder, *clips, "--out", tmp_path / "frames").code == 0
    for path in clips:
        frames = read_frames(tmp_path / "frames" / f"{path.stem}.safetensors")
        low = encode_alone(folder, path, torch.float32)
        assert_as_accurate(frames, low, encode_alone(folder, path, torch.float64))


def test_low_bit_frames_lie_near_the_float_ones(float_model, small_model, clips, lowbit, tmp_path):
    lowbit("encode", float_model, *clips, "--out", tmp_path / "a")
    lowbit("encode", small_model, *clips, "--out", tmp_path / "b")
    for path in clips:
        a = read_frames(tmp_path / "a" / f"{path.stem}.safetensors")
        b = read_frames(tmp_path / "b" / f"{path.stem}.safetensors")
        assert 0 < (a - b).norm() < 0.5 * a.norm()


def test_what_is_done_is_skipped(float_model, clips, lowbit, tmp_path):
    out = tmp_path / "frames"
    call = ("encode", float_model, *clips, "--out", out)
    assert lowbit(*call).out.startswith("3 written")
    files = [out / f"{path.stem}.safetensors" for path in clips]
    times = [file.stat().st_mtime_ns for file in files]
    assert lowbit(*call).out.startswith("0 written (0 frames), 3 there already")
    assert [file.stat().st_mtime_ns for file in files] == times
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-4])  # cut short by something else
    os.utime(clips[2], (2e9, 2e9))  # recorded anew
    again = lowbit(*call, "--json").json["files"]
    assert [file["skipped"] for file in again] == [False] * 3
    assert read_shape(files[1])[0] == again[1]["frames"]


def test_frames_of_two_models_do_not_mix(float_model, small_model, clips, lowbit, tmp_path):
    out = tmp_path / "frames"
    assert lowbit("encode", float_model, *clips, "--out", out).code == 0
    called = lowbit("encode", small_model, *clips, "--out", out)
    assert called.code == 2
    assert "holds frames of another model" in called.err


def test_frames_of_the_same_weights_with_other_inputs_do_not_mix(
    float_model, small_model, clips, lowbit, tmp_path
):
    fast, out = tmp_path / "fast", tmp_path / "frames"
    assert lowbit("quantize", float_model, fast, "--preset", "fast").code == 0
    assert lowbit("encode", small_model, clips[0], "--out", out).code == 0
    called = lowbit("encode", fast, clips[0], "--out", out)
    assert called.code == 2
    assert "holds frames of another model" in called.err


def test_the_frames_need_a_folder(float_model, clips, lowbit):
    called = lowbit("encode", float_model, clips[0], "--out", clips[1])
    assert called.code == 2
    assert f"--out {clips[1]}: a file; it must be a folder" in called.err


def test_a_bad_file_leaves_nothing_and_the_rest_is_done(
    float_model, clips, lowbit, noise, tmp_path, monkeypatch
):
    monkeypatch.setattr(inference, "WINDOW_SECONDS", 2)
    monkeypatch.setattr(inference, "CONTEXT_SECONDS", 0.5)
    monkeypatch.setattr(inference, "_BATCH_SECONDS", {"cpu": 4, "cuda": 4})
    samples = noise(25.0)
    samples[-1] = np.nan  # after several windows have been written
    soundfile.write(tmp_path / "bad.wav", samples, RATE, subtype="FLOAT")
    out = tmp_path / "frames"
    called = lowbit("encode", float_model, tmp_path / "bad.wav", *clips, "--out", out)
    assert called.code == 2
    assert "3 written" in called.out
    assert "1 failed" in called.out
    assert "bad.wav: holds NaN or infinite samples, the first at 25.000 s" in called.err
    wanted = [*(f"{path.stem}.safetensors" for path in clips), "encode.json"]
    assert sorted(path.name for path in out.iterdir()) == wanted


def test_a_long_file_has_as_many_frames_as_in_one_pass(
    float_model, lowbit, noise, tmp_path, monkeypatch
):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(9.3), RATE, subtype="FLOAT")
    whole = encode_alone(float_model, path, torch.float32)
    monkeypatch.setattr(inference, "WINDOW_SECONDS", 4)
    monkeypatch.setattr(inference, "CONTEXT_SECONDS", 1)
    assert lowbit("encode", float_model, path, "--out", tmp_path / "frames").code == 0
    frames = read_frames(tmp_path / "frames" / "long.safetensors")
    assert frames.shape == whole.shape
    # the statistics of a window are not the file's, but every frame lies where it would
    matches = torch.cdist(frames, whole).argmin(-1)
    assert (matches == torch.arange(len(whole))).float().mean() > 0.95


def test_folders_keep_their_shape_and_names_must_differ(float_model, lowbit, noise, tmp_path):
    for name in ("a/x.wav", "b/x.wav", "b/x.flac"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "in" / name, noise(0.3), RATE)
    out = tmp_path / "out"
    called = lowbit("encode", float_model, tmp_path / "in", "--out", out)
    assert called.code == 2
    assert "would both become" in called.err
    assert not out.exists()
    (tmp_path / "in" / "b" / "x.flac").unlink()
    assert lowbit("encode", float_model, tmp_path / "in", "--out", out).code == 0
    assert (out / "a" / "x.safetensors").exists()
    assert (out / "b" / "x.safetensors").exists()


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_a_file_without_its_end_is_not_there(form, tmp_path):
    path = tmp_path / f"x.{form}"
    pieces = [torch.randn(n, 3).numpy() for n in (4, 0, 5)]
    writer = FramesWriter(path, 0.02)
    for piece in pieces:
        writer.write(piece)
    assert not path.exists()
    assert writer.finish() == 9
    assert read_shape(path) == (9, 3)
    np.testing.assert_array_equal(read_frames(path).numpy(), np.concatenate(pieces))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
