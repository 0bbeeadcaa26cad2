"""Building a model's skeleton from JSON: what a checkpoint needs to load without ``model=``."""

import json
from pathlib import Path
from typing import Any

from torch import nn


def describe(model: nn.Module) -> dict[str, Any] | None:
    """How to rebuild a model, JSON-able; ``None`` if only its own code can."""
    kind = type(model)
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
    if description["library"] != "transformers":
        raise ValueError(f"library must be 'transformers', got {description['library']!r}")
    import transformers

    kind = getattr(transformers, description["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"class must name a transformers model, got {description['class']!r} "
            f"(transformers {transformers.__version__})"
        )
    config = kind.config_class.from_dict(description["config"])  # type: ignore[attr-defined]
    model: nn.Module = kind(config)
    return model


def is_quantized_pretrained(directory: Path) -> bool:
    """Whether a directory is a transformers checkpoint that this library quantized."""
    return "quantization_config" in _config(directory)


def inspect_pretrained(directory: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """Model class and quantized layers of a transformers checkpoint that this library quantized."""
    config = _config(directory)
    return (config.get("architectures") or ["?"])[0], config["quantization_config"]["layers"]


def load_pretrained(directory: Path) -> nn.Module:
    """Load a quantized transformers checkpoint as the class that it names."""
    import transformers

    name, _ = inspect_pretrained(directory)
    model: nn.Module = getattr(transformers, name).from_pretrained(directory)
    return model


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    quantization = config.get("quantization_config") or {}
    return config if quantization.get("quant_method") == "lowbit_kernels" else {}
