"""Save, load and inspect quantized models of any kind: safetensors and JSON, no pickle.

A checkpoint is a directory:

* ``lowbit.json``, the manifest: format version, every quantized layer's kind and spec, how to
  rebuild the model (transformers models), the name and SHA-256 of the tensor file, and a SHA-256 of
  the manifest itself.
* ``weights-<hash>.safetensors``: the state dict.

The tensor file is written under a new name and the manifest is replaced last, in one rename: a
full disk or a kill at any moment leaves either the old checkpoint or the new one.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbit_kernels.conversion import adapt, exposed, finish
from lowbit_kernels.conversion.layer_names import LayerTable, alike
from lowbit_kernels.conversion.matmuls import add_matmuls, matmuls_of
from lowbit_kernels.conversion.naming import naming
from lowbit_kernels.conversion.replace import names_of
from lowbit_kernels.formats import FORMAT_VERSION, QuantConfig, QuantSpec
from lowbit_kernels.integrations import rebuild
from lowbit_kernels.integrations.checksum import check_files, read_header
from lowbit_kernels.integrations.fuse import is_fused
from lowbit_kernels.integrations.skeletons import (
    check_layers,
    check_version,
    empty_layer,
    layer_table,
)
from lowbit_kernels.modules import QATModule, QConv1d, QLinear

MANIFEST = "lowbit.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read; the message names the file and the reason."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds.

    Args:
        path: the directory.
        format_version: of the packed format.
        model: class of the model.
        layers: quantized layers, name to ``{"kind", "spec"}``.
        nbytes: bytes of the tensor file.
        tensors: how many tensors it holds.
    """

    path: str
    format_version: int
    model: str
    layers: dict[str, dict[str, Any]]
    nbytes: int
    tensors: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(
            f"{self.model}, {len(self.layers)} low-bit layers, {self.nbytes / 1e6:.2f} MB, "
            f"format {self.format_version}",
            style="bold",
        )
        yield ""
        rows = [(n, e["kind"], str(QuantSpec(**e["spec"]))) for n, e in self.layers.items()]
        groups = alike(rows, lambda row: row[0], lambda row: row[1:])
        yield LayerTable(
            ("kind", "spec"),
            [([name for name, _, _ in group], group[0][1:]) for group in groups],
            [spec for _, _, spec in rows],
            others=20,
        )


