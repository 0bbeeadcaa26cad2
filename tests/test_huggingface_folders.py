"""Folders of ``save_pretrained``: their checksum, and every way their files can be wrong."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

import lowbit_kernels.integrations.huggingface as huggingface  # noqa: E402
from lowbit_kernels import (  # noqa: E402
    CheckpointError,
    QuantConfig,
    QuantSpec,
    inspect_checkpoint,
    load_quantized,
    quantize,
)
from lowbit_kernels.integrations.checksum import KEY, checksum  # noqa: E402
from tests.families.models import FAMILIES, Family  # noqa: E402

BY_NAME = {family.name: family for family in FAMILIES}
WEIGHTS = "model.safetensors"
LAYER = "wav2vec2.encoder.layers.0.attention.k_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    model = BY_NAME["wav2vec2-group"].build()
    quantize(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "low")


def plain(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCTC.from_pretrained(folder, **options)


def hash_of(file: Path) -> str | None:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata().get(KEY)


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any], keep_hash: bool = False) -> None:
    """Change the tensors of a file, with the checksum of before, or without any."""
    state, stored = load_file(file), hash_of(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"} | ({KEY: stored} if keep_hash else {}))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# the checksum


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_family_loads_exactly_and_keeps_its_checksum(
    family: Family, symmetric: bool, tmp_path: Path
) -> None:
    model = family.build()
    quantize(model, QuantConfig(QuantSpec(symmetric=symmetric)))
    model.save_pretrained(tmp_path / "one")
    loaded = load_quantized(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    assert {hash_of(shard) for shard in shards} == {hash_of(tmp_path / "one" / WEIGHTS)} != {None}
    again = load_quantized(tmp_path / "shards").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in loaded.state_dict().items())
    info = inspect_checkpoint(tmp_path / "shards")
    assert info.tensors == inspect_checkpoint(tmp_path / "one").tensors
    assert info.nbytes == sum(shard.stat().st_size for shard in shards)


def test_checksum_sees_content_and_no_order() -> None:
    a, b = torch.arange(6.0), torch.zeros(2, 3, dtype=torch.int8)
    wanted = checksum([a, b])
    assert checksum([b, a, a]) == wanted
    assert checksum([a.repeat_interleave(2)[::2], b]) == wanted
    changed = a.clone()
    changed[3] = 3.0000002
    others = ([a], [changed, b], [a, b.T], [a, b.view(torch.uint8)], [a.view(torch.int32), b])
    assert all(checksum(other) != wanted for other in others)
    checksum([torch.empty(0), torch.tensor(1.0), torch.ones(2, dtype=torch.bfloat16)])


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("read", [plain, load_quantized, inspect_checkpoint])
def test_a_flipped_bit_is_refused(
    read: Callable[[Path], Any], shards: bool, place: str, saved: Path, tmp_path: Path
) -> None:
    if shards:
        plain(saved).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        saved = tmp_path / "shards"
    file = sorted(saved.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header if place == "first" else -1] ^= 1
    file.write_bytes(content)
    refused = ValueError if read is plain else CheckpointError
    with pytest.raises(refused, match=rf"^{saved}/.*{file.name}.*: changed, the SHA-256"):
        read(saved)


def test_a_shard_of_another_save_is_refused(saved: Path, tmp_path: Path) -> None:
    model = plain(saved)
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    with torch.no_grad():
        model.lm_head.bias.add_(1)
    model.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    for file in sorted((tmp_path / "one").glob("*.safetensors")):
        shutil.copy(file, tmp_path / "mixed.safetensors")
        shutil.copy(tmp_path / "two" / file.name, file)
        with pytest.raises(ValueError, match="changed, the SHA-256"):
            plain(tmp_path / "one")
        shutil.copy(tmp_path / "mixed.safetensors", file)
    plain(tmp_path / "one")


def test_a_folder_without_a_checksum_loads_with_one_warning(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(saved / WEIGHTS, lambda state: None)
    with caplog.at_level(logging.WARNING, logger="lowbit_kernels"):
        load_quantized(saved)
    said = [record.message for record in caplog.records if record.name == "lowbit_kernels"]
    assert len(said) == 1
    assert said[0].startswith(f"{saved / WEIGHTS}: holds no checksum")


def test_the_checksum_follows_the_weights(saved: Path, tmp_path: Path) -> None:
    model = plain(saved, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    with torch.no_grad(), pytest.warns(UserWarning, match="requantized"):
        model.get_submodule(LAYER).weight = torch.randn(model.get_submodule(LAYER).weight.shape)
    model.save_pretrained(tmp_path / "merged")
    folders = saved, tmp_path / "bf16", tmp_path / "merged"
    assert len({hash_of(folder / WEIGHTS) for folder in folders}) == 3
    assert all(load_quantized(folder) for folder in folders)


def test_tensors_that_change_on_the_way_to_the_file_get_no_checksum(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain(saved)

    def double(model: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {name: value * 2 for name, value in state.items()}

    monkeypatch.setattr(huggingface, "revert_weight_conversion", double)
    model.save_pretrained(tmp_path / "again")
    assert hash_of(tmp_path / "again" / WEIGHTS) is None


def test_adapters_carry_no_checksum_of_the_model(saved: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = plain(saved)
    model.add_adapter(peft.LoraConfig(target_modules=["k_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert hash_of(tmp_path / "adapter" / "adapter_model.safetensors") is None


# files that do not fill the model


def replace_by_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def remove_a_tensor(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda state: state.pop("lm_head.bias"))


def remove_a_low_bit_tensor(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda state: state.pop(f"{LAYER}.scale"))


def add_a_tensor(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda state: state.update(extra=torch.zeros(1)))


def cut_a_tensor(folder: Path) -> None:
    def cut(state: dict[str, Any]) -> None:
        state[f"{LAYER}.qweight"] = state[f"{LAYER}.qweight"][:-1].clone()

    rewrite(folder / WEIGHTS, cut)


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


def lose_a_shard(folder: Path) -> None:
    plain(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / WEIGHTS).unlink()
    max(folder.glob("*.safetensors")).unlink()


def truncate_index(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": ')


def another_class(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(architectures=["NoSuchModel"]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_by_pickle, rf"/{WEIGHTS}: not found, so there are no weights"),
        (remove_a_tensor, rf"/{WEIGHTS}: lacks 1 tensors of a Wav2Vec2ForCTC, 'lm_head.bias'"),
        (remove_a_low_bit_tensor, rf"{LAYER}.scale"),
        (add_a_tensor, rf"/{WEIGHTS}: a Wav2Vec2ForCTC has no place for 1 tensors, 'extra'"),
        (cut_a_tensor, rf"{LAYER}.qweight"),
        (truncate, rf"/{WEIGHTS}: truncated or not a safetensors file"),
        (lose_a_shard, r"safetensors: not found|does not appear to have"),
        (truncate_index, rf"/{WEIGHTS}.index.json: truncated or not an index"),
        (another_class, r"/config.json: architectures must name a model.*got 'NoSuchModel'"),
    ],
)
def test_what_does_not_fill_the_model_is_refused(
    damage: Callable[[Path], None], message: str, saved: Path
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=f"^{saved}.*{message}"):
        load_quantized(saved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_by_pickle, r"pytorch_model.bin: not a safetensors file"),
        (remove_a_low_bit_tensor, rf"{LAYER}.scale must be in the file"),
        (cut_a_tensor, rf"{LAYER}.qweight must be"),
    ],
)
def test_from_pretrained_refuses_low_bit_layers_without_weights(
    damage: Callable[[Path], None], message: str, saved: Path
) -> None:
    damage(saved)
    with pytest.raises(ValueError, match=message):
        plain(saved, ignore_mismatched_sizes=True)


def test_a_new_head_is_initialized_or_refused(saved: Path) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"mismatched|lm_head"):
        plain(saved, vocab_size=11)
    try:
        model = plain(saved, vocab_size=11, ignore_mismatched_sizes=True, device_map="cpu")
    except ValueError as error:
        # the oldest transformers gives a quantized model the tensor of the file, whatever its shape
        assert "lm_head.weight must be [11, 48], got [24, 48] in the file" in str(error)  # noqa: PT017
    else:
        assert model.lm_head.weight.shape[0] == 11


# what inspecting sees


def newer_version(config: dict[str, Any]) -> None:
    config["quantization_config"]["version"] = 99


def no_table(config: dict[str, Any]) -> None:
    del config["quantization_config"]["layers"]


def wrong_bits(config: dict[str, Any]) -> None:
    config["quantization_config"]["layers"][LAYER]["spec"]["bits"] = 3


def unknown_field(config: dict[str, Any]) -> None:
    config["quantization_config"]["layers"][LAYER]["spec"]["rank"] = 3


def unknown_kind(config: dict[str, Any]) -> None:
    config["quantization_config"]["layers"][LAYER]["kind"] = "QLSTM"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (newer_version, "format version 99, this release reads up to 1"),
        (no_table, "layers must be a table of quantized layers, got None"),
        (wrong_bits, rf"layers\['{LAYER}'\] must have a valid spec: bits must be one of"),
        (unknown_field, rf"layers\['{LAYER}'\] must have a valid spec: .*'rank'"),
        (unknown_kind, rf"layers\['{LAYER}'\] must have a kind of .*QLSTM"),
    ],
)
@pytest.mark.parametrize("read", [load_quantized, inspect_checkpoint])
def test_a_wrong_table_names_the_file(
    read: Callable[[Path], Any],
    damage: Callable[[dict[str, Any]], None],
    message: str,
    saved: Path,
) -> None:
    edit_config(saved, damage)
    with pytest.raises(CheckpointError, match=rf"^{saved}/config.json: {message}"):
        read(saved)


@pytest.mark.parametrize("damage", [replace_by_pickle, truncate, lose_a_shard])
def test_inspect_refuses_a_folder_without_its_weights(
    damage: Callable[[Path], None], saved: Path
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=rf"^{saved}/model.*safetensors: "):
        inspect_checkpoint(saved)
