"""The digits recipe: data, augmentation, exact resume, evaluation and the shipped checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2ForCTC, Wav2Vec2Processor

from ssl_models.digits import checkpoint_path, clips_path, load_clips, synthesis
from ssl_models.digits.augment import augment, change_speed, normalize
from ssl_models.digits.batches import StringBatches
from ssl_models.digits.data import (
    SAMPLE_RATE,
    TRAINING_SPEAKERS,
    WORDS,
    Clip,
    DigitString,
    fixed_strings,
    join,
    load_fsdd,
    test_clips,
    training_clips,
)
from ssl_models.digits.evaluate import Evaluation, disagreement, evaluate, rate_change, transcribe
from ssl_models.digits.model import VOCABULARY, build_config, build_processor
from ssl_models.digits.train import RECIPE, ctc_loss, export
from ssl_models.training import Recipe, train

FSDD = Path(__file__).parents[2] / "shared" / "data" / "fsdd"
needs_fsdd = pytest.mark.skipif(
    not FSDD.is_dir(), reason="the Free Spoken Digit Dataset is not beside the project"
)
LETTERS = {number: letter for letter, number in VOCABULARY.items()}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tone(digit: int, seconds: float = 0.2) -> np.ndarray:
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return np.sin(2 * np.pi * (300 + 200 * digit) * times).astype(np.float32)


def tone_clips() -> list[Clip]:
    return [
        Clip(digit, speaker, index, tone(digit, 0.15 + 0.01 * index))
        for speaker in ("george", "lucas", "theo", "stranger")
        for digit in range(10)
        for index in range(7)
    ]


@pytest.fixture
def tone_folder(tmp_path):
    for digit, rate, ending in [(3, 8000, "wav"), (7, 8000, "flac"), (9, 44_100, "flac")]:
        samples = 0.01 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
        soundfile.write(tmp_path / f"{digit}_ann_{digit + 2}.{ending}", samples, rate)
    (tmp_path / "README.md").write_text("not a recording")
    return tmp_path


def test_recordings_are_read_at_16_khz_and_leveled(tone_folder):
    clips = load_fsdd(tone_folder)
    names = [(clip.digit, clip.speaker, clip.index) for clip in clips]
    assert names == [(3, "ann", 5), (7, "ann", 9), (9, "ann", 11)]
    for clip in clips:
        assert clip.audio.dtype == np.float32
        assert len(clip.audio) == SAMPLE_RATE // 2
        spectrum = np.abs(np.fft.rfft(clip.audio))
        assert spectrum.argmax() == 220  # 440 Hz in bins of 2 Hz
        assert 0.9 < np.sqrt((clip.audio**2).mean()) < 1.1


def test_folder_without_recordings_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"folder must hold files like 7_theo_12.flac.*got"):
        load_fsdd(tmp_path)


def test_training_never_sees_the_held_out_speaker_or_official_clips():
    training, reported = training_clips(tone_clips()), test_clips(tone_clips())
    assert {clip.speaker for clip in training} == {"george", "lucas"}
    assert {clip.index for clip in training} == {5, 6}
    assert {clip.speaker for clip in reported} == {"george", "lucas", "theo"}
    assert {clip.index for clip in reported if clip.speaker != "theo"} == {0, 1, 2, 3, 4}
    assert sum(clip.speaker == "theo" for clip in reported) == 70


def test_join_places_clips_and_gaps():
    audio = join([np.ones(3, np.float32), np.full(2, 2.0, np.float32)], [1, 2, 1])
    assert audio.tolist() == [0, 1, 1, 1, 0, 0, 2, 2, 0]


def test_fixed_strings_use_each_clip_once():
    strings = fixed_strings(tone_clips(), seed=4)
    for speaker in ("george", "lucas", "theo", "stranger"):
        words = [word for s in strings if s.speaker == speaker for word in s.text.split()]
        assert sorted(words) == sorted(7 * list(WORDS))
    assert {len(s.text.split()) for s in strings} == {1, 2, 3, 4}
    again, other = fixed_strings(tone_clips(), seed=4), fixed_strings(tone_clips(), seed=5)
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(strings, again, strict=True))
    assert [s.text for s in strings] != [s.text for s in other]


def batches(**changes) -> StringBatches:
    options = {"seed": 1, "seconds": 3.2} | changes
    return StringBatches(training_clips(tone_clips()), [], VOCABULARY, **options)


def test_batch_is_a_function_of_seed_and_step():
    audio, labels = batches()[7]
    again, same_labels = batches()[7]
    assert torch.equal(audio, again)
    assert torch.equal(labels, same_labels)
    for other in (batches()[8], batches(seed=2)[7]):
        assert other[0].shape != audio.shape or not torch.equal(other[0], audio)


def test_batch_holds_normalized_strings_of_one_length():
    for step in range(6):
        audio, labels = batches()[step]
        assert audio.dtype == torch.float32
        assert audio.shape[0] == labels.shape[0]
        assert audio.shape[0] * audio.shape[1] == pytest.approx(3.2 * SAMPLE_RATE, rel=0.3)
        assert audio.mean(1).abs().max() < 1e-3
        assert (audio.square().mean(1) - 1).abs().max() < 1e-2
        for row in labels.tolist():
            words = "".join(LETTERS[number] for number in row if number != -100).split("|")
            assert 1 <= len(words) <= 4
            assert set(words) <= set(WORDS)


def test_labels_name_the_digits_that_sound():
    """Each tone stands for a digit: the strongest frequency of a one-digit string tells it."""
    recorded = [Clip(d, "ann", 5, tone(d, 0.6)) for d in (0, 9)]
    strings = StringBatches(recorded, [], VOCABULARY, seed=0, seconds=8.0)
    seen = set()
    for step in range(4):
        audio, labels = strings[step]
        for row, samples in zip(labels.tolist(), audio.numpy(), strict=True):
            words = "".join(LETTERS[number] for number in row if number != -100).split("|")
            if len(set(words)) == 1:
                spectrum = np.abs(np.fft.rfft(samples))
                peak = spectrum[int(200 * len(samples) / SAMPLE_RATE) :].argmax()
                hertz = peak * SAMPLE_RATE / len(samples) + 200
                assert (hertz < 700) == (words[0] == "zero")
                seen.add(words[0])
    assert seen == {"zero", "nine"}


def test_synthetic_voices_take_their_share():
    synthetic = [Clip(8, "synthetic000", 0, tone(8))]
    recorded = [Clip(3, "ann", 5, tone(3))]
    for share, words in [(0.0, {"three"}), (1.0, {"eight"}), (0.5, {"three", "eight"})]:
        strings = StringBatches(
            recorded, synthetic, VOCABULARY, seed=0, seconds=16.0, synthetic_share=share
        )
        rows = strings[0][1].tolist()
        texts = ["".join(LETTERS[n] for n in row if n != -100).split("|") for row in rows]
        assert {word for text in texts for word in text} == words


def test_speed_scales_length_and_pitch():
    faster = change_speed(tone(0, 1.0), 1.25)
    assert abs(len(faster) - SAMPLE_RATE / 1.25) <= 1
    peak = np.abs(np.fft.rfft(faster)).argmax() * SAMPLE_RATE / len(faster)
    assert abs(peak - 300 * 1.25) < 3


def test_augmentation_keeps_shape_and_the_signal():
    rng = np.random.default_rng(0)
    audio = np.stack([tone(digit, 0.5) for digit in range(8)])
    augmented = augment(audio, rng)
    assert augmented.shape == audio.shape
    assert augmented.dtype == np.float32
    assert not np.allclose(augmented, audio)
    similarity = (normalize(augmented) * normalize(audio)).mean(axis=1)
    assert np.abs(similarity).min() > 0.3


def test_missing_espeak_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(synthesis.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"apt-get install espeak-ng.*--no-synthetic"):
        synthesis.synthetic_clips(tmp_path / "clips.npz")


def test_rendered_voices_are_kept(monkeypatch, tmp_path):
    calls = []

    def speak(text, *, voice, words_per_minute, pitch):
        calls.append((text, voice))
        return 0.5 * tone(len(text))

    monkeypatch.setattr(synthesis, "synthesize", speak)
    first = synthesis.synthetic_clips(tmp_path / "out" / "clips.npz", voices=2)
    again = synthesis.synthetic_clips(tmp_path / "out" / "clips.npz", voices=2)
    assert len(calls) == len(first) == 20
    assert [(c.digit, c.speaker) for c in first] == [(c.digit, c.speaker) for c in again]
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(first, again, strict=True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clips.npz"]


def tiny_model() -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    changes = {"conv_dim": (8, 8, 8, 16), "hidden_size": 16, "num_hidden_layers": 1}
    changes |= {"num_attention_heads": 2, "intermediate_size": 32, "mask_feature_length": 4}
    changes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForCTC(build_config(**changes))


class Killed(Exception):
    pass


def kill_at(last: int):
    def report(step: int, loss: float) -> None:
        if step == last:
            raise Killed

    return report


def run(folder: Path, recipe: Recipe, **options) -> Wav2Vec2ForCTC:
    model = tiny_model()
    train(model, ctc_loss, batches(), recipe, folder, **options)
    return model


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """transformers draws its masks from numpy's random state."""
    recipe = Recipe(steps=6, seed=3, warmup_steps=2)
    straight = run(tmp_path / "straight", recipe).state_dict()
    with pytest.raises(Killed):  # the last state is the one after step 3
        run(tmp_path / "killed", recipe, save_seconds=-1.0, report=kill_at(4))
    torch.rand(5), np.random.rand(5)  # a fresh process has another random state
    resumed = run(tmp_path / "killed", recipe, resume=True)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, straight[name]), name
    assert not torch.equal(straight["lm_head.weight"], tiny_model().lm_head.weight)


