"""Training: exact resumption, steps that are skipped, recipes, layers that are passed by."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.utils.data import Dataset

from lowbit_kernels import QuantConfig, QuantSpec, prepare_qat
from ssl_models.config import SpeechEncoderConfig
from ssl_models.encoder import SpeechEncoder
from ssl_models.objectives import CTC, Distillation, MaskedPrediction
from ssl_models.training import Recipe, train
from ssl_models.training.engine import clip_gradients, make_optimizer
from ssl_models.training.layers import changed_layers
from ssl_models.training.loop import TrainingStep

TINY = {
    "front_end": "fbank", "hidden_size": 32, "num_layers": 2, "num_heads": 2,
    "feed_forward_size": 32, "position_kernel": 4, "position_groups": 2, "depthwise_kernel": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Speech:
    """Noise of two utterances that say something."""

    waveforms: torch.Tensor
    lengths: torch.Tensor
    texts: tuple[str, ...]
    skipped: int = 0
    problems: tuple[str, ...] = ()

    def to(self, device):
        return replace(self, waveforms=self.waveforms.to(device), lengths=self.lengths.to(device))


class Noise(Dataset):
    """A batch a number; those of ``broken`` are not finite."""

    def __init__(self, broken=()):
        self.broken = broken

    def __getitem__(self, number):
        waveforms = 0.1 * torch.randn(2, 3000, generator=torch.Generator().manual_seed(number))
        if number in self.broken:
            waveforms[0, 5] = torch.nan
        return Speech(waveforms, torch.tensor([3000, 2600]), ("ab", "c"), 1, (f"file {number}",))


def build(kind="conformer", quantizer=None, **changes):
    torch.manual_seed(0)
    model = SpeechEncoder(SpeechEncoderConfig(kind=kind, **TINY | changes))
    objective = CTC(32, "abc")
    if quantizer is not None:
        spec = QuantSpec(4, inputs="int4", input_scale="static")
        prepare_qat(model, QuantConfig(spec, attention_matmuls="int8"), quantizer)
    return model, objective


class Killed(Exception):
    pass


def kill_at(last):
    def report(step, loss):
        if step == last:
            raise Killed

    return report


def weights(model, objective):
    return TrainingStep(model, objective).state_dict()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("quantizer", [None, "lsq"])
def test_a_killed_run_ends_bit_equal(quantizer, tmp_path):
    recipe = Recipe(steps=5, seed=3, warmup_steps=2, accumulate=2, layer_drop=0.3)
    straight = build(quantizer=quantizer)
    losses = train(*straight, Noise(), recipe, tmp_path / "straight").losses
    for last in (0, 1, 4):
        folder = tmp_path / f"killed{last}"
        with pytest.raises(Killed):
            train(
                *build(quantizer=quantizer), Noise(), recipe, folder,
                save_seconds=-1.0, report=kill_at(last),
            )  # fmt: skip
        torch.rand(5)
        resumed, steps = build(quantizer=quantizer), []
        summary = train(
            *resumed, Noise(), recipe, folder, resume=True,
            report=lambda step, loss, steps=steps: steps.append(step),
        )  # fmt: skip
        assert steps == list(range(last, 5))
        assert summary.losses == losses
        assert_same(weights(*resumed), weights(*straight))
    first = weights(*build(quantizer=quantizer))
    assert not torch.equal(
        first["objective.head.weight"], weights(*straight)["objective.head.weight"]
    )


def test_workers_give_the_same_run(tmp_path):
    recipe = Recipe(steps=2, warmup_steps=1)
    here, there = build(), build()
    train(*here, Noise(), recipe, tmp_path / "here")
    train(*there, Noise(), recipe, tmp_path / "there", workers=1)
    assert_same(weights(*there), weights(*here))


def test_a_state_of_another_recipe_is_refused(tmp_path):
    train(*build(), Noise(), Recipe(steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"recipe must be the one of .*state.pt.*'steps': 1"):
        train(*build(), Noise(), Recipe(steps=2), tmp_path, resume=True)


def test_a_kill_while_saving_keeps_the_old_state(monkeypatch, tmp_path):
    train(*build(), Noise(), Recipe(steps=1), tmp_path)
    before = (tmp_path / "state.pt").read_bytes()

    def half_save(state, path):
        path.write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(torch, "save", half_save)
    with pytest.raises(Killed):
        train(*build(), Noise(), Recipe(steps=1), tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_step_without_a_finite_loss_changes_nothing(tmp_path):
    model, objective = build()
    states = []

    def report(step, loss):
        states.append((loss, copy.deepcopy(weights(model, objective))))

    summary = train(model, objective, Noise(broken=(1,)), Recipe(steps=3), tmp_path, report=report)
    assert [loss == loss for loss, _ in states] == [True, False, True]
    (_, first), (_, second), (_, third) = states
    for name, value in second.items():  # counts of batches go on
        assert torch.equal(value, first[name]) or not value.is_floating_point(), name
    assert not torch.equal(third["objective.head.weight"], first["objective.head.weight"])
    assert all(value.isfinite().all() for value in third.values())
    assert (summary.skipped_steps, summary.skipped_clips) == (1, 3)
    assert summary.problems == ["file 0", "file 1", "file 2"]


def test_several_bad_steps_end_the_run(tmp_path):
    recipe = Recipe(steps=9, max_bad_steps=2)
    with pytest.raises(ValueError, match=r"must be finite, got nan .* 2 such steps .* step 4"):
        train(*build(), Noise(broken=(1, 3, 4)), recipe, tmp_path)


def test_scales_skip_a_first_batch_that_is_not_finite(tmp_path):
    model, objective = build(quantizer="lsq")
    train(model, objective, Noise(broken=(0,)), Recipe(steps=2), tmp_path)
    steps = [p for name, p in model.named_parameters() if name.endswith("input_step")]
    assert steps
    assert all(p.isfinite() and p > 0 for p in steps)


def test_scales_of_quantizers_have_no_weight_decay():
    module = TrainingStep(*build(quantizer="lsq"))
    names = {parameter: name for name, parameter in module.named_parameters()}
    optimizer = make_optimizer(module, Recipe())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(parameter)
            assert (group["weight_decay"] > 0) == (parameter.dim() > 1), name
            assert not name.endswith("_step") or group["weight_decay"] == 0
    assert not names


@pytest.mark.parametrize("kind", ["transformer", "conformer", "squeezeformer"])
def test_recomputed_activations_change_nothing(kind, tmp_path):
    recipe = Recipe(steps=2, layer_drop=0.3, warmup_steps=1)
    plain, recomputed = build(kind), build(kind)
    train(*plain, Noise(), recipe, tmp_path / "plain")
    train(*recomputed, Noise(), replace(recipe, checkpoint_activations=True), tmp_path / "again")
    assert_same(weights(*recomputed), weights(*plain))


def test_a_layer_that_is_passed_by_has_gradients_of_zero():
    model, _ = build("transformer")
    x = torch.randn(1, 4000)
    with changed_layers(model, Recipe(layer_drop=0.999999)):
        frames, _ = model.train()(x)
        frames.sum().backward()
        assert all(
            p.grad is not None and not p.grad.any() for p in model.encoder.layers.parameters()
        )
        assert not torch.equal(model.eval()(x)[0], frames)
    torch.manual_seed(0)
    assert not model.encoder.layers[0]._forward_hooks


def test_gradients_of_all_kinds_are_clipped_together(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(distribute_tensor(torch.zeros(2), mesh))
        plain = nn.Parameter(torch.zeros(1))
        sharded.grad = distribute_tensor(torch.tensor([0.0, 3.0]), mesh)
        plain.grad = torch.tensor([4.0])
        assert clip_gradients([sharded, plain], 1.0) == 5.0
        torch.testing.assert_close(sharded.grad.full_tensor(), torch.tensor([0.0, 0.6]))
        torch.testing.assert_close(plain.grad, torch.tensor([0.8]))
    finally:
        dist.destroy_process_group()


def test_bf16_trains(tmp_path):
    losses = train(*build(), Noise(), Recipe(steps=2, bf16=True), tmp_path).losses
    assert all(0 < loss < 50 for loss in losses)


def test_masked_prediction_survives_a_bad_batch(tmp_path):
    def targets(waveforms, lengths, T):
        return torch.zeros(len(waveforms), T, dtype=torch.int64)

    model, _ = build()
    objective = MaskedPrediction(32, 3, targets)
    summary = train(model, objective, Noise(broken=(1,)), Recipe(steps=3), tmp_path)
    assert summary.skipped_steps == 1
    assert [loss == loss for loss in summary.losses] == [True, False, True]


def test_distillation_does_not_save_its_teacher(tmp_path):
    model, _ = build()
    teacher = copy.deepcopy(model)
    train(model, Distillation(teacher), Noise(), Recipe(steps=1), tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(name.startswith("model.") for name in state["model"])


def test_any_module_trains(tmp_path):
    class Batches(Dataset):
        def __getitem__(self, number):
            return torch.ones(4, 2), torch.zeros(4, 1)

    model = nn.Linear(2, 1)
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    recipe = Recipe(steps=60, peak_rate=0.1, warmup_steps=1)
    losses = train(model, loss, Batches(), recipe, tmp_path).losses
    assert losses[-1] < losses[0] / 10


def test_the_rate_rises_stays_and_falls_to_zero():
    recipe = Recipe(steps=1000, warmup_steps=100, fall=0.4)
    rates = [recipe.rate(step) for step in range(1000)]
    assert rates[0] == recipe.peak_rate / 100
    assert rates[99:601] == [recipe.peak_rate] * 502
    assert rates[999] == pytest.approx(recipe.peak_rate / 400)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 0", "steps must be at least 1, got 0"),
        ("steps: many", "steps must be of type int, got 'many'"),
        ("bits: 4", "bits must be one of"),
        ("fall: 2", r"fall must be in \(0, 1\], got 2.0"),
        ("bf16: 1", "bf16 must be of type bool, got 1"),
        ("[1]", "must be a mapping"),
        ("{", "must be YAML"),
    ],
)
def test_wrong_recipes_are_named(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.read(tmp_path / "recipe.yaml")


def test_a_recipe_is_read_from_yaml(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 7\npeak_rate: 1e-3\nweight_decay: 1\n")
    found = Recipe.read(tmp_path / "recipe.yaml", seed=4)
    assert found == Recipe(steps=7, peak_rate=1e-3, weight_decay=1.0, seed=4)


def test_an_unknown_engine_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"engine must be one of .*got 'horovod'"):
        train(*build(), Noise(), Recipe(steps=1), tmp_path, engine="horovod")
