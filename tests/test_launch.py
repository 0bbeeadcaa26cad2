"""Launches of Triton kernels: code is reused only for arguments that it was compiled for."""

import importlib
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowbit_kernels
from lowbit_kernels import device
from lowbit_kernels.attention import backward_kernel, forward_kernel, offsets_kernel
from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.matmul.launch import Constants, Launcher


class Compiled:
    """Stands for compiled code; records what it is launched with."""

    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *args: self.log.append((self, grid, args))


class Kernel:
    """Stands for a ``triton.jit`` function."""

    arg_names = ("x_ptr", "n", "BLOCK", "IS_LAST")

    def __init__(self):
        self.compiled, self.log = [], []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            assert constants == {"BLOCK": 32, "IS_LAST": True, "num_warps": 4}
            self.compiled.append(Compiled(self.log))
            return self.compiled[-1]

        return launch


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


CONSTANTS = Constants({"num_warps": 4, "IS_LAST": True, "BLOCK": 32})


def test_the_second_launch_takes_the_first_ones_code(kernel):
    launch = Launcher(kernel)
    memory = torch.zeros(65)
    launch((7, 2), (memory, 64), CONSTANTS)
    assert len(kernel.compiled) == 1
    assert kernel.log == []  # Triton itself launched it
    other = torch.ones(3)
    launch((9, 1), (other, 160), CONSTANTS)
    ((compiled, grid, args),) = kernel.log
    assert compiled is kernel.compiled[0]
    assert grid == (9, 1, 1)
    assert args[0] is other
    assert args[1:] == (160, 32, True)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, n: (x.half(), n),
        lambda x, n: (x[1:], n),  # 4 bytes past a multiple of 16
        lambda x, n: (None, n),
        lambda x, n: (x, 65),
        lambda x, n: (x, 1),
        lambda x, n: (x, 2**31),
        lambda x, n: (x, float(n)),
    ],
    ids=["dtype", "alignment", "none", "divisibility", "one", "64 bits", "float"],
)
def test_other_kinds_of_arguments_are_compiled_for(change, kernel):
    launch = Launcher(kernel)
    x = torch.zeros(65)
    launch((1, 1), (x, 64), CONSTANTS)
    launch((1, 1), change(x, 64), CONSTANTS)
    assert len(kernel.compiled) == 2
    launch((1, 1), (x, 64), CONSTANTS)
    assert [compiled for compiled, *_ in kernel.log] == [kernel.compiled[0]]


def test_other_constants_and_devices_are_compiled_for(kernel, monkeypatch):
    launch = Launcher(kernel)
    x = torch.zeros(65)
    launch((1, 1), (x, 64), CONSTANTS)
    launch((1, 1), (x, 64), Constants(CONSTANTS.values))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch((1, 1), (x, 64), CONSTANTS)
    assert len(kernel.compiled) == 3
    for index in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        launch((1, 1), (x, 64), CONSTANTS)
    assert [compiled for compiled, *_ in kernel.log] == [kernel.compiled[0], kernel.compiled[2]]


def test_an_interpreted_kernel_is_called_every_time(monkeypatch):
    class Interpreted(Kernel):
        def __getitem__(self, grid):
            return lambda *args, **constants: self.log.append((grid, args, constants))

    kernel = Interpreted()
    launch = Launcher(kernel)
    for _ in range(2):
        launch((1, 1), (torch.zeros(1), 64), CONSTANTS)
    assert len(kernel.log) == 2


class Recorded(Kernel):
    """Stands for a kernel with the arguments of another one."""

    def __init__(self, kernel):
        super().__init__()
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def launch(*args, **constants):
            # every argument once, the constants last, as compiled code takes them
            assert set(self.arg_names[len(args) :]) <= set(constants)
            self.compiled.append(Compiled(self.log))
            return self.compiled[-1]

        return launch


@pytest.mark.parametrize("kind", [None, "relative"])
def test_attention_asks_triton_once_for_a_kind_of_call(kind, monkeypatch):
    """Frames, strides, memory and scales may change, and take each kernel's first code."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    recorded = {}
    for module, name in (
        (forward_kernel, "_launch"),
        (backward_kernel, "_launch_delta"),
        (backward_kernel, "_launch_dq"),
        (backward_kernel, "_launch_dkdv"),
        (offsets_kernel, "_launch"),
    ):
        recorded[module, name] = Recorded(getattr(module, name)._kernel)
        monkeypatch.setattr(module, name, Launcher(recorded[module, name]))
    if kind is None:
        del recorded[offsets_kernel, "_launch"]
    for T, scale in ((32, 0.3), (48, 0.5), (112, 0.125)):
        q = torch.zeros(2, T, 3, 16).transpose(1, 2)
        scheme = None if kind is None else Scheme(kind, torch.zeros(3, 2 * T - 1, 16), q)
        options = (torch.tensor([T, 5]), scheme, None, None, scale, 0.0)
        out, lse = forward_kernel.flash_attention_triton(q, q, q, *options)
        backward_kernel.flash_attention_backward_triton(q, q, q, q, out, lse, *options, True)
    for kernel in recorded.values():
        assert len(kernel.compiled) == 1
        assert len(kernel.log) == 2
        assert all(len(args) == len(kernel.arg_names) for _, _, args in kernel.log)


def test_an_implementation_is_imported_when_it_is_called(monkeypatch):
    """On the device of its first tensor, which is made the current one unless it is."""
    calls, entered = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or nullcontext()
    )
    monkeypatch.setattr(
        torch.library, "impl", lambda op, kind, call: calls.append((op, kind, call))
    )
    device.implement_on_cuda("lowbit::some_op", "lowbit_kernels.no_such_module.some_function")
    ((op, kind, call),) = calls
    assert (op, kind) == ("lowbit::some_op", "cuda")
    x = SimpleNamespace(device=torch.device("cuda:1"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        call(x)
    assert entered == [x.device]
    with device.on_device(SimpleNamespace(device=torch.device("cuda:0"))):
        assert len(entered) == 1


def test_every_op_has_a_cuda_implementation_that_is_there():
    """Registered by name, so a wrong one would show on a GPU only."""
    names = []
    for path in Path(lowbit_kernels.__file__).parent.rglob("*_op.py"):
        names += re.findall(r'"(lowbit_kernels\.[\w.]+_triton)"', path.read_text())
    assert len(names) == 5
    for name in names:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))
