"""Errors a user can mend: one clear line each, exit code 2."""

from importlib import import_module
from typing import Any


class CommandError(Exception):
    """Something the user can mend; the message is the whole of what they see."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for libraries that write paragraphs."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def require(module: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        module: its import name.
        extra: which of our extras brings it.

    Raises:
        CommandError: if it is not installed, with the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise CommandError(
            f'{module} is not installed: pip install "lowbit-kernels[{extra}]"'
        ) from None
