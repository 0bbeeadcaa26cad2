"""Building a model's skeleton from JSON: what a checkpoint needs to load without ``model=``."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lowbit_kernels.conversion.naming import naming
from lowbit_kernels.formats import FORMAT_VERSION
from lowbit_kernels.integrations.skeletons import check_layers, check_version

_CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# libraries that stand above this package, and what of them is imported to register a model
_ABOVE = {"ssl_models": "ssl_models.encoder"}


class _Registered(NamedTuple):
    kind: type[nn.Module]
    describe: Callable[[Any], Any]
    build: Callable[[Any], nn.Module]


_REGISTERED: dict[str, _Registered] = {}


def register(
    library: str,
    kind: type[nn.Module],
    describe: Callable[[Any], Any],
    build: Callable[[Any], nn.Module],
) -> None:
    """Let models of a library be rebuilt.

    Args:
        library: its import name.
        kind: the class of the models.
        describe: what ``build`` needs of a model, JSON-able.
        build: makes a float model with arbitrary weights of that.
    """
    _REGISTERED[library] = _Registered(kind, describe, build)


def describe(model: nn.Module) -> dict[str, Any] | None:
    """How to rebuild a model, JSON-able; ``None`` if only its own code can."""
    kind = type(model)
    for library, known in _REGISTERED.items():
        if kind is known.kind:
            return {"library": library, "config": known.describe(model)}
    if not kind.__module__.startswith("transformers.models."):
        return None
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    config.pop("quantization_config", None)
    return {"library": "transformers", "class": kind.__name__, "config": config}


def build(description: dict[str, Any]) -> nn.Module:
    """A float model with arbitrary weights from ``describe``'s output.

    Raises:
        ValueError: for an unknown library or class.
    """
    library = description["library"]
    if library in _ABOVE:
        importlib.import_module(_ABOVE[library])
        return _REGISTERED[library].build(description["config"])
    if library != "transformers":
        raise ValueError(f"library must be 'transformers' or 'ssl_models', got {library!r}")
    kind = _model_class("class", description["class"])
    return kind(kind.config_class.from_dict(description["config"]))  # type: ignore[no-any-return]


def _model_class(argument: str, name: str) -> Any:
    import transformers

    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"{argument} must name a model of transformers {transformers.__version__}, got {name!r}"
        )
    return kind


def is_quantized_pretrained(directory: Path) -> bool:
    """Whether a directory is a transformers checkpoint that this library quantized."""
    return "quantization_config" in _config(directory)


def inspect_pretrained(directory: Path) -> tuple[str, int, dict[str, dict[str, Any]]]:
    """Model class, format version and layers of a transformers checkpoint quantized here.

    Raises:
        ValueError: naming the file: of a newer format version, or with a wrong layer table.
    """
    path, config = directory / _CONFIG, _config(directory)
    stored = config["quantization_config"]
    found, layers = stored.get("version", FORMAT_VERSION), stored.get("layers")
    with naming(path):
        check_version(found)
        check_layers(layers)
    return (config.get("architectures") or ["?"])[0], found, layers


def weight_files(directory: Path) -> list[Path]:
    """The files of a transformers checkpoint that hold its weights.

    Raises:
        ValueError: naming the file: there are none, or the index of the shards cannot be read.
    """
    whole, index = directory / _WEIGHTS, directory / _INDEX
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise ValueError(f"{whole}: not found, so there are no weights")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: truncated or not an index of shards ({error!r})") from None
    return [directory / name for name in names]


def load_pretrained(directory: Path) -> nn.Module:
    """Load a quantized transformers checkpoint as the class that it names.

    Raises:
        ValueError: naming the file: whatever does not fill the model exactly.
    """
    name, _, _ = inspect_pretrained(directory)
    files = weight_files(directory)
    kind = _model_class(f"{directory / _CONFIG}: architectures", name)
    # mismatches are asked for, to be refused below in words that name the tensor
    model, found = kind.from_pretrained(
        directory, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
    )
    _check_complete(files[0] if len(files) == 1 else directory / _INDEX, name, found)
    return model  # type: ignore[no-any-return]


def _check_complete(path: Path, kind: str, found: dict[str, Any]) -> None:
    for key, in_file, in_model in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{path}: {key!r} is {list(in_file)} in the file and {list(in_model)} in the model"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{path}: lacks {len(missing)} tensors of a {kind}, {missing[0]!r} first")
    if extra := sorted(found["unexpected_keys"]):
        raise ValueError(
            f"{path}: a {kind} has no place for {len(extra)} tensors, {extra[0]!r} first"
        )


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / _CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    quantization = config.get("quantization_config") or {}
    return config if quantization.get("quant_method") == "lowbit_kernels" else {}
