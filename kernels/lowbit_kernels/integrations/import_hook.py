"""Import modules as soon as another one has been imported, without importing that."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(name: str, *followers: str) -> None:
    """Import ``followers``: now if the module ``name`` is loaded, else right after its import.

    Args:
        name: dotted name of the module; it need not be installed.
        *followers: dotted names of modules; one that caused the import is there in part, and goes
            on afterwards.
    """
    if name not in sys.modules:
        sys.meta_path.insert(0, _Waiting(name, followers))
        return
    for follower in followers:
        import_module(follower)


class _Waiting(MetaPathFinder):
    """Finds one module as Python would, and adds imports to the end of its execution."""

    def __init__(self, name: str, followers: tuple[str, ...]) -> None:
        self.name, self.followers, self.searching = name, followers, False

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
            if self in sys.meta_path:  # a second import must not follow again
                sys.meta_path.remove(self)
                when_imported(self.name, *self.followers)

        loader.exec_module = exec_module  # type: ignore[attr-defined]
