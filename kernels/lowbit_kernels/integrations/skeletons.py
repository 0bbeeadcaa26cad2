"""The layer table of a quantized model, and empty layers made from it to load weights into."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lowbit_kernels.conversion.naming import naming
from lowbit_kernels.conversion.replace import replace_modules
from lowbit_kernels.formats import FORMAT_VERSION, QuantSpec
from lowbit_kernels.modules import QConv1d, QLinear, QuantizedModule

_KINDS: dict[str, tuple[type[QLinear | QConv1d], type[nn.Module]]] = {
    "QLinear": (QLinear, nn.Linear),
    "QConv1d": (QConv1d, nn.Conv1d),
}


def layer_table(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every quantized layer: name to ``{"kind": class name, "spec": QuantSpec as a dict}``."""
    return {
        name: {"kind": type(module).__name__, "spec": module.spec.to_dict()}
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
    }


def check_version(found: Any) -> None:
    """Raise ``ValueError`` for a format version that this release does not read."""
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise ValueError(
            f"format version {found!r}, this release reads up to {FORMAT_VERSION}; "
            "upgrade lowbit-kernels"
        )


def check_layers(layers: Any) -> None:
    """Raise ``ValueError`` for a table that ``layer_table`` cannot have written."""
    if not isinstance(layers, Mapping):
        raise ValueError(f"layers must be a table of quantized layers, got {layers!r}")
    for name, entry in layers.items():
        if not isinstance(entry, Mapping) or entry.get("kind") not in _KINDS:
            raise ValueError(f"layers[{name!r}] must have a kind of {tuple(_KINDS)}, got {entry!r}")
        try:
            QuantSpec(**entry.get("spec"))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"layers[{name!r}] must have a valid spec: {error}") from None


def place_skeletons(model: Any, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the layers that a table names by empty quantized ones of the same shape.

    A table saved from a bare encoder fits a model with a head and the other way round, as weights
    do in transformers.

    Args:
        model: a transformers model, usually on the meta device; changed in place.
        layers: as ``layer_table`` returns it.

    Raises:
        ValueError: if a layer is not there or is of another kind, or a spec is none; the model is
            unchanged.
    """
    check_layers(layers)
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    skeletons = {}
    for name, entry in layers.items():
        local = _local_name(name, prefix, modules)
        if local is None and _is_head(name, prefix, layers):
            continue
        with naming("quantization_config.layers must fit the model"):
            skeletons[local or name] = empty_layer(model, modules.get(local or name), name, entry)
    replace_modules(model, {modules[name]: layer for name, layer in skeletons.items()})


def empty_layer(
    model: nn.Module, old: nn.Module | None, name: str, entry: Mapping[str, Any]
) -> QLinear | QConv1d:
    """An empty quantized layer in the shape of ``old``, a layer of ``model``.

    Args:
        name, entry: of the layer in a table that ``check_layers`` has passed.

    Raises:
        ValueError: if ``old`` is none, or of another kind.
    """
    kind, base = _KINDS[entry["kind"]]
    if not isinstance(old, base):
        found = "nothing" if old is None else f"a {type(old).__name__}"
        raise ValueError(
            f"holds a {entry['kind']} {name!r} where {type(model).__name__} has {found}"
        )
    return kind.empty_like(old, QuantSpec(**entry["spec"]))  # type: ignore[arg-type]


def _local_name(name: str, prefix: str, modules: Mapping[str, nn.Module]) -> str | None:
    candidates = (name, prefix + name, name.removeprefix(prefix))
    return next((candidate for candidate in candidates if candidate in modules), None)


def _is_head(name: str, prefix: str, layers: Mapping[str, Any]) -> bool:
    """Whether a layer stands outside the encoder that the table was saved with."""
    return not name.startswith(prefix) and any(other.startswith(prefix) for other in layers)
