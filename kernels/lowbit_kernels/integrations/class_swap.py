"""Change what a module computes by making it an instance of a subclass of its own class.

A model library recognizes its modules by class (to collect hidden states, to checkpoint gradients,
to initialize), so a foreign module in their place loses features without a word. A subclass keeps
them all, and the parameters stay where they are.
"""

from typing import Any

from torch import nn

_SUBCLASSES: dict[tuple[type, type], Any] = {}


class Swapped:
    """Base of the mixins; ``_origin`` is the class that the module had."""

    _mixin: type
    _origin: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the subclass has no importable name, so pickle and copy rebuild it from its two parts
        return _rebuild, (self._mixin, self._origin), self.__dict__


def swap_class(module: nn.Module, mixin: type[Swapped]) -> None:
    """Put ``mixin`` in front of the module's class."""
    module.__class__ = _subclass(mixin, type(module))


def restore_class(module: nn.Module) -> None:
    """Undo ``swap_class``; does nothing to a module that was not swapped."""
    if isinstance(module, Swapped):
        module.__class__ = module._origin


def is_stock(module: nn.Module | None, *names: str) -> bool:
    """Whether a module is of one of transformers' classes with these names, and not swapped."""
    kind = type(module)
    known = kind.__name__ in names and kind.__module__.startswith("transformers.")
    return known and not isinstance(module, Swapped)


def _subclass(mixin: type[Swapped], origin: type) -> Any:
    key = (mixin, origin)
    if key not in _SUBCLASSES:
        # named as the original, so that reports and saved configs read as before
        names = {"_mixin": mixin, "_origin": origin, "__module__": origin.__module__}
        _SUBCLASSES[key] = type(origin.__name__, (mixin, origin), names)
    return _SUBCLASSES[key]


def _rebuild(mixin: type[Swapped], origin: type) -> Any:
    kind = _subclass(mixin, origin)
    return kind.__new__(kind)
