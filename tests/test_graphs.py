"""capture_graphs: buckets, padding and cutting on the CPU; real graphs where there is a GPU."""

import pytest
import torch
from torch import nn

from lowbit_kernels import capture_graphs, quantize
from lowbit_kernels.conversion.graphs import MIN_SAMPLES, _capture_all


class Frames(nn.Module):
    """Frame energies of the valid samples: depends on the mask, keeps the batch apart."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def _get_feat_extract_output_lengths(self, samples):
        return samples // 100

    def forward(self, waves, attention_mask=None):
        frames = (waves * attention_mask).unfold(1, 100, 100).square().sum(-1) * self.scale
        return {"frames": frames, "count": attention_mask.sum(1)}


def recapture(call, pool):
    """What a CUDA graph does, in eager: run again and write into the same output tensors."""
    output = call()

    def replay():
        for name, value in call().items():
            output[name].copy_(value)

    return replay, output, pool


@pytest.fixture
def graphed():
    model = Frames().eval()
    with torch.no_grad():
        return _capture_all(model, (0.05, 0.1), (1, 3), 16_000, torch.device("cpu"), recapture)


@pytest.mark.parametrize(("B", "T"), [(1, 800), (1, 500), (2, 1234), (3, 1600)])
def test_a_bucket_gives_what_the_model_gives(graphed, B, T):
    waves = torch.randn(B, T)
    mask = (torch.arange(T) < torch.randint(MIN_SAMPLES, T, (B, 1))).long()
    with torch.no_grad():
        wanted = graphed.model(waves, attention_mask=mask)
        got = graphed(waves, mask)
        first = got["frames"].clone()
        graphed(torch.randn(B, T))  # a later call must not change an earlier output
    assert torch.equal(got["frames"], wanted["frames"])
    assert torch.equal(got["frames"], first)
    assert torch.equal(got["count"], wanted["count"])


def test_an_input_without_a_bucket_is_named(graphed):
    with pytest.raises(ValueError, match=r"must fit a captured bucket .*got \(1, 1601\)"):
        graphed(torch.randn(1, 1601))
    with pytest.raises(ValueError, match=r"got \(4, 100\)"):
        graphed(torch.randn(4, 100))


def test_only_cuda_models_are_captured():
    model = Frames().eval()
    with pytest.raises(RuntimeError, match="needs a model on a CUDA device, got one on 'cpu'"):
        capture_graphs(model)


@pytest.mark.parametrize(
    ("training", "seconds", "message"),
    [(True, (1,), "got training mode"), (False, (0.001,), r"at least 1 utterance of 400 samples")],
)
def test_wrong_arguments_are_named(training, seconds, message):
    model = Frames().train(training)
    with pytest.raises(ValueError, match=message):
        _capture_all(model, seconds, (1,), 16_000, torch.device("cpu"), recapture)


@pytest.mark.gpu
def test_a_replay_equals_eager_on_a_quantized_wav2vec2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(num_hidden_layers=2)
    model = transformers.Wav2Vec2Model(config).eval().cuda().bfloat16()
    quantize(model)
    graphed = capture_graphs(model, seconds=(1, 2), batch=(2,))
    for T in (16_000, 9_000, 30_000):
        waves = torch.randn(2, T, device="cuda", dtype=torch.bfloat16)
        mask = torch.ones(2, T, device="cuda", dtype=torch.long)
        mask[1, T // 2 :] = 0
        bucket = 16_000 if T <= 16_000 else 32_000
        padded = nn.functional.pad(waves, (0, bucket - T))
        with torch.inference_mode():
            wanted = model(padded, attention_mask=nn.functional.pad(mask, (0, bucket - T)))
            got = graphed(waves, mask)
        frames = got.last_hidden_state.shape[1]
        assert torch.equal(got.last_hidden_state, wanted.last_hidden_state[:, :frames])
