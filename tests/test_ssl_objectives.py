"""Objectives: CTC, masked prediction of clusters, distillation from a float model."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from lowbit_kernels import QuantConfig, QuantSpec, prepare_qat
from ssl_models.encoder import SpeechEncoder
from ssl_models.error_propagation.sources import find_blocks
from ssl_models.error_propagation.trace import watching
from ssl_models.objectives import CTC, Distillation, MaskedPrediction
from ssl_models.objectives.ctc import word_error_rate
from ssl_models.objectives.distill import attention_maps
from ssl_models.objectives.hubert import span_mask
from ssl_models.objectives.kmeans import fit_kmeans, layer_features, mfcc
from tests.ssl_cases import KINDS, LENGTHS, SAMPLES, build, small_config


@dataclass
class Speech:
    waveforms: torch.Tensor
    lengths: torch.Tensor | None
    texts: tuple[str, ...] = ("ab", "c")


def speech(samples=SAMPLES, lengths=LENGTHS, device="cpu"):
    waveforms = 0.1 * torch.randn(len(lengths), samples)
    return Speech(waveforms.to(device), torch.tensor(lengths, device=device))


def with_other_padding(batch):
    waveforms = batch.waveforms.clone()
    for row, length in zip(waveforms, batch.lengths.tolist(), strict=True):
        row[length:] = 7.0
    return Speech(waveforms, batch.lengths, batch.texts)


class Fixed(torch.nn.Module):
    """An encoder that gives the same frames, whatever it hears."""

    def __init__(self, frames, counts):
        super().__init__()
        self.frames, self.counts = frames, counts

    def forward(self, waveforms, lengths):
        return self.frames, self.counts


def test_ctc_is_that_of_each_utterance_alone():
    frames, objective = torch.randn(2, 9, 4), CTC(4, "abc")
    found = objective(Fixed(frames, torch.tensor([9, 5])), speech())
    alone = []
    for row, count, labels in zip(frames, (9, 5), ([1, 2], [3]), strict=True):
        log_probs = objective.head(row[:count]).log_softmax(-1)
        loss = F.ctc_loss(log_probs, torch.tensor(labels), (count,), (len(labels),))
        alone.append(loss)
    torch.testing.assert_close(found, torch.stack(alone).mean())


def test_reading_merges_repeats_and_stops_at_the_end():
    objective = CTC(4, "abc")
    objective.head = torch.nn.Identity()
    numbers = torch.tensor([[1, 1, 0, 1, 2, 2, 0, 3, 3], [0, 3, 3, 0, 0, 1, 1, 1, 1]])
    frames = F.one_hot(numbers, 4).float()
    assert objective.read(Fixed(frames, torch.tensor([9, 5])), speech()) == ["aabc", "c"]
    assert objective.read(Fixed(frames, None), speech()) == ["aabc", "ca"]


def test_wrong_texts_are_named():
    with pytest.raises(ValueError, match=r"text must be in the letters 'abc', got 'x'"):
        CTC(4, "abc").encode("Axb")
    with pytest.raises(ValueError, match="letters must differ, at least one, got 'aba'"):
        CTC(4, "aba")
    assert CTC(4, "abc").encode("CAB") == [3, 1, 2]


def test_word_error_rates():
    assert word_error_rate(["one two", "three"], ["one", "four three"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="references must have words"):
        word_error_rate([""], [""])
    with pytest.raises(ValueError, match="got 1 and 2 texts"):
        word_error_rate(["a"], ["a", "b"])


@pytest.mark.parametrize("counts", [[50, 31, 7, 1, 0]])
def test_spans_hide_valid_frames_alone(counts):
    masks = torch.stack([span_mask(counts, 50, 0.8, 10) for _ in range(200)])
    for row, count in zip(masks.unbind(1), counts, strict=True):
        assert not row[:, count:].any()
    share = masks[:, 0].float().mean()
    # 4 spans of 10 in 50, which overlap: about 1 - exp(-0.8)
    assert 0.45 < share < 0.7
    assert masks[:, 2].any(1).all()
    runs = masks[0, 0].int().diff(prepend=torch.zeros(1)).eq(1).nonzero().flatten()
    for start in runs.tolist():
        assert masks[0, 0, start : start + 10].all()


def test_mfccs_tell_tones_apart_and_ignore_padding():
    times = torch.arange(8000) / 16_000
    tones = torch.stack([torch.sin(2 * torch.pi * hertz * times) for hertz in (300, 300, 2500)])
    x, frames = mfcc(tones, torch.tensor([8000, 4000, 8000]))
    assert x.shape == (3, 48, 39)
    assert frames.tolist() == [48, 23, 48]
    torch.testing.assert_close(x[0, :20, :13], x[1, :20, :13])
    assert (x[0, 5, :13] - x[2, 5, :13]).norm() > 5 * (x[0, 5, :13] - x[0, 9, :13]).norm()


@pytest.fixture(scope="module")
def clusters():
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    return fit_kmeans(mfcc, [speech(8000, (8000, 5000))], 4)


def test_targets_are_the_nearest_centers_at_the_encoders_times(clusters):
    waveforms = 0.1 * torch.randn(2, 8000)
    x, _ = mfcc(waveforms)
    nearest = torch.cdist(x, clusters.centers).argmin(-1)
    assert torch.equal(clusters(waveforms, None, 24), nearest[:, ::2])
    assert torch.equal(clusters(waveforms, None, 25)[:, -1], nearest[:, -1])
    assert torch.equal(clusters(waveforms, None, 48), nearest)


def test_layers_give_features_to_cluster():
    pytest.importorskip("sklearn")
    encoder = build("conformer")
    features = layer_features(encoder, "encoder.layers.1")
    batch = speech()
    x, frames = features(batch.waveforms, batch.lengths)
    assert x.shape[-1] == 32
    assert frames.tolist() == encoder(batch.waveforms, batch.lengths)[1].tolist()
    targets = fit_kmeans(features, [batch], 3)
    assert set(targets(batch.waveforms, batch.lengths, x.shape[1]).flatten().tolist()) <= {0, 1, 2}
    with pytest.raises(ValueError, match=r"clusters must be at most the \d+ frames, got 900"):
        fit_kmeans(features, [batch], 900)
    with pytest.raises(AttributeError):
        layer_features(encoder, "encoder.layers.9")


def masked(targets, **options):
    torch.manual_seed(1)
    return MaskedPrediction(32, 4, targets, **{"projected_size": 8, "mask_frames": 4} | options)


def parity(waveforms, lengths, T):
    return (torch.arange(T) % 4).expand(len(waveforms), T)


def test_masked_prediction_is_the_cross_entropy_of_cosines_over_masked_frames():
    encoder, batch = build("conformer").train(), speech()
    objective, seen = masked(parity, penalty_weight=0.0, unmasked_weight=0.5), {}
    encoder.encoder.register_forward_pre_hook(lambda _, args: seen.update(before=args[0]))
    encoder.encoder.register_forward_hook(lambda _, args, x: seen.update(encoder=x))
    loss = objective(encoder, batch)
    hidden = (seen["before"] == objective.mask_embedding).all(-1)
    frames = encoder.feature_extractor.frames(batch.lengths)
    valid = torch.arange(hidden.shape[1]) < frames[:, None]
    assert not (hidden & ~valid).any()
    assert hidden.any(1).all()
    x = objective.projection(seen["encoder"])[:, :, None]
    logits = F.cosine_similarity(x, objective.labels, dim=-1) / 0.1
    targets = parity(batch.waveforms, None, hidden.shape[1])
    wanted = [F.cross_entropy(logits[at], targets[at]) for at in (hidden, valid & ~hidden)]
    torch.testing.assert_close(loss, wanted[0] + 0.5 * wanted[1])
    right = (logits.argmax(-1) == targets)[hidden]
    assert objective.accuracy == pytest.approx(right.float().mean().item())


def test_weights_add_unmasked_frames_and_the_penalty():
    encoder, batch = build("post-norm").train(), speech()
    losses = []
    for options in ({"penalty_weight": 0.0}, {"penalty_weight": 2.0}, {"unmasked_weight": 1.0}):
        torch.manual_seed(5)
        objective = masked(parity, **{"penalty_weight": 0.0} | options)
        torch.manual_seed(6)
        losses.append(objective(encoder, batch))
    x, frames = encoder.feature_extractor(batch.waveforms, batch.lengths)
    valid = torch.arange(x.shape[1]) < frames[:, None]
    torch.testing.assert_close(losses[1] - losses[0], 2 * x[valid].square().mean())
    assert losses[2] > losses[0]


@pytest.mark.parametrize("kind", ["post-norm", "squeezeformer"])
def test_masked_prediction_ignores_padding(kind):
    encoder, batch = build(kind).train(), speech()
    losses = []
    for each in (batch, with_other_padding(batch)):
        torch.manual_seed(5)
        losses.append(masked(parity, unmasked_weight=1.0)(encoder, each).detach())
    assert torch.equal(*losses)


def test_the_gradient_into_the_front_end_is_softened():
    encoder, batch = build("post-norm"), speech()
    gradients = []
    for factor in (1.0, 0.1):
        torch.manual_seed(5)
        encoder.zero_grad()
        masked(parity, penalty_weight=0.0, feature_gradient=factor)(encoder, batch).backward()
        gradients.append(encoder.feature_extractor.conv_layers[0].conv.weight.grad.clone())
    torch.testing.assert_close(gradients[1], 0.1 * gradients[0])


def test_nothing_but_parameters_and_centers_is_saved(clusters):
    names = set(masked(clusters).state_dict())
    assert names == {
        "mask_embedding", "labels", "projection.weight", "projection.bias", "targets.centers"
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_like_its_teacher_has_no_loss(kind):
    teacher = build(kind)
    student, batch = copy.deepcopy(teacher), speech()
    assert Distillation(teacher)(student, batch) == 0
    assert not any("attend" in vars(module) for module in student.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_maps_give_what_attention_gives(kind, monkeypatch):
    """maps @ v is the module's own attention: windows, blocks, positions and lengths."""
    encoder, batch = build(kind).double(), speech()
    batch.waveforms = batch.waveforms.double()
    module = next(m for m in encoder.modules() if hasattr(m, "attend"))
    own, seen = module.attend, []

    def attend(q, k, v, **options):
        out = own(q, k, v, **options)
        seen.append((out, attention_maps(module, q, k, **options) @ v))
        return out

    monkeypatch.setattr(module, "attend", attend)
    _, frames = encoder(batch.waveforms, batch.lengths)
    ((wanted, found),) = seen
    for row, (a, b) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(a[:, : frames[row]], b[:, : frames[row]])


