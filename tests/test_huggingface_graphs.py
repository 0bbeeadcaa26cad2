"""capture_graphs of transformers' models: on a CPU with a stand-in, and where there is a GPU."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from lowbit_kernels import capture_graphs, dequantize, quantize
from lowbit_kernels.conversion.graphs import MIN_SAMPLES
from lowbit_kernels.testing import assert_as_accurate
from tests.families.models import FAMILIES, VOCABULARY
from tests.graph_stand_in import capture_on_cpu

BY_NAME = {family.name: family for family in FAMILIES}
WAVEFORMS = [family.name for family in FAMILIES if family.input_name == "input_values"]


@pytest.mark.parametrize("fuse", [False, True], ids=["layers", "fused"])
@pytest.mark.parametrize("name", WAVEFORMS)
def test_a_bucket_is_eager_padded_and_as_accurate_as_eager(name, fuse):
    model = BY_NAME[name].build()
    quantize(model, fuse=fuse)
    exact = dequantize(copy.deepcopy(model)).double()
    graphed = capture_on_cpu(model, (1600, 2000), (1, 3))
    for B, T in ((1, 2000), (1, 1390), (2, 1800)):
        key = min((b, t) for b, t in graphed._captured if b >= B and t >= T)
        waves, mask = torch.randn(B, T), torch.ones(B, T, dtype=torch.long)
        # other rows than those that fill the bucket: they must not matter
        padded, padded_mask = torch.randn(key), torch.ones(key, dtype=torch.long)
        padded[:B], padded_mask[:B] = 0, 0
        padded[:B, :T], padded_mask[:B, :T] = waves, mask
        with torch.no_grad():
            got = graphed(waves).logits
            low, high = model(waves, mask).logits, exact(waves.double(), mask).logits
            wanted = model(padded, padded_mask).logits[:B, : got.shape[1]]
        assert torch.equal(got, wanted), (B, T)
        assert_as_accurate(got, low, high, f"{B} x {T}")


def test_padding_is_silence_for_a_model_that_hears_it():
    model = BY_NAME["wav2vec2-group"].build()  # in float: its GroupNorm takes in the padding
    graphed = capture_on_cpu(model, (2000,), (1,))
    for T in (2000, 1390):
        waves = torch.randn(1, T)
        padded, mask = (nn.functional.pad(t, (0, 2000 - T)) for t in (waves, torch.ones(1, T)))
        with torch.no_grad():
            wanted = model(padded, mask.long()).logits
        got = graphed(waves).logits
        assert torch.equal(got, wanted[:, : got.shape[1]])


def test_every_length_of_a_bucket_gives_its_own_frames():
    family = BY_NAME["wav2vec2-adapter"]
    model = family.build().wav2vec2  # frames before and after the adapter
    graphed = capture_on_cpu(model, (1600,), (1,))
    for T in range(MIN_SAMPLES, 1601, 150):
        waves = torch.randn(1, T)
        with torch.no_grad():
            got, wanted = graphed(waves), model(waves, torch.ones(1, T, dtype=torch.long))
        assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in wanted.items()}


@pytest.mark.parametrize("name", ["wav2vec2-bert", "whisper", "parakeet"])
def test_features_are_refused(name):
    model = BY_NAME[name].build()
    with pytest.raises(ValueError, match=r"takes waveforms, got \w+For"):
        capture_on_cpu(model, (800,), (1,))


def _extractor():
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)


def _clips():
    generator = np.random.default_rng(0)
    return [generator.standard_normal(n).astype(np.float32) for n in (2000, 1390)]


def _tokenizer(path):
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrs"]
    assert len(letters) == VOCABULARY
    (path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    return transformers.Wav2Vec2CTCTokenizer(str(path / "vocab.json"))


def test_pipelines_take_it(tmp_path, caplog):
    ctc = BY_NAME["wav2vec2-group"].build()
    quantize(ctc)
    classifier = transformers.Wav2Vec2ForSequenceClassification(ctc.config).eval()
    tasks = {
        "automatic-speech-recognition": (ctc, {"tokenizer": _tokenizer(tmp_path)}),
        "audio-classification": (classifier, {}),
    }
    for task, (model, parts) in tasks.items():
        results = []
        for used in (model, capture_on_cpu(model, (2000,), (1, 2))):
            pipe = transformers.pipeline(
                task, model=used, feature_extractor=_extractor(), device="cpu", **parts
            )
            results.append([pipe(clip) for clip in _clips()] + pipe(_clips(), batch_size=2))
        if task == "automatic-speech-recognition":
            assert results[0] == results[1]
        else:
            labels = [[[score["label"] for score in clip] for clip in run] for run in results]
            assert labels[0] == labels[1]
    assert "is not supported" not in caplog.text


def test_the_feature_extraction_pipeline_takes_it():
    class Extract(transformers.FeatureExtractionPipeline):
        def preprocess(self, clip):
            return self.feature_extractor(clip, sampling_rate=16_000, return_tensors="pt")

    model = BY_NAME["wav2vec2-layer"].build().wav2vec2
    graphed = capture_on_cpu(model, (2000,), (1,))
    for clip in _clips():
        frames = [
            Extract(model=m, feature_extractor=_extractor(), device="cpu")(clip)
            for m in (model, graphed)
        ]
        assert np.shape(frames[0]) == np.shape(frames[1])


def _bf16_wav2vec2(attention="lowbit"):
    config = transformers.Wav2Vec2Config(num_hidden_layers=2, attn_implementation=attention)
    model = transformers.Wav2Vec2Model(config).eval().cuda().bfloat16()
    quantize(model)
    return model


def _masked(B, T):
    mask = torch.ones(B, T, device="cuda", dtype=torch.long)
    mask[-1, T // 2 :] = 0
    return torch.randn(B, T, device="cuda", dtype=torch.bfloat16), mask


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["lowbit", "sdpa"])
def test_a_replay_equals_eager_on_a_quantized_wav2vec2(attention):
    model = _bf16_wav2vec2(attention)
    graphed = capture_graphs(model, seconds=(1, 2), batch=(2,))
    for T in (16_000, 9_000, 30_000):
        waves, mask = _masked(2, T)
        bucket = 16_000 if T <= 16_000 else 32_000
        padded = nn.functional.pad(waves, (0, bucket - T))
        with torch.inference_mode():
            wanted = model(padded, attention_mask=nn.functional.pad(mask, (0, bucket - T)))
        got = graphed(waves, mask)
        frames = got.last_hidden_state.shape[1]
        assert torch.equal(got.last_hidden_state, wanted.last_hidden_state[:, :frames])


@pytest.mark.gpu
def test_a_replay_sees_an_update_of_the_weights_and_refuses_a_move():
    model = _bf16_wav2vec2()
    quantized = capture_graphs(model, seconds=(1,), batch=(2,))
    waves, mask = _masked(2, 16_000)
    before = quantized(waves, mask).last_hidden_state
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("qweight"):
                buffer.bitwise_xor_(1)
        model.encoder.layer_norm.weight.mul_(2)
        wanted = model(waves, attention_mask=mask).last_hidden_state
    got = quantized(waves, mask).last_hidden_state
    assert torch.equal(got, wanted)
    assert not torch.equal(got, before)
    model.cpu()
    torch.cuda.empty_cache()
    with pytest.raises(RuntimeError, match="a weight moved"):
        quantized(waves, mask)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_pipeline_replays_graphs():
    model = transformers.Wav2Vec2ForSequenceClassification(
        transformers.Wav2Vec2Config(num_hidden_layers=2)
    )
    model = model.eval().cuda().bfloat16()
    quantize(model)
    graphed = capture_graphs(model, seconds=(1,), batch=(1,))
    parts = {"feature_extractor": _extractor(), "device": "cuda:0", "dtype": torch.bfloat16}
    clip = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    eager, replayed = (
        transformers.pipeline("audio-classification", model=m, **parts)(clip)
        for m in (model, graphed)
    )
    assert eager == replayed


@pytest.mark.gpu
def test_buckets_share_one_memory_pool():
    model = _bf16_wav2vec2()
    waves, mask = _masked(4, 320_000)
    with torch.inference_mode():  # int8 copies and compiled kernels
        model(waves, attention_mask=mask)
    used = []
    for seconds in ((20,), (1, 2, 5, 10, 20)):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graphed = capture_graphs(model, seconds=seconds, batch=(4,))
        used.append(torch.cuda.memory_reserved() - before)
        del graphed
    # apart from the outputs that each bucket keeps
    assert used[1] < 1.5 * used[0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_graphs_of_another_device():
    model = _bf16_wav2vec2().to("cuda:1")
    graphed = capture_graphs(model, seconds=(1,), batch=(2,))
    waves, mask = (t.to("cuda:1") for t in _masked(2, 16_000))
    with torch.inference_mode(), torch.cuda.device(1):
        wanted = model(waves, attention_mask=mask).last_hidden_state
    assert torch.equal(graphed(waves, mask).last_hidden_state, wanted)
