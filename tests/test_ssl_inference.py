"""LowbitEncoder and the upstream for s3prl: rows in, frames out, the same as one at a time."""

import copy
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader
from transformers import (
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from lowbit_kernels import CheckpointError, QuantConfig, quantize, save_quantized
from lowbit_kernels.testing import assert_as_accurate
from ssl_models.inference import LowbitEncoder
from ssl_models.inference.loaded import LoadedEncoder
from ssl_models.inference.s3prl import lowbit
from ssl_models.objectives import CTC
from ssl_models.objectives.ctc import LETTERS
from ssl_models.training.tasks import CONFIG_FILE, ENCODER_FILE, HEAD_FILE, _save
from tests.ssl_cases import SMALL, build

RATE = 16_000
SAMPLES = (1800, 4000, 900, 4000, 2500)
EXAMPLE = Path(__file__).parent.parent / "examples" / "ray_data.py"


def small_wav2vec2(**options):
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        conv_dim=SMALL["conv_dims"], conv_kernel=SMALL["conv_kernels"],
        conv_stride=SMALL["conv_strides"], num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return Wav2Vec2ForCTC(config).eval()


def write_float(folder):
    encoder = build("conformer")
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(encoder.config.to_json())
    _save(encoder.state_dict(), folder / ENCODER_FILE)
    return encoder


def write_low_bit(folder):
    encoder = build("post-norm")
    quantize(encoder, QuantConfig.small())
    save_quantized(encoder, folder)
    return encoder


def write_transformers(folder, normalize=True):
    model = small_wav2vec2(feat_extract_norm="group")
    quantize(model, QuantConfig.small())
    save_quantized(model, folder)
    Wav2Vec2FeatureExtractor(do_normalize=normalize).save_pretrained(folder)
    return model.wav2vec2


WRITERS = {"float": write_float, "low-bit": write_low_bit, "transformers": write_transformers}


@pytest.fixture
def audios():
    rng = np.random.default_rng(0)
    return [0.3 * rng.standard_normal(n, dtype=np.float32) + 0.1 for n in SAMPLES]


@pytest.fixture
def folder(tmp_path):
    write_low_bit(tmp_path / "model")
    return tmp_path / "model"


def alone(model, audio, dtype=torch.float32):
    """Of one utterance, by the model itself."""
    x = torch.from_numpy(audio).double()
    x = ((x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt())[None].to(dtype)
    with torch.inference_mode():
        out = model(x)
    return out[0][0] if isinstance(out, tuple) else out.last_hidden_state[0]


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_have_the_frames_of_single_utterances(kind, tmp_path, audios):
    model = WRITERS[kind](tmp_path / "model")
    rows = LowbitEncoder(tmp_path / "model", device="cpu")({"audio": audios, "id": [*"abcde"]})
    assert rows.keys() == {"id", "frames", "error"}
    assert rows["id"] == [*"abcde"]
    assert list(rows["error"]) == [""] * 5
    for audio, frames in zip(audios, rows["frames"], strict=True):
        expected = alone(copy.deepcopy(model).double(), audio, torch.float64)
        assert frames.dtype == np.float32
        assert_as_accurate(torch.from_numpy(frames), alone(model, audio), expected)


def test_audio_is_normalized_as_the_feature_extractor_says(tmp_path, audios):
    model = write_transformers(tmp_path / "model", normalize=False)
    frames = LowbitEncoder(tmp_path / "model", device="cpu")({"audio": audios[:1]})["frames"][0]
    with torch.inference_mode():
        expected = model(torch.from_numpy(audios[0])[None]).last_hidden_state[0]
    torch.testing.assert_close(torch.from_numpy(frames), expected)


def test_files_are_read_and_what_cannot_be_says_why(folder, tmp_path, audios):
    good, bad, short = (tmp_path / name for name in ("a.wav", "b.wav", "c.wav"))
    soundfile.write(good, audios[1], RATE, subtype="FLOAT")
    bad.write_bytes(b"no audio")
    soundfile.write(short, audios[1][:20], RATE)
    encoder = LowbitEncoder(folder, device="cpu")
    paths = np.array([str(bad), str(good), str(tmp_path / "none.wav"), str(short)])
    rows = encoder({"path": paths})
    assert rows["path"] is paths
    np.testing.assert_array_equal(rows["frames"][1], encoder({"audio": [audios[1]]})["frames"][0])
    assert [each.shape for each in rows["frames"]][::2] == [(0, 32), (0, 32)]
    for error, said in zip(
        rows["error"], ("b.wav", "", "no such file", "got 20 samples"), strict=True
    ):
        assert (said in error) if said else error == ""


@pytest.mark.parametrize("write", [write_float, write_low_bit])
def test_a_head_that_was_finetuned_reads(write, tmp_path, audios):
    model = write(tmp_path / "model")
    torch.manual_seed(1)
    head = CTC(32)
    with torch.no_grad():
        # letters that change with the frames
        head.head.bias.copy_(-head.head(alone(model, audios[1])).mean(0))
    _save(head.state_dict(), tmp_path / "model" / HEAD_FILE)
    rows = LowbitEncoder(tmp_path / "model", device="cpu")({"audio": [*audios, np.zeros(3)]})
    for audio, text in zip(audios, rows["text"][:-1], strict=True):
        with torch.inference_mode():
            best = head.head(alone(model, audio)).argmax(-1).tolist()
        merged = [b for a, b in zip([None, *best], best, strict=False) if a != b and b != 0]
        assert text == "".join(LETTERS[b - 1] for b in merged)
    assert rows["text"][-1] == ""
    assert len(set(rows["text"])) > 3


def test_a_head_of_another_vocabulary_is_refused(folder):
    _save(CTC(32, "abc").state_dict(), folder / HEAD_FILE)
    with pytest.raises(ValueError, match="must be a head of 32 features and the letters"):
        LoadedEncoder.load(folder)


def test_wrong_audio_is_a_row_of_its_own(folder, audios):
    wrong = [np.full(900, np.nan, np.float32), np.zeros((2, 900), np.float32), "noise", audios[0]]
    rows = LowbitEncoder(folder, device="cpu")({"audio": wrong})
    assert [bool(error) for error in rows["error"]] == [True, True, True, False]
    assert [len(each) > 0 for each in rows["frames"]] == [False, False, False, True]


def test_no_more_goes_through_the_model_at_once_than_asked(folder, audios, monkeypatch):
    encoder, seen = LowbitEncoder(folder, device="cpu", seconds=8000 / RATE), []
    run = LoadedEncoder.forward

    def spy(self, utterances):
        seen.append([len(each) for each in utterances])
        return run(self, utterances)

    monkeypatch.setattr(LoadedEncoder, "forward", spy)
    encoder({"audio": audios})
    assert seen == [[4000, 4000], [2500, 1800, 900]]
    encoder.seconds = 100 / RATE
    seen.clear()
    encoder({"audio": audios[:2]})
    assert seen == [[4000], [1800]]


def test_it_is_pickled_without_its_model(folder, audios):
    encoder = LowbitEncoder(folder, device="cpu")
    fresh = pickle.dumps(encoder)
    rows = encoder({"audio": audios})
    assert pickle.dumps(encoder) == fresh
    for a, b in zip(pickle.loads(fresh)({"audio": audios})["frames"], rows["frames"], strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_encodes_in_the_workers_of_a_loader(folder, audios):
    encoder = LowbitEncoder(folder, device="cpu")
    batches = [{"audio": audios[:2], "id": [0, 1]}, {"audio": audios[2:], "id": [2, 3, 4]}]
    loader = DataLoader(
        batches, batch_size=None, collate_fn=encoder, num_workers=2,
        multiprocessing_context="spawn",
    )  # fmt: skip
    found = [row for batch in loader for row in zip(batch["id"], batch["frames"], strict=True)]
    assert [name for name, _ in found] == [0, 1, 2, 3, 4]
    for (_, a), b in zip(found, encoder({"audio": audios})["frames"], strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b))


def test_what_is_wrong_is_named(folder, tmp_path, audios):
    with pytest.raises(ValueError, match="folder must exist, got nowhere"):
        LowbitEncoder("nowhere")
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        LowbitEncoder(folder, seconds=0)
    with pytest.raises(ValueError, match=r"rows must have 'path' or 'audio', got \['id'\]"):
        LowbitEncoder(folder)({"id": [1]})
    with pytest.raises(CheckpointError):
        LowbitEncoder(tmp_path, device="cpu")({"audio": audios})
    loaded = LoadedEncoder.load(folder)
    with pytest.raises(ValueError, match="at least one, got none"):
        loaded([])
    with pytest.raises(ValueError, match="got 12 samples"):
        loaded([torch.zeros(2000), torch.zeros(12)])


def test_models_that_cannot_be_fed_are_refused(tmp_path):
    write_transformers(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json beside it"):
        LoadedEncoder.load(tmp_path / "model")
    mel = Wav2Vec2BertModel(
        Wav2Vec2BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        )
    )
    quantize(mel, QuantConfig.small())
    save_quantized(mel, tmp_path / "mel")
    with pytest.raises(ValueError, match="takes waveforms, got a Wav2Vec2BertModel"):
        LoadedEncoder.load(tmp_path / "mel")


@pytest.mark.parametrize("stable", [False, True])
def test_the_upstream_has_the_states_of_transformers(stable, tmp_path, audios):
    model = small_wav2vec2(do_stable_layer_norm=stable, feat_extract_norm="layer")
    quantize(model, QuantConfig.small())
    save_quantized(model, tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path)
    upstream, audio = lowbit(str(tmp_path), refresh=False).eval(), torch.from_numpy(audios[1])
    with torch.inference_mode():
        wanted = model.wav2vec2(audio[None], output_hidden_states=True)
        found = upstream([audio])
    states = found["hidden_states"]
    assert len(states) == len(wanted.hidden_states) == 4
    for a, b in zip(states, (*wanted.hidden_states[:-1], wanted.last_hidden_state), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found["last_hidden_state"], wanted.last_hidden_state)


def test_the_upstream_is_what_s3prl_takes(tmp_path, audios):
    """As its ``Featurizer`` asserts: states that stack, and a rate that tells their length."""
    encoder = build("squeezeformer")
    quantize(encoder, QuantConfig.small())
    save_quantized(encoder, tmp_path)
    upstream = lowbit(str(tmp_path))
    wavs = [torch.from_numpy(each) for each in audios]
    with torch.inference_mode():
        found = upstream(wavs)
    states = torch.stack(found["hidden_states"])
    rate = upstream.get_downsample_rates("hidden_states")
    assert rate == 20
    assert states.shape[:2] == (5, 5)
    assert abs(states.shape[2] - round(max(SAMPLES) / rate)) < 5
    with pytest.raises(ValueError, match="ckpt must be a folder that exists, got nowhere"):
        lowbit("nowhere")


def test_the_upstream_passes_gradients_to_its_inputs_states(tmp_path, audios):
    """Of which s3prl learns a weighted sum."""
    write_float(tmp_path / "model")
    states = lowbit(str(tmp_path / "model"))([torch.from_numpy(audios[0])])["hidden_states"]
    assert all(each.requires_grad for each in states)


@pytest.mark.slow
def test_ray_data_encodes_a_corpus(folder, tmp_path, audios):
    ray = pytest.importorskip("ray")
    parquet = pytest.importorskip("pyarrow.parquet")
    spec = importlib.util.spec_from_file_location("ray_data", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i, audio in enumerate(audios):
        soundfile.write(corpus / f"{i}.wav", audio, RATE, subtype="FLOAT")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=300 * 2**20)
    try:
        example.encode(folder, corpus, tmp_path / "out", workers=2, gpus=0.0)
    finally:
        ray.shutdown()
    rows = {Path(row["path"]).stem: row for row in parquet.read_table(tmp_path / "out").to_pylist()}
    assert sorted(rows) == [*"01234"]
    encoder = LowbitEncoder(folder, device="cpu")
    for i, audio in enumerate(audios):
        expected = encoder({"audio": [audio]})["frames"][0]
        row = rows[str(i)]
        found = np.array(row["frames"], np.float32).reshape(row["shape"])
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected))
        assert row["error"] == ""
