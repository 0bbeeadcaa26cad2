"""Putting modules in the place of others, under every name that a model has for them."""

from collections.abc import Mapping

from torch import nn


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``new[old]`` wherever ``old`` stands below ``model``, in place."""
    if all(old is module for old, module in new.items()):
        return
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])


def names_of(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module of a model, in its order, with all names that it is registered under."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    return names
