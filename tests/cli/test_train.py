"""``lowbit train``: three tasks on a folder of noise, and what goes wrong."""

import json

import pytest
import torch

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("sklearn")

from lowbit_kernels.checkpoint import load_quantized  # noqa: E402
from ssl_models.digits import train as digits_train  # noqa: E402
from ssl_models.inference import LowbitEncoder  # noqa: E402
from ssl_models.objectives.ctc import word_error_rate  # noqa: E402
from ssl_models.training import Summary  # noqa: E402
from ssl_models.training.tasks import load_encoder  # noqa: E402

TINY = {
    "front_end": "fbank", "hidden_size": 32, "num_layers": 2, "num_heads": 2,
    "feed_forward_size": 32, "position_kernel": 4, "position_groups": 2,
}  # fmt: skip


@pytest.fixture
def speech(tmp_path, noise, monkeypatch):
    """A folder with clips, a broken one, a manifest with texts, a config and a recipe."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "clips"
    folder.mkdir()
    rows = []
    for number, text in enumerate(("one", "Two", "one two")):
        soundfile.write(folder / f"{number}.wav", noise(0.3 + 0.1 * number, number), 16_000)
        rows.append({"audio": f"clips/{number}.wav", "text": text})
    (folder / "broken.wav").write_bytes(b"no audio")
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "recipe.yaml").write_text("steps: 3\nwarmup_steps: 1\npeak_rate: 1e-3\n")
    return tmp_path


NEW = ("--encoder", "config.json", "--recipe", "recipe.yaml", "--json")


def test_pretraining_writes_an_encoder_that_finetuning_takes(speech, lowbit):
    found = lowbit("train", "pretrain", "clips", "pre", *NEW, "--clusters", 4)
    assert found.code == 0
    assert len(found.json["losses"]) == 3
    assert found.json["recipe"]["peak_rate"] == 1e-3
    assert found.json["unreadable"] == 1
    assert "skipped: clips/broken.wav" in found.err
    assert 0.25 <= found.json["majority"] <= 1
    assert 0 <= found.json["accuracy"] <= 1
    encoder = load_encoder(speech / "pre")
    assert encoder.config.hidden_size == 32

    features = ("--features", "pre", "--layer", "encoder.layers.1")
    again = lowbit("train", "pretrain", "clips", "pre2", *NEW, "--clusters", 4, *features)
    assert again.code == 0

    options = ("--encoder", "pre", "--recipe", "recipe.yaml", "--test", "texts.jsonl")
    shown = lowbit("train", "finetune", "texts.jsonl", "tuned", *options)
    assert shown.code == 0
    assert "wer" in shown.out
    assert "saved in" in shown.out
    assert shown.err == ""
    assert {p.name for p in (speech / "tuned").iterdir()} == {
        "config.json", "encoder.safetensors", "head.safetensors", "state.pt"
    }  # fmt: skip


def test_a_finetuned_run_reads(speech, lowbit):
    options = ("--recipe", "recipe.yaml", "--encoder", "config.json", "--test", "texts.jsonl")
    for bits, folder in (((), "tuned"), (("--bits", 4), "tuned4/low-bit")):
        out = folder.split("/")[0]
        found = lowbit("train", "finetune", "texts.jsonl", out, *options, *bits, "--json")
        assert found.code == 0
        paths = [f"clips/{number}.wav" for number in range(3)]
        texts = LowbitEncoder(folder, device="cpu")({"path": paths})["text"]
        rate = word_error_rate(["one", "two", "one two"], list(texts))
        # in float what is saved is what was judged
        assert bits or rate == found.json["wer"]


def test_distillation_in_low_bits_writes_a_packed_encoder(speech, lowbit):
    lowbit("train", "pretrain", "clips", "pre", *NEW, "--clusters", 4)
    options = ("--recipe", "recipe.yaml", "--bits", 2, "--inputs", "int4", "--json")
    found = lowbit("train", "distill", "clips", "out", "pre", *options)
    assert found.code == 0
    assert found.json["losses"][0] > 0
    model = load_quantized(speech / "out" / "low-bit")
    frames, _ = model(torch.randn(1, 4000))
    assert frames.isfinite().all()


def test_a_run_is_resumed_and_not_overwritten(speech, lowbit):
    options = ("texts.jsonl", "out", *NEW)
    first = lowbit("train", "finetune", *options)
    refused = lowbit("train", "finetune", *options)
    assert refused.code == 2
    assert refused.err == "lowbit: out must hold no run unless that is resumed, got out\n"
    again = lowbit("train", "finetune", *options, "--resume")
    assert again.json["losses"] == first.json["losses"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrain", "nowhere", "out"), "data must be a folder, a .tsv or a .jsonl file"),
        (("finetune", "clips", "out"), "data must have a text for each utterance, got none of"),
        (("pretrain", "clips", "out", "--bits", "3"), "bits must be"),
        (("pretrain", "clips", "out", "--inputs", "int8"), "inputs must be None without bits"),
        (("pretrain", "clips", "out", "--steps", "0"), "steps must be at least 1, got 0"),
        (("pretrain", "clips", "out", "--engine", "x"), "engine must be one of"),
        (("pretrain", "clips", "out", "--layer", "x"), "features and layer must come together"),
        (("pretrain", "clips", "out", "--clusters", "999"), "clusters must be at most"),
        (("distill", "clips", "out", "clips"), "encoder must be a folder with config.json"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, speech, lowbit):
    encoder = () if arguments[0] == "distill" else ("--encoder", "config.json")
    found = lowbit("train", *arguments, *encoder)
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") == 1
    assert not (speech / "out").exists()


def test_unknown_encoders_are_named(speech, lowbit):
    found = lowbit("train", "pretrain", "clips", "out", "--encoder", "hubert-huge")
    assert found.code == 2
    assert "hubert-huge is no file, folder nor preset: conformer-l" in found.err


def test_digits_are_trained_by_the_checkpoints_recipe(speech, lowbit, monkeypatch):
    pytest.importorskip("transformers")
    called = {}

    def train_digits(data, out, recipe, **options):
        called.update(data=data.name, recipe=recipe, **options)
        options["report"](0, 1.5)
        return Summary(losses=[1.5])

    monkeypatch.setattr(digits_train, "train_digits", train_digits)
    options = ("--no-synthetic", "--bf16", "--steps", "7", "--threads", "1", "--json")
    found = lowbit("train", "digits", "clips", "out", *options)
    assert found.code == 0
    assert found.json["losses"] == [1.5]
    recipe = called["recipe"]
    assert (recipe.steps, recipe.bf16, recipe.peak_rate) == (7, True, 1.5e-3)
    assert (called["synthetic"], called["resume"]) == (False, False)


def test_digits_need_recordings(speech, lowbit):
    found = lowbit("train", "digits", "clips", "out", "--threads", "1")
    assert found.code == 2
    assert "folder must hold files like 7_theo_12.flac" in found.err
