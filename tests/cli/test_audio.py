"""Audio files of every kind, good and bad, become finite mono samples or one clear reason."""

import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import soxr

from lowbit_kernels.cli.audio import AudioError, find_audio, read_blocks, read_seconds
from lowbit_kernels.cli.errors import CommandError

RATE = 16_000


def read(path):
    return np.concatenate(list(read_blocks(path, RATE)))


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_is_resampled_and_mixed_down(kind, channels, noise, tmp_path):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, noise(1.5, channels=channels, rate=44_100), 44_100)
    stored, _ = soundfile.read(path, dtype="float32", always_2d=True)
    wanted = soxr.resample(stored.mean(axis=1), 44_100, RATE)
    got = read(path)
    assert got.dtype == np.float32
    # the very same resampler, fed in blocks
    np.testing.assert_array_equal(got, wanted)
    assert read_seconds(path) == len(stored) / 44_100


def test_blocks_join_without_a_seam(noise, tmp_path):
    path = tmp_path / "long.flac"
    soundfile.write(path, noise(25.3, rate=22_050), 22_050)
    stored, _ = soundfile.read(path, dtype="float32")
    assert len(list(read_blocks(path, RATE))) > 2
    np.testing.assert_array_equal(read(path), soxr.resample(stored, 22_050, RATE))


def test_eight_channels_are_averaged(noise, tmp_path):
    path = tmp_path / "eight.wav"
    samples = noise(0.3, channels=8)
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read(path), samples.mean(axis=1))


def test_a_wav_written_to_a_pipe_has_no_size_and_is_read(noise, tmp_path):
    path = tmp_path / "pipe.wav"
    soundfile.write(path, noise(0.2), RATE)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(data)
    assert len(read(path)) == int(0.2 * RATE)


def write_bad(kind, folder, samples):
    """A bad file of some kind, with a word of the reason that must be given."""
    path = folder / "bad.wav"
    if kind == "no samples":
        soundfile.write(path, samples[:0], RATE)
        return path, "no samples"
    if kind == "no bytes":
        path.touch()
        return path, "no bytes"
    if kind == "missing":
        return path, "no such file"
    if kind == "garbage":
        path.write_bytes(b"garbage" * 99)
        return path, "not an audio file"
    if kind == "garbage mp3":
        path = path.with_suffix(".mp3")
        path.write_bytes(bytes(range(256)) * 20)
        return path, "Format not recognised"
    if kind == "NaN":
        samples = samples.copy()
        samples[4000] = np.nan
        soundfile.write(path, samples, RATE, subtype="FLOAT")
        return path, r"NaN or infinite samples, the first at 0\.250 s"
    if kind == "cut wav":
        soundfile.write(path, samples, RATE)
        path.write_bytes(path.read_bytes()[:-1000])
        return path, "truncated: 31000 of 32000 bytes"
    path = path.with_suffix(".flac")
    soundfile.write(path, samples, RATE)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path, "corrupt"


BAD = ["no samples", "no bytes", "missing", "garbage", "garbage mp3", "NaN", "cut wav", "cut flac"]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_has_one_clear_reason(kind, noise, tmp_path):
    path, reason = write_bad(kind, tmp_path, noise(1.0))

    def use():
        read_seconds(path)
        read(path)

    with pytest.raises(AudioError, match=reason) as error:
        use()
    assert "\n" not in str(error.value)


def test_the_mp3_decoder_says_nothing_by_itself(noise, tmp_path, capfd):
    path = tmp_path / "bad.mp3"
    soundfile.write(path, noise(2.0), RATE)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :][:600] = bytes(600)
    path.write_bytes(data[:100])
    with pytest.raises(AudioError):
        read(path)
    assert capfd.readouterr().err == ""


def test_a_long_file_is_read_in_bounded_memory(tmp_path):
    path = tmp_path / "long.wav"
    block = np.zeros(RATE * 60, np.int16)
    with soundfile.SoundFile(path, "w", RATE, 1, subtype="PCM_16") as file:
        for _ in range(60):
            file.write(block)
    tracemalloc.start()
    total = sum(map(len, read_blocks(path, RATE)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 3600 * RATE
    assert peak < 4 * total / 50


def test_a_folder_stands_for_the_audio_in_it(tmp_path):
    names = ("b.wav", "a/x.flac", "a/y.MP3", "a/notes.txt")
    (tmp_path / "a").mkdir()
    (tmp_path / "folder.wav").mkdir()
    for name in names:
        (tmp_path / name).touch()
    found = find_audio([tmp_path, tmp_path / "b.wav"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/x.flac", "a/y.MP3", "b.wav"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CommandError, match="no audio file in it"):
        find_audio([tmp_path / "empty"])
