"""What each kernel is compiled for: a module a folder of kernels, ``CASES`` in each."""

import importlib
import pkgutil

from bench.static.compile import AotCase


def load_cases(target: str, part: str = "") -> list[AotCase]:
    """The cases meant for ``target`` whose name contains ``part``."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    cases = [
        case
        for name in modules
        for case in importlib.import_module(f"{__name__}.{name}").CASES
        if case.targets is None or target in case.targets
    ]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), f"two cases share a name among {sorted(names)}"
    return [case for case in cases if part in case.name]
