"""CUDA implementations of ops: imported when first called, on the device of their first tensor."""

import importlib
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


def implement_on_cuda(op: str, function: str) -> None:
    """Register an op's CUDA implementation, which takes the op's arguments.

    It is imported on the first call, so that ``import lowbit_kernels`` needs no GPU and no Triton.

    Args:
        op: qualified name of the op.
        function: qualified name of the function.
    """
    module, _, name = function.rpartition(".")

    def call(*args: Any) -> Any:
        with on_device(args[0]):
            return getattr(importlib.import_module(module), name)(*args)

    torch.library.impl(op, "cuda", call)
