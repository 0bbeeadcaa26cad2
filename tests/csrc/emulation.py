"""The CUDA C++ kernels on a CPU: kernels/csrc compiled with an emulator in place of PTX.

Dimension key: M rows of x, N output features, K input features.
"""

import ctypes
import os
import shutil
import subprocess
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from lowbit_kernels.matmul.csrc import EPILOGUES, aligned_rows

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "csrc"


class SmallM(ctypes.Structure):
    """``struct SmallM`` of kernels/csrc/tile.cuh, field by field."""

    _fields_ = (
        ("x", c_void_p), ("x_stride", c_int64),
        ("qweight", c_void_p), ("pitch", c_int),
        ("scale", c_void_p), ("group_scale", c_void_p),
        ("num_groups", c_int), ("group_shift", c_int),
        ("bias", c_void_p), ("residual", c_void_p), ("residual_stride", c_int64),
        ("y", c_void_p), ("parts", c_void_p),
        ("M", c_int), ("N", c_int), ("K", c_int), ("epilogue", c_int), ("splits", c_int),
    )  # fmt: skip


def build_emulator(folder, sources=SOURCES):
    """The compiled emulator of the kernels in ``sources``, or None without a compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    path = folder / "emulator.so"
    subprocess.run(
        [
            compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-I{HERE}", f"-I{sources}",
            str(HERE / "emulate.cpp"), "-o", str(path),
        ],
        check=True,
    )  # fmt: skip
    library = ctypes.CDLL(str(path))
    library.emulate_small_m.argtypes = [c_void_p, *[c_int] * 4, c_int64, c_int64]
    library.emulate_small_m.restype = c_char_p
    assert library.args_bytes() == ctypes.sizeof(SmallM)
    return library


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def _readable(tensor):
    """Bytes from a tensor's first element to the end of its memory."""
    return tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize


def emulate(library, x, weight, bias, residual, epilogue, config, *, eager=False):
    """y [M, N] of what ``linear_csrc`` launches.

    Args:
        eager: copies to shared memory take effect when they start, and the threads run last to
            first; else copies take effect when they are waited for, and the threads run in order.
    """
    x = aligned_rows(x[None])
    M, N, group = x.shape[0], weight.N, weight.spec.group
    y = torch.empty(M, N, dtype=x.dtype)
    parts = torch.empty(config.splits, M, N) if config.splits > 1 else None
    args = SmallM(
        _pointer(x), x.stride(0) if M > 1 else 0, _pointer(weight.qweight), weight.qweight.shape[1],
        _pointer(weight.scale), _pointer(weight.group_scale),
        weight.group_scale.shape[1] if group else 0, max(group.bit_length() - 1, 0),
        _pointer(bias), _pointer(residual), 0 if residual is None else residual.stride(0),
        _pointer(y), _pointer(parts),
        M, N, x.shape[1], EPILOGUES.index(epilogue), config.splits,
    )  # fmt: skip
    fault = library.emulate_small_m(
        ctypes.byref(args), config.block_m, config.warps_n, x.dtype == torch.bfloat16, eager,
        _readable(x), _readable(weight.qweight),
    )  # fmt: skip
    assert fault is None, f"{config}: {fault.decode()}"
    return y