def test_the_checkpoints_rate_falls_over_the_last_part():
    rates = [RECIPE.rate(step) for step in range(RECIPE.steps)]
    assert rates[299:3121] == [1.5e-3] * 2822
    assert rates[-1] < 1e-6


def test_export_round_trips_in_half_precision(tmp_path):
    model = tiny_model()
    export(model, tmp_path)
    loaded = Wav2Vec2ForCTC.from_pretrained(tmp_path, dtype=torch.float32)
    processor = Wav2Vec2Processor.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    assert processor.feature_extractor.return_attention_mask
    assert processor.tokenizer("six zero").input_ids == [VOCABULARY[c] for c in "six|zero"]


def evaluation(errors, hypotheses=None, speakers=None) -> Evaluation:
    speakers, hypotheses = speakers or ["ann"] * len(errors), hypotheses or ["one"] * len(errors)
    words = np.full(len(errors), 2)
    return Evaluation(tuple(speakers), tuple(hypotheses), np.array(errors), words)


def test_rates_are_means_over_speakers():
    result = evaluation([0, 0, 0, 2], speakers=["ann", "ann", "ann", "bob"])
    assert result.rate("ann").value == 0
    assert result.rate("bob").value == 1
    assert result.rate().value == 0.5
    with pytest.raises(ValueError, match=r"speaker must be in .*'ann', 'bob'.*, got 'eve'"):
        result.rate("eve")


