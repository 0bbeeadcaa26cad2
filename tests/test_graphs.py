"""capture_graphs: buckets, padding, cutting and refusals, with a stand-in for a graph.

Whole models, and real graphs where there is a GPU: test_huggingface_graphs.py.
"""

import copy

import pytest
import torch
from torch import nn

from lowbit_kernels import capture_graphs
from lowbit_kernels.conversion.graphs import MIN_SAMPLES, _capture_all
from tests.graph_stand_in import capture_on_cpu, recapture

LABELS = 40


class Frames(nn.Module):
    """Frame energies of the valid samples: depends on the mask, keeps the batch apart."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(0.5))
        self.head = nn.Identity()

    def _get_feat_extract_output_lengths(self, samples):
        return samples // 100

    def forward(self, waves, attention_mask=None):
        waves = waves * attention_mask
        frames = waves.unfold(1, 100, 100).square() * self.scale + self.shift
        energy = frames.sum(-1)
        scores = energy[:, :, None] * energy[:, None]
        return {
            "frames": frames,
            "attentions": (torch.stack([scores, scores], 1),),
            "logits": waves.sum(1, keepdim=True).expand(-1, LABELS) + 0,
            "count": attention_mask.sum(1),
        }


@pytest.fixture
def graphed():
    return capture_on_cpu(Frames().eval(), (800, 1600), (1, 3))


@pytest.mark.parametrize(("B", "T"), [(1, 800), (1, 500), (2, 1234), (3, 1600)])
def test_a_bucket_gives_what_the_model_gives(graphed, B, T):
    waves = torch.randn(B, T)
    mask = (torch.arange(T) < torch.randint(MIN_SAMPLES, T, (B, 1))).long()
    with torch.no_grad():
        wanted = graphed.model(waves, attention_mask=mask)
        got = graphed(waves, mask)
        first = copy.deepcopy(got)
        graphed(torch.randn(B, T))  # a later call must not change an earlier output
    assert torch.equal(got["frames"], first["frames"])
    for name in ("frames", "logits", "count"):
        assert torch.equal(got[name], wanted[name])
    assert torch.equal(got["attentions"][0], wanted["attentions"][0])


def test_buckets_share_their_inputs(graphed):
    waves, masks = zip(*(bucket[:2] for bucket in graphed._captured.values()), strict=True)
    assert len({t.data_ptr() for t in waves}) == len({t.data_ptr() for t in masks}) == 1
    assert sorted(graphed._captured) == [(1, 800), (1, 1600), (3, 800), (3, 1600)]


def test_filler_rows_give_frames(graphed):
    graphed(torch.randn(2, 800))
    mask = graphed._captured[3, 800][1]
    assert mask.sum(1).tolist() == [800, 800, MIN_SAMPLES]


def test_an_input_without_a_bucket_is_named(graphed):
    with pytest.raises(ValueError, match=r"fit a captured bucket .*got \(1, 1601\)"):
        graphed(torch.randn(1, 1601))
    with pytest.raises(ValueError, match=r"got \(4, 500\)"):
        graphed(torch.randn(4, 500))
    with pytest.raises(ValueError, match=r"must have 400 samples or more.*got \(1, 399\)"):
        graphed(torch.randn(1, 399))


def test_only_cuda_models_are_captured():
    model = Frames().eval()
    with pytest.raises(RuntimeError, match="needs a model on a CUDA device, got one on 'cpu'"):
        capture_graphs(model)


@pytest.mark.parametrize("sizes", [{(1, 16)}, {(0, 800)}, set()])
def test_wrong_buckets_are_named(sizes):
    with pytest.raises(ValueError, match="at least 1 utterance of 400 samples, got"):
        _capture_all(Frames().eval(), sizes, recapture)


def test_training_mode_is_refused(graphed):
    model = Frames().eval()
    model.head.train()
    with pytest.raises(ValueError, match="must be in eval mode for graph capture, got training"):
        capture_on_cpu(model, (800,), (1,))
    for trained in (graphed, graphed.model):
        trained.train()
        with pytest.raises(RuntimeError, match="must stay in eval mode, got training mode"):
            graphed(torch.randn(1, 800))
        graphed.eval()
        graphed(torch.randn(1, 800))


def _replace_data(model):
    model.scale.data = model.scale.data.clone()


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to(torch.float64),
        _replace_data,
        lambda model: setattr(model, "shift", model.shift.clone()),
        lambda model: setattr(model, "scale", nn.Parameter(torch.ones(()))),
        lambda model: setattr(model, "head", nn.Linear(2, 2)),
    ],
    ids=["to", "data", "buffer", "parameter", "layer"],
)
def test_moved_weights_are_refused(graphed, move):
    graphed.eval().to("cpu")  # moves nothing
    graphed(torch.randn(1, 800))
    move(graphed.model)
    with pytest.raises(
        RuntimeError, match="a weight moved, or a layer is another one: capture the model again"
    ):
        graphed(torch.randn(1, 800))


def test_weights_may_be_updated_in_place():
    """Also what was made of them before the capture, which a graph reads too."""
    model, captures = Frames().eval(), []

    def capture(call, pool):
        captures.append(tuple(call.args[0].shape))
        made = model.scale.clone()  # as an int8 copy is

        def call_with_copy():
            live, model.scale.data = model.scale.data, made
            try:
                return call()
            finally:
                model.scale.data = live

        return recapture(call_with_copy, pool)

    graphed = capture_on_cpu(model, (800, 1600), (1,), capture)
    waves = torch.randn(1, 700)
    first = graphed(waves)["frames"]
    with torch.no_grad():
        model.scale.mul_(3)
        wanted = model(waves, torch.ones(1, 700))["frames"]
    assert not torch.equal(first, wanted)
    for _ in range(2):
        assert torch.equal(graphed(waves)["frames"], wanted)
    assert captures == [(1, 1600), (1, 800), (1, 800)]
    model.load_state_dict(model.state_dict())
    assert torch.equal(graphed(waves)["frames"], wanted)


def test_outputs_and_inputs_have_no_gradient():
    model = Frames().eval()
    with torch.inference_mode():
        graphed = capture_on_cpu(model, (800,), (1,))
    out = graphed(torch.randn(1, 700, requires_grad=True))["frames"]
    assert not out.requires_grad
    assert not out.is_inference()


def test_what_takes_no_waveforms_is_refused():
    with pytest.raises(ValueError, match="takes waveforms, got Linear"):
        capture_on_cpu(nn.Linear(2, 2).eval(), (800,), (1,))


@pytest.mark.gpu
def test_a_replay_on_a_gpu_is_what_the_model_gives():
    model = Frames().eval().cuda()
    graphed = capture_graphs(model, seconds=(0.05, 0.1), batch=(1, 3))
    for B, T in ((1, 800), (1, 500), (2, 1234), (3, 1600)):
        waves, mask = torch.randn(B, T, device="cuda"), torch.ones(B, T, device="cuda").long()
        mask[0, T - 100 :] = 0
        for _ in range(2):
            with torch.no_grad():
                wanted = model(waves, mask)
            got = graphed(waves, mask)
            assert torch.equal(got["frames"], wanted["frames"])
            assert torch.equal(got["count"], wanted["count"])
            with torch.no_grad():
                model.scale.mul_(1.5)
    model.cpu()
    with pytest.raises(RuntimeError, match="a weight moved"):
        graphed(waves, mask)
