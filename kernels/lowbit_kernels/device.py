"""CUDA implementations of ops: imported when first called, on the device of their first tensor."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[None] = nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of x the current one, on which Triton launches; mostly it is already."""
    if torch.cuda.current_device() == x.device.index:
        return _NOTHING
    return torch.cuda.device(x.device)


def implement_on_cuda(op: str, function: str | Callable[..., Any]) -> None:
    """Register an op's CUDA implementation, which takes the op's arguments.

    Args:
        op: qualified name of the op.
        function: the function, which imports what needs a GPU and Triton when it is called, so that
            ``import lowbit_kernels`` needs neither; or its qualified name, to be imported then.
    """

    def call(*args: Any) -> Any:
        with on_device(args[0]):
            return (_imported(function) if isinstance(function, str) else function)(*args)

    torch.library.impl(op, "cuda", call)


def _imported(function: str) -> Callable[..., Any]:
    module, _, name = function.rpartition(".")
    implementation: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return implementation
