"""Triton's interpreter, made to refuse what a GPU does not forgive.

The interpreter reads and writes any address of the process without a word, and runs one program
after the other, so that neither a missing mask nor a race between programs shows in a result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


class KernelMemoryError(AssertionError):
    """A kernel touched memory that is not its argument's, or two programs disagreed."""


@dataclass
class _Argument:
    """A tensor argument: its addresses, and who wrote what into each of its elements."""

    name: str
    start: int
    itemsize: int
    writer: np.ndarray  # the program, or -1
    bits: np.ndarray

    def elements(self, addresses: np.ndarray) -> np.ndarray:
        """Indices of the elements at these addresses; out of range where they are not its own."""
        return (addresses.astype(np.int64) - self.start) // self.itemsize


@dataclass
class _Launch:
    kernel: str = ""
    program: int = 0
    arguments: list[_Argument] = field(default_factory=list)

    def fail(self, message: str) -> None:
        raise KernelMemoryError(f"{self.kernel} {message}")

    def hits(self, ptrs: Any, mask: Any, what: str) -> list[tuple[_Argument, Any, Any]]:
        """Of an access: the arguments, which lanes hit them, and the elements."""
        active = np.broadcast_to(mask.data, ptrs.data.shape).reshape(-1).astype(bool)
        addresses = ptrs.data.reshape(-1)
        left, found = active.copy(), []
        for argument in self.arguments:
            elements = argument.elements(addresses)
            inside = left & (elements >= 0) & (elements < len(argument.writer))
            if inside.any():
                found.append((argument, inside, elements[inside]))
                left &= ~inside
        if left.any():
            self.fail(f"{what}s {left.sum()} of {active.sum()} elements outside of its arguments")
        return found

    def load(self, ptrs: Any, mask: Any) -> None:
        for argument, _, elements in self.hits(ptrs, mask, "load"):
            writer = argument.writer[elements]
            if ((writer != -1) & (writer != self.program)).any():
                self.fail(f"reads what another of its programs writes into {argument.name}")

    def store(self, ptrs: Any, value: Any, mask: Any) -> None:
        values = np.ascontiguousarray(np.broadcast_to(value.data, ptrs.data.shape)).reshape(-1)
        bits = values.view(f"u{values.itemsize}").astype(np.uint64)
        for argument, inside, elements in self.hits(ptrs, mask, "store"):
            writer, written = argument.writer[elements], bits[inside]
            known = (writer != -1) & (writer != self.program)
            first = argument.bits[elements]
            argument.bits[elements], argument.writer[elements] = written, self.program
            if (known & (first != written)).any() or (argument.bits[elements] != written).any():
                self.fail(f"writes two values to one place of {argument.name}")


@contextmanager
def checked_memory() -> Iterator[None]:
    """Within: every launch is checked for accesses outside of its arguments, and for races.

    Raises:
        triton.runtime.errors.InterpreterError: for a ``KernelMemoryError`` in a kernel.
    """
    from triton.runtime import interpreter

    launch = _Launch()
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    to_host, set_grid_idx = executor._init_args_hst, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store

    def start(self: Any, args: Any, kwargs: Any) -> Any:
        host = to_host(self, args, kwargs)
        launch.kernel = self.fn.__name__
        names = self.fn.__code__.co_varnames
        launch.arguments = [
            _argument(name, tensor)
            for name, tensor in zip(names, host[0], strict=False)
            if isinstance(tensor, torch.Tensor) and tensor.numel()
        ]
        return host

    def choose(self: Any, x: int, y: int, z: int) -> None:
        set_grid_idx(self, x, y, z)
        launch.program = (x << 40) + (y << 20) + z

    def checked_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        launch.load(ptrs, mask)
        return load(self, ptrs, mask, *args)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        launch.store(ptrs, value, mask)
        return store(self, ptrs, value, mask, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", start)
        patch.setattr(builder, "set_grid_idx", choose)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield


def _argument(name: str, tensor: torch.Tensor) -> _Argument:
    size = 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    writer, bits = np.full(size, -1, np.int64), np.zeros(size, np.uint64)
    return _Argument(name, tensor.data_ptr(), tensor.element_size(), writer, bits)


def round_products_alike(monkeypatch):
    """Make products independent of their place in a tile, as those of a matrix unit are.

    numpy's are not; in fp64 the difference is below the rounding to fp32.
    """

    def product(a, b, dtype):
        return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(dtype)

    monkeypatch.setattr(interpreter, "np", SimpleNamespace(**vars(np) | {"matmul": product}))
