"""Manifests and batches of speech: what is read, what is left out, what depends on what."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from ssl_models.data import AudioBatches, Utterance, read_manifest
from ssl_models.data.batches import read_audio

RATE = 16_000


def write(path, seconds, rate=RATE, channels=1, hertz=440):
    times = np.arange(int(seconds * rate)) / rate
    audio = 0.1 * np.sin(2 * np.pi * hertz * times).astype(np.float32)
    soundfile.write(path, np.stack([audio] * channels, 1), rate)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two clips, one that is no audio, and a note."""
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.wav", 0.5, 8000)
    write(tmp_path / "sub" / "b.flac", 1.0, 44_100, channels=2)
    (tmp_path / "c.wav").write_bytes(b"not audio")
    (tmp_path / "notes.txt").write_text("no audio either")
    return tmp_path


def test_a_folder_is_read_and_what_is_no_audio_counted(folder):
    found = read_manifest(folder)
    assert [(each.path.name, each.samples) for each in found.utterances] == [
        ("a.wav", 8000), ("b.flac", 16_000)
    ]  # fmt: skip
    (problem,) = found.problems
    assert problem.startswith(f"{folder / 'c.wav'}: ")


def test_fairseqs_manifest_is_believed(folder):
    (folder / "train.tsv").write_text("sub\nb.flac\t123\nmissing.wav\t77\thello there\n\n")
    first, second = read_manifest(folder / "train.tsv").utterances
    assert first == Utterance(folder / "sub" / "b.flac", 123, None)
    assert second == Utterance(folder / "sub" / "missing.wav", 77, "hello there")


def test_json_lines_are_read(folder):
    rows = [
        {"audio": "a.wav", "text": "one"},
        {"audio_filepath": "sub/b.flac", "duration": 0.25},
        {"audio": "missing.wav"},
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = read_manifest(folder / "train.jsonl")
    assert [(each.samples, each.text) for each in found.utterances] == [(8000, "one"), (4000, None)]
    assert found.problems == (f"{folder / 'missing.wav'}: no such file",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "data must hold at least one readable utterance, got none"),
        ("a.tsv", ".\na.wav 3\n", r"a.tsv line 2 must be path<TAB>samples, got 'a.wav 3'"),
        ("a.jsonl", '{"text": "x"}\n', "a.jsonl line 1 must be a JSON object with 'audio'"),
        ("a.jsonl", "[]\n", "a.jsonl line 1 must be"),
        ("a.jsonl", '{"audio": "x.wav"}\n', "1 files were left out: .*x.wav: no such file"),
        ("a.txt", "x", "data must be a folder, a .tsv or a .jsonl file, got"),
    ],
)
def test_wrong_manifests_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / name)


def test_audio_is_read_at_16_khz_in_one_channel(folder):
    audio = read_audio(folder / "sub" / "b.flac")
    assert audio.dtype == np.float32
    assert audio.shape == (RATE,)
    assert np.abs(np.fft.rfft(audio)).argmax() == 440


def clips(count=40, seed=0):
    """Utterances whose samples are their own number."""
    rng = np.random.default_rng(seed)
    return [Utterance(Path(f"{i}"), int(rng.integers(2000, 40_000)), f"t{i}") for i in range(count)]


def batches(utterances, **options):
    lengths = {each.path: each.samples for each in utterances}

    def read(path):
        return np.full(lengths[path], float(path.name), np.float32)

    options = {"seconds": 5.0, "normalize": False, "read": read} | options
    return AudioBatches(utterances, **options)


def assert_equal(a, b):
    assert torch.equal(a.waveforms, b.waveforms)
    assert torch.equal(a.lengths, b.lengths)
    assert a.texts == b.texts


def test_an_epoch_has_every_utterance_once():
    found = batches(clips())
    for epoch in range(3):
        numbers = range(epoch * found.batches_per_epoch, (epoch + 1) * found.batches_per_epoch)
        texts = [text for n in numbers for text in found[n].texts]
        assert sorted(texts) == sorted(f"t{i}" for i in range(40))


def test_a_batch_is_a_function_of_seed_and_number():
    found, again, other = batches(clips()), batches(clips()), batches(clips(), seed=1)
    order = [7, 0, 31, 7, 2]
    assert_equal(found[order[0]], again[order[3]])
    for n in order:
        assert_equal(found[n], again[n])
    assert any(found[n].texts != other[n].texts for n in order)
    first, second = (
        [found[e * found.batches_per_epoch + n].texts for n in range(found.batches_per_epoch)]
        for e in range(2)
    )
    assert first != second


