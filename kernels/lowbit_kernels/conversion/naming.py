"""Errors that say where they arose."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(place: object, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Raise a ``ValueError`` from inside as a ``kind``, with ``place`` before its message."""
    try:
        yield
    except ValueError as error:
        raise kind(f"{place}: {error}") from None