@pytest.mark.parametrize("kind", ["conformer", "squeezeformer", "block"])
def test_distillation_is_the_error_over_valid_frames(kind):
    teacher, batch = build(kind), speech()
    student = copy.deepcopy(teacher)
    prepare_qat(student, QuantConfig.small(2))
    blocks = find_blocks(teacher)
    outputs = {}
    for name, model in (("teacher", teacher), ("student", student)):
        seen = outputs[name] = []
        with watching(model, blocks, lambda _, x, seen=seen: seen.append(x)):
            end, frames = model(batch.waveforms, batch.lengths)
        seen.append(end)
    errors = []
    for a, b in zip(*outputs.values(), strict=True):
        ratio = round(end.shape[1] / a.shape[1])
        counts = -(-frames // ratio)
        rows = [(x[:n] - y[:n]).flatten() for x, y, n in zip(a, b, counts, strict=True)]
        errors.append(torch.cat(rows).square().mean())
    found = Distillation(teacher, attention_weight=0.0)(student, batch)
    torch.testing.assert_close(found, torch.stack(errors).sum())
    only_output = Distillation(teacher, layer_weight=0.0, attention_weight=0.0)(student, batch)
    torch.testing.assert_close(only_output, errors[-1])
    maps = Distillation(teacher, output_weight=0.0, layer_weight=0.0)(student, batch)
    assert 0 < maps < 1
    assert torch.equal(
        Distillation(teacher)(student, with_other_padding(batch)),
        Distillation(teacher)(student, batch),
    )


def test_maps_of_a_student_with_low_bit_products_have_gradients():
    teacher, batch = build("post-norm"), speech()
    student = copy.deepcopy(teacher)
    prepare_qat(student, QuantConfig(QuantSpec(4), attention_matmuls="int4"))
    objective = Distillation(teacher, output_weight=0.0, layer_weight=0.0)
    objective(student, batch).backward()
    assert student.encoder.layers[0].attention.q_proj.weight.grad.any()
    assert not any(p.requires_grad for p in teacher.parameters())


def test_relative_errors_do_not_depend_on_scale():
    teacher = Fixed(torch.randn(2, 5, 3), torch.tensor([5, 2]))
    loss = Distillation.__new__(Distillation)
    loss.relative = True
    a, b = torch.randn(2, 2, 5, 3)
    one, other = (loss._error(s * a, s * b, teacher.counts, 5) for s in (1.0, 100.0))
    torch.testing.assert_close(one, other)


def test_wrong_distillations_are_named():
    teacher, batch = build("post-norm"), speech()
    with pytest.raises(ValueError, match=r"weights must be at least 0, one above, got \(0, 0, 0\)"):
        Distillation(teacher, output_weight=0, layer_weight=0, attention_weight=0)
    with pytest.raises(ValueError, match=r"attention_weight must be 0 .* got a Linear"):
        Distillation(torch.nn.Linear(2, 2), layer_weight=0)
    wide = SpeechEncoder(small_config("post-norm", hidden_size=64))
    with pytest.raises(ValueError, match="model must have the teacher's shape, got"):
        Distillation(teacher, attention_weight=0.0)(wide, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_objectives_run_on_a_gpu(kind, device):
    encoder, batch = build(kind).to(device), speech(device=device)
    teacher = copy.deepcopy(encoder)
    low = [Distillation(teacher.cpu())(encoder, batch), CTC(32, "abc").to(device)(encoder, batch)]
    assert all(loss.isfinite() for loss in low)