def test_interval_covers_the_rate_and_narrows():
    few, many = evaluation([0, 1, 2, 0]).rate(), evaluation([0, 1, 2, 0] * 50).rate()
    for rate in (few, many):
        assert rate.low <= rate.value <= rate.high
    assert many.high - many.low < few.high - few.low


def test_pairing_cancels_the_spread_among_strings():
    reference, worse = evaluation([0, 2] * 20), evaluation([1, 3] * 20)
    change = rate_change(reference, worse)
    assert (change.value, change.low, change.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="other must evaluate the strings of reference"):
        rate_change(reference, evaluation([1]))


def test_disagreement_counts_words_against_the_reference_model():
    reference = evaluation([0, 0, 1], ["one two", "six", ""])
    other = evaluation([0, 0, 1], ["one two", "nine", "one"])
    assert disagreement(reference, reference).value == 0
    assert disagreement(reference, other).value == pytest.approx(2 / 3)


class Parrot:
    """A model that says "six" whatever it hears."""

    def eval(self):
        return self

    def __call__(self, audio):
        ids = torch.tensor([VOCABULARY[letter] for letter in "six"])
        logits = torch.nn.functional.one_hot(ids, len(VOCABULARY))[None].float()
        return type("Output", (), {"logits": logits})()


def test_evaluate_counts_word_errors():
    strings = [DigitString(text, "ann", tone(1)) for text in ("six", "one six", "one two three")]
    result = evaluate(Parrot(), build_processor(), strings)
    assert result.hypotheses == ("six", "six", "six")
    assert result.errors.tolist() == [0, 1, 3]
    assert result.words.tolist() == [1, 2, 3]


@pytest.fixture(scope="module")
def shipped():
    model = Wav2Vec2ForCTC.from_pretrained(checkpoint_path(), dtype=torch.float32)
    return model, Wav2Vec2Processor.from_pretrained(checkpoint_path())


def test_shipped_checkpoint_is_small_and_complete(shipped):
    model, processor = shipped
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 3.9e6
    files = {path.name: path.stat().st_size for path in checkpoint_path().iterdir()}
    assert sum(files.values()) <= 8e6
    assert {"README.md", "LICENSE", "config.json", "model.safetensors", "vocab.json"} <= set(files)
    assert processor.feature_extractor.return_attention_mask
    assert processor.tokenizer.get_vocab() == VOCABULARY


def test_shipped_model_reads_the_shipped_clips(shipped):
    clips = load_clips()
    assert len(clips) >= 8
    entries = json.loads((clips_path() / "transcripts.json").read_text())
    assert all(entry["synthetic"] for entry in entries)
    strings = [DigitString(clip.text, clip.voice, clip.audio) for clip in clips]
    result = evaluate(*shipped, strings)
    assert result.errors.sum() / result.words.sum() <= 0.1


def test_shipped_model_hears_nothing_in_silence(shipped):
    silence = np.zeros(SAMPLE_RATE, np.float32)
    assert transcribe(*shipped, silence) == ""


@needs_fsdd
def test_shipped_model_reads_real_recordings(shipped):
    clips = [c for c in test_clips(load_fsdd(FSDD)) if c.index < 2]
    result = evaluate(*shipped, fixed_strings(clips, seed=1))
    assert result.rate(*TRAINING_SPEAKERS).value <= 0.05
    assert result.rate("theo").value <= 0.25