def save_quantized(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a quantized model; an older checkpoint at ``path`` stays intact until this one is whole.

    Args:
        model: a model with at least one quantized layer.
        path: directory, created if missing.

    Raises:
        ValueError: if the model holds no quantized layer, or one that ``convert`` has not packed.
        OSError: if the disk refuses; the old checkpoint is intact.
    """
    layers = layer_table(model)
    if not layers:
        raise ValueError(
            f"model must hold quantized layers, got a {type(model).__name__} with none"
        )
    if any(isinstance(module, QATModule) for module in model.modules()):
        raise ValueError("model must hold no layers that train: call convert first")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _unshare(model.state_dict())
    weights = _write_weights(tensors, directory)
    manifest: dict[str, Any] = {
        "format": "lowbit_kernels",
        "format_version": FORMAT_VERSION,
        "written_by": f"lowbit-kernels {version('lowbit-kernels')}",
        "model": type(model).__name__,
        "rebuild": rebuild.describe(model),
        "layers": layers,
        "fuse": is_fused(model),
        **matmuls_of(model),
        "weights": {"file": weights.name, "sha256": _sha256(weights), "aliases": aliases},
    }
    manifest["sha256"] = _manifest_hash(manifest)
    _commit(directory / MANIFEST, json.dumps(manifest, indent=1).encode())
    for stale in directory.glob("weights-*.safetensors"):
        if stale != weights:
            stale.unlink()


def load_quantized(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a checkpoint of ``save_quantized`` or a quantized transformers directory.

    Args:
        path: the directory.
        model: a float model of the same architecture, changed in place; needed unless the model is
            one of transformers' or a ``SpeechEncoder`` of ``ssl_models``.

    Returns:
        The quantized model: ``model``, or one rebuilt on the CPU in eval mode.

    Raises:
        CheckpointError: naming the file and the reason: missing, truncated, tampered with, of a
            newer format version, a pickle, or of another model; ``model`` is unchanged.
        ValueError: if ``model`` is needed and was not given.
    """
    directory = Path(path)
    if not (directory / MANIFEST).exists() and rebuild.is_quantized_pretrained(directory):
        return _pretrained(directory, model)
    manifest = _read_manifest(directory)
    state = _read_weights(directory, manifest["weights"])
    target = model
    if target is None:
        if manifest["rebuild"] is None:
            raise ValueError(
                f"model must be given to load a {manifest['model']}, which cannot be rebuilt "
                "from JSON; got None"
            )
        target = rebuild.build(manifest["rebuild"]).eval()
    # checkpoints of older releases have not all of these keys
    options = {key: manifest[key] for key in ("fuse", *matmuls_of(target)) if key in manifest}
    config = QuantConfig(**options)
    with exposed(target, manifest["layers"]):
        add_matmuls(target, config)
        skeletons = _skeletons(target, manifest["layers"], directory / MANIFEST)
        _check_fit(target, skeletons, state, directory / manifest["weights"]["file"])
        for name, layer in skeletons.items():
            target.set_submodule(name, layer)
    adapt(target)
    target.load_state_dict(state)
    finish(target, replace(config, default=next(iter(skeletons.values())).spec))
    return target


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointInfo:
    """What a checkpoint holds, without building the model.

    Raises:
        CheckpointError: as ``load_quantized``.
    """
    directory = Path(path)
    try:
        if not (directory / MANIFEST).exists() and rebuild.is_quantized_pretrained(directory):
            name, found, layers = rebuild.inspect_pretrained(directory)
            files = rebuild.weight_files(directory)
            count = check_files(files)
        else:
            manifest = _read_manifest(directory)
            name, found, layers = manifest["model"], manifest["format_version"], manifest["layers"]
            files = [directory / manifest["weights"]["file"]]
            _check_hash(files[0], manifest["weights"]["sha256"])
            _, count = read_header(files[0])
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return CheckpointInfo(
        path=str(path),
        format_version=found,
        model=name,
        layers=layers,
        nbytes=sum(file.stat().st_size for file in files),
        tensors=count,
    )


def _unshare(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, and for every tied one the name under which it is written."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, aliases


def _write_weights(tensors: dict[str, Tensor], directory: Path) -> Path:
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=directory) as scratch:
        temporary = Path(scratch) / "weights"
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(f"{directory}: {error}") from error
        _sync(temporary)
        final = directory / f"weights-{_sha256(temporary)[:16]}.safetensors"
        os.replace(temporary, final)
    return final


def _commit(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        temporary = Path(scratch) / path.name
        temporary.write_bytes(content)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_hash(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        if directory.is_file():
            raise CheckpointError(f"{directory}: a file, not a checkpoint directory")
        raise CheckpointError(f"{path}: not found, so this is not a low-bit checkpoint")
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: truncated or not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != "lowbit_kernels":
        raise CheckpointError(f"{path}: not a manifest of lowbit_kernels")
    with naming(path, CheckpointError):
        check_version(manifest.get("format_version"))
        if manifest.get("sha256") != _manifest_hash(manifest):
            raise ValueError("its SHA-256 does not match, so it was changed")
        check_layers(manifest["layers"])
    return manifest


def _check_hash(path: Path, expected: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: not found")
    if _sha256(path) != expected:
        raise CheckpointError(f"{path}: truncated or changed, its SHA-256 does not match")


def _read_weights(directory: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    path = directory / entry["file"]
    _check_hash(path, entry["sha256"])
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
    return state | {name: state[kept] for name, kept in entry["aliases"].items()}


def _pretrained(directory: Path, model: nn.Module | None) -> nn.Module:
    if model is not None:
        raise ValueError(
            f"model must be None for a transformers directory, which names its own class; "
            f"got a {type(model).__name__}"
        )
    try:
        return rebuild.load_pretrained(directory)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        text = str(error)
        named = text.startswith(str(directory))
        raise CheckpointError(text if named else f"{directory}: {text}") from None


def _skeletons(
    model: nn.Module, layers: dict[str, dict[str, Any]], manifest: Path
) -> dict[str, QLinear | QConv1d]:
    """Empty quantized layers in the shapes of the model's own."""
    names = names_of(model)
    modules = {name: module for module, group in names.items() for name in group}
    skeletons: dict[str, QLinear | QConv1d] = {}
    for name, entry in layers.items():
        with naming(f"{manifest}: saved from another model", CheckpointError):
            layer = empty_layer(model, modules.get(name), name, entry)
        # the state dict has each of its names
        skeletons |= dict.fromkeys(names[modules[name]], layer)
    return skeletons


def _check_fit(
    model: nn.Module,
    skeletons: dict[str, QLinear | QConv1d],
    state: dict[str, Tensor],
    path: Path,
) -> None:
    replaced = tuple(f"{name}." for name in skeletons)
    expected = {
        key: tuple(value.shape)
        for key, value in model.state_dict().items()
        if not key.startswith(replaced)
    }
    for name, layer in skeletons.items():
        for key, value in layer.state_dict().items():
            expected[f"{name}.{key}"] = tuple(value.shape)
    found = {key: tuple(value.shape) for key, value in state.items()}
    if wrong := sorted(set(expected.items()) ^ set(found.items())):
        key = wrong[0][0]
        raise CheckpointError(
            f"{path}: saved from another model: {key!r} is {found.get(key, 'missing')} in the "
            f"file and {expected.get(key, 'missing')} in the model "
            f"({len({k for k, _ in wrong})} tensors differ)"
        )
