"""Checkpoints: bit-equal reloads, atomic saves, and every way a file can be wrong."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from lowbit_kernels import (
    CheckpointError,
    QuantConfig,
    QuantSpec,
    inspect_checkpoint,
    load_quantized,
    quantize,
    save_quantized,
)
from lowbit_kernels.formats import FORMAT_VERSION


def build(width=24):
    model = nn.Sequential(
        nn.Conv1d(4, width, 3),
        nn.GELU(),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(width, width, 4, groups=4)),
        nn.Conv1d(width, width, 3, groups=width),
        nn.BatchNorm1d(width),
        nn.Flatten(),
        nn.Linear(width * 8, 7),
    )
    return model.eval()


@pytest.fixture
def model():
    return build()


@pytest.fixture
def saved(model, tmp_path):
    quantize(model)
    save_quantized(model, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def weights_of(directory):
    (path,) = directory.glob("weights-*.safetensors")
    return path


@pytest.mark.parametrize(
    "config",
    [QuantConfig.small(), QuantConfig.fast(), QuantConfig(QuantSpec(bits=1)), QuantConfig.small(8)],
    ids=lambda c: str(c.default),
)
def test_reload_is_bit_equal(config, model, tmp_path):
    quantize(model, config)
    x = torch.randn(2, 4, 15)
    wanted = model(x)
    save_quantized(model, tmp_path)
    reloaded = load_quantized(tmp_path, build())
    assert torch.equal(reloaded(x), wanted)
    assert repr(reloaded) == repr(model)


def test_static_scales_are_saved(model, tmp_path):
    quantize(model, QuantConfig.fast(), calibration=[torch.randn(1, 4, 15) for _ in range(3)])
    save_quantized(model, tmp_path)
    reloaded = load_quantized(tmp_path, build())
    assert reloaded[0].input_scale == model[0].input_scale
    assert reloaded[0].spec.input_scale == "static"


def test_tied_tensors_stay_tied(tmp_path):
    def tied():
        net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False))
        net[2].weight = net[0].weight
        return net

    model = tied()
    quantize(model)
    save_quantized(model, tmp_path)
    reloaded = load_quantized(tmp_path, tied())
    assert reloaded[2].weight is reloaded[0].weight
    assert torch.equal(reloaded[2].weight, model[0].weight)


def test_saving_again_replaces_and_leaves_no_litter(saved, model):
    quantize(model)
    model[0].bias.data.add_(1)
    save_quantized(model, saved)
    assert sorted(p.name for p in saved.iterdir()) == ["lowbit.json", weights_of(saved).name]
    assert torch.equal(load_quantized(saved, build())[0].bias, model[0].bias)


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="model must hold quantized layers, got a Sequential"):
        save_quantized(build(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_inspect(saved):
    info = inspect_checkpoint(saved)
    assert info.model == "Sequential"
    assert info.format_version == FORMAT_VERSION
    assert info.layers["0"] == {"kind": "QConv1d", "spec": QuantSpec(bits=4).to_dict()}
    assert info.nbytes == weights_of(saved).stat().st_size
    assert json.loads(json.dumps(info.to_dict()))["tensors"] == info.tensors


def truncate_weights(directory):
    path = weights_of(directory)
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(directory):
    path = weights_of(directory)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def remove_weights(directory):
    weights_of(directory).unlink()


def truncate_manifest(directory):
    path = directory / "lowbit.json"
    path.write_text(path.read_text()[:200])


def change_manifest(directory):
    path = directory / "lowbit.json"
    path.write_text(path.read_text().replace('"bits": 4', '"bits": 2'))


def newer_version(directory):
    path = directory / "lowbit.json"
    manifest = json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}
    path.write_text(json.dumps(manifest))


def another_format(directory):
    (directory / "lowbit.json").write_text("[1, 2]")


def replace_by_pickle(directory):
    (directory / "lowbit.json").write_bytes(pickle.dumps({"weights": [1, 2, 3]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, r"weights-.*\.safetensors: truncated or changed"),
        (flip_a_bit, r"weights-.*\.safetensors: truncated or changed"),
        (remove_weights, r"weights-.*\.safetensors: not found"),
        (truncate_manifest, r"lowbit\.json: truncated or not JSON"),
        (change_manifest, r"lowbit\.json: its SHA-256 does not match"),
        (newer_version, r"lowbit\.json: format version 2, this release reads up to 1"),
        (another_format, r"lowbit\.json: not a manifest"),
        (replace_by_pickle, r"lowbit\.json: truncated or not JSON"),
    ],
)
@pytest.mark.parametrize("read", ["load", "inspect"])
def test_a_damaged_checkpoint_is_named(damage, message, read, saved):
    damage(saved)
    model = build()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(CheckpointError, match=message):
        load_quantized(saved, model) if read == "load" else inspect_checkpoint(saved)
    assert kinds == [type(m) for m in model.modules()]


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"lowbit\.json: not found"):
        load_quantized(tmp_path, build())
    (tmp_path / "model.bin").write_bytes(pickle.dumps([1]))
    with pytest.raises(CheckpointError, match="a file, not a checkpoint directory"):
        load_quantized(tmp_path / "model.bin", build())


@pytest.mark.parametrize(
    "other", [build(width=28), nn.Sequential(nn.Linear(4, 4))], ids=["other-width", "other-kind"]
)
def test_another_model_is_refused_unchanged(other, saved):
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="another model"):
        load_quantized(saved, other)
    after = other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_custom_model_must_be_given(saved):
    with pytest.raises(ValueError, match="model must be given to load a Sequential"):
        load_quantized(saved)


@pytest.mark.parametrize("moment", ["weights", "manifest"])
def test_a_full_disk_leaves_the_old_checkpoint(saved, model, moment, monkeypatch):
    wanted = load_quantized(saved, build()).state_dict()
    model[0].bias.data.add_(1)
    target = "lowbit_kernels.checkpoint." + ("save_file" if moment == "weights" else "_sync")
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if moment == "weights" or len(calls) == 2:  # the second sync is the manifest's
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(target, full)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(model, saved)
    monkeypatch.undo()
    got = load_quantized(saved, build()).state_dict()
    assert all(torch.equal(wanted[k], got[k]) for k in wanted)
    assert not [p for p in saved.iterdir() if p.name.startswith(".")]


def test_a_kill_while_saving_leaves_a_whole_checkpoint(saved):
    """Kill the writer at its most delicate moment: new weights written, manifest not yet."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path[:0] = sys.argv[2:]
        import lowbit_kernels.checkpoint as checkpoint
        from torch import nn
        model = nn.Sequential(nn.Linear(8, 8))
        checkpoint_commit = checkpoint._commit
        checkpoint._commit = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        from lowbit_kernels import quantize
        quantize(model)
        checkpoint.save_quantized(model, sys.argv[1])
        """
    )
    wanted = inspect_checkpoint(saved)
    done = subprocess.run([sys.executable, "-c", script, os.fspath(saved), *sys.path])
    assert done.returncode == -signal.SIGKILL
    assert inspect_checkpoint(saved) == wanted