def test_utterances_of_a_batch_have_similar_lengths_within_the_budget():
    found = batches(clips(400))
    sizes = []
    for n in range(found.batches_per_epoch):
        batch = found[n]
        B, S = batch.waveforms.shape
        assert B * S <= 5.0 * RATE
        assert batch.lengths.min() * 1.15 >= S == batch.lengths.max()
        for row, length, text in zip(batch.waveforms, batch.lengths, batch.texts, strict=True):
            assert (row[:length] == float(text[1:])).all()
            assert not row[length:].any()
        sizes.append(B)
    assert max(sizes) > 4 * min(sizes)


def test_long_clips_are_cropped_or_left_out():
    utterances = clips()
    long = sum(each.samples > RATE for each in utterances)
    cropped = batches(utterances, max_seconds=1.0)
    assert cropped.left_out == 0
    longest = [int(cropped[n].lengths.max()) for n in range(cropped.batches_per_epoch)]
    assert max(longest) == RATE
    kept = batches(utterances, max_seconds=1.0, crop=False)
    assert kept.left_out == long > 0
    short = batches(utterances, min_seconds=1.0)
    assert len(short.utterances) == sum(each.samples >= RATE for each in utterances)
    with pytest.raises(ValueError, match=r"one of 5 to 15.6\d* s, got 40 of other lengths"):
        batches(utterances, min_seconds=5.0)


def test_crops_differ_by_epoch_and_are_repeatable():
    ramp = {"read": lambda path: np.arange(40_000, dtype=np.float32), "max_seconds": 0.5}
    found = batches([Utterance(Path("0"), 40_000)], **ramp)
    starts = [int(found[n].waveforms[0, 0]) for n in range(5)]
    assert len(set(starts)) > 1
    assert starts == [int(found[n].waveforms[0, 0]) for n in range(5)]


def test_utterances_are_normalized():
    noise = np.random.default_rng(0).normal(3, 5, 20_000).astype(np.float32)
    found = batches([Utterance(Path("0"), 20_000)], normalize=True, read=lambda path: noise)
    x = found[0].waveforms
    assert x.mean().abs() < 1e-3
    assert (x.square().mean() - 1).abs() < 1e-2


def test_unreadable_files_leave_their_batch_and_are_counted(folder):
    write(folder / "d.wav", 0.5)
    names = ("a.wav", "c.wav", "d.wav", "missing.wav")
    found = AudioBatches([Utterance(folder / name, 8000, name) for name in names])
    batch = found[0]
    assert sorted(batch.texts) == ["a.wav", "d.wav"]
    assert batch.waveforms.shape == (2, 8000)
    assert batch.skipped == 2
    assert any(line.startswith(f"{folder / 'missing.wav'}: no such") for line in batch.problems)
    with pytest.raises(ValueError, match=r"utterances must be readable, got none: .*c.wav"):
        AudioBatches([Utterance(folder / "c.wav", 8000)])[0]


def test_a_batch_of_none_but_unreadable_files_is_the_next_one(folder):
    write(folder / "d.wav", 2.0)
    utterances = [Utterance(folder / "c.wav", 8000), Utterance(folder / "d.wav", 32_000)]
    found = AudioBatches(utterances)
    assert found.batches_per_epoch == 2
    assert [found[n].waveforms.shape for n in range(2)] == [(1, 32_000)] * 2
    assert sorted(found[n].skipped for n in range(2)) == [0, 1]


def test_audio_that_is_not_finite_is_left_out():
    rows = {"0": np.full(9000, np.nan, np.float32), "1": np.ones(9000, np.float32)}
    utterances = [Utterance(Path(name), 9000, name) for name in rows]
    batch = AudioBatches(utterances, read=lambda path: rows[path.name])[0]
    assert (batch.texts, batch.skipped) == (("1",), 1)


def test_workers_give_the_same_batches(folder):
    found = AudioBatches(read_manifest(folder).utterances)
    found[0]
    loader = DataLoader(found, batch_size=None, sampler=range(3), num_workers=1)
    for n, batch in enumerate(loader):
        assert_equal(batch, found[n])
