"""Change what a module computes by making it an instance of a subclass of its own class.

A model library recognizes its modules by class (to collect hidden states, to checkpoint gradients,
to initialize), so a foreign module in their place loses features without a word. A subclass keeps
them all, and the parameters stay where they are.
"""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

_SUBCLASSES: dict[tuple[type, type], Any] = {}


class Swapped:
    """Base of the mixins; ``_origin`` is the class that the module had."""

    _mixin: type
    _origin: type
    # attributes of an instance that a copy has no use for, and that go with the mixin
    _scratch: tuple[str, ...] = ()

    if TYPE_CHECKING:  # what the class behind a mixin has, which a checker cannot see

        def __getattr__(self, name: str) -> Any: ...
        def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the subclass has no importable name, so pickle and copy rebuild it from its two parts
        state = {name: value for name, value in self.__dict__.items() if name not in self._scratch}
        return _rebuild, (self._mixin, self._origin), state


def swap_class(module: nn.Module, mixin: type[Swapped]) -> nn.Module:
    """Put ``mixin`` in front of the module's class; gives the module back."""
    module.__class__ = _subclass(mixin, type(module))
    return module


def restore_class(module: nn.Module) -> nn.Module:
    """Undo ``swap_class`` and take this package's hooks away; gives the module back."""
    if isinstance(module, Swapped):
        for name in module._scratch:
            module.__dict__.pop(name, None)
        module.__class__ = module._origin
    for key, hook in list(module._forward_pre_hooks.items()):
        if str(getattr(hook, "__module__", "")).startswith("lowbit_kernels.integrations."):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    return module


def is_stock(module: nn.Module | None, *names: str) -> bool:
    """Whether a module is of one of transformers' classes with these names, and not swapped.

    Args:
        module: any module.
        *names: names of classes; a ``*`` in one stands for any characters.
    """
    return not isinstance(module, Swapped) and is_one_of(module, *names)


def is_one_of(module: nn.Module | None, *names: str) -> bool:
    """Whether a module is of one of transformers' classes with these names, or was."""
    kind = type(module)
    known = any(fnmatchcase(kind.__name__, name) for name in names)
    return known and kind.__module__.startswith("transformers.")


def _subclass(mixin: type[Swapped], origin: type) -> Any:
    if (mixin, origin) not in _SUBCLASSES:
        # named as the original, so that reports and saved configs read as before
        names = {"_mixin": mixin, "_origin": origin, "__module__": origin.__module__}
        _SUBCLASSES[mixin, origin] = type(origin.__name__, (mixin, origin), names)
    return _SUBCLASSES[mixin, origin]


def _rebuild(mixin: type[Swapped], origin: type) -> Any:
    kind = _subclass(mixin, origin)
    return kind.__new__(kind)
