"""Call a function as soon as a module has been imported, without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Call ``callback`` once: now if the module ``name`` is loaded, else right after its import.

    Args:
        name: dotted name of the module; it need not be installed.
        callback: may import the module.
    """
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _Waiting(name, callback))


class _Waiting(MetaPathFinder):
    """Finds one module as Python would, and adds a call to the end of its execution."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self.name, self.callback, self.searching = name, callback, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.searching:
            return None
        self.searching = True  # the search below comes through here again
        try:
            spec = find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader)
        return spec

    def _extend(self, loader: object) -> None:
        execute = loader.exec_module  # type: ignore[attr-defined]

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # a second import must not call again
                sys.meta_path.remove(self)
                self.callback()

        loader.exec_module = exec_module  # type: ignore[attr-defined]
