"""Launches of Triton kernels at little cost to the host.

Triton looks at every argument of every launch anew, to find the code that was compiled for its
kind: about 12 microseconds for a kernel of ours. Here the code is remembered by the few properties
that Triton compiles for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Key = tuple[Any, ...]


class Launcher:
    """One kernel, launched on the current device.

    Args:
        kernel: a ``triton.jit`` function. Its constants come last.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Key, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self, grid: tuple[int, ...], args: tuple[Any, ...], constants: "Constants"
    ) -> None:
        """Launch the kernel.

        Args:
            grid: programs along x, y and, if there are any, z.
            args: tensors, descriptors of tensors, numbers and None, in the kernel's order.
            constants: the kernel's constants and the compiler's options.
        """
        device = torch.cuda.current_device() if self._compiled else None
        key = (constants, device, *[_kind(arg) for arg in args])
        found = self._compiled.get(key)
        if found is None:
            compiled = self._kernel[grid](*args, **constants.values)
            if compiled is not None:  # the interpreter compiles nothing
                names = self._kernel.arg_names[len(args) :]
                rest = tuple([constants.values[name] for name in names])
                key = (constants, torch.cuda.current_device(), *key[2:])
                self._compiled[key] = compiled, rest
            return
        compiled, rest = found
        # the first three count
        compiled[*grid, 1](*args, *rest)


class Constants:
    """Constants of a kernel and options of the compiler, told apart by identity: keep them.

    Args:
        values: name to value.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)


def _kind(arg: Tensor | TensorDescriptor | int | float | None) -> Any:
    """What Triton compiles for: the dtype and alignment of a tensor, the divisibility of a number.

    It is finer than Triton's own, which leaves some numbers out: more entries, the same code.
    """
    if arg is None:
        return None
    if isinstance(arg, int):
        return (arg & 15) == 0, arg == 1, -(2**31) <= arg < 2**31
    if isinstance(arg, float):
        return float
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, tuple(arg.block_shape)
    return arg.dtype, arg.data_ptr() & 15 == 0
