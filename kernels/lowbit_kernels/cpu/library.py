"""Our CPU kernels: compiled by the machine's C++ compiler on first use and kept in a cache.

They are needed for speed alone. Without a compiler every function has a slower path through oneDNN
and PyTorch's own operators, and one warning says so.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from ctypes import c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
COMPILERS = ("c++", "g++", "clang++")
# a compiler that takes longer hangs
COMPILE_SECONDS = 120
# below, memory is mostly reused and its pages are there already
LARGE_BYTES = 4 << 20


class Matmul(ctypes.Structure):
    """``struct Matmul`` of csrc/matmul.h, field by field."""

    _fields_ = (
        ("M", c_int64), ("N", c_int64), ("K", c_int64), ("groups", c_int64),
        ("a", c_void_p), ("a_stride", c_int64), ("a_group_stride", c_int64),
        ("row_scale", c_void_p), ("column_scale", c_void_p),
        ("scale", c_float), ("activation", c_int32),
        ("bias", c_void_p), ("residual", c_void_p), ("residual_stride", c_int64),
        ("out", c_void_p), ("out_stride", c_int64),
        ("largest", c_void_p), ("offset", c_void_p), ("threads", c_int64),
    )  # fmt: skip


class PackedWeight(ctypes.Structure):
    """``struct PackedWeight`` of csrc/weight.h."""

    _fields_ = (
        ("bytes", c_void_p), ("pitch", c_int64), ("bits", c_int64), ("asymmetric", c_int64),
        ("group_size", c_int64), ("scale_groups", c_int64),
        ("multiplier", c_void_p), ("zero", c_void_p),
    )  # fmt: skip


class Depthwise(ctypes.Structure):
    """``struct Depthwise`` of csrc/frames.h."""

    _fields_ = (
        ("valid", c_int64), ("channels", c_int64), ("out_frames", c_int64),
        ("taps", c_int64), ("stride", c_int64), ("padding", c_int64), ("dilation", c_int64),
        ("x", c_void_p), ("input_scale", c_void_p),
        ("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p),
        ("residual", c_void_p), ("activation", c_int32),
        ("out", c_void_p), ("threads", c_int64),
    )  # fmt: skip


class RowFinish(ctypes.Structure):
    """``struct RowFinish`` of csrc/rows.h."""

    _fields_ = (
        ("channels", c_int64), ("norm_weight", c_void_p), ("norm_bias", c_void_p),
        ("eps", c_float), ("activation", c_int32), ("offset", c_void_p),
        ("out", c_void_p), ("q", c_void_p), ("scale", c_void_p), ("largest", c_void_p),
        ("threads", c_int64),
    )  # fmt: skip


class FirstConv(ctypes.Structure):
    """``struct FirstConv`` of csrc/rows.h."""

    _fields_ = (
        ("frames", c_int64), ("taps", c_int64), ("stride", c_int64),
        ("x", c_void_p), ("weight", c_void_p), ("bias", c_void_p),
    )  # fmt: skip


class Attention(ctypes.Structure):
    """``struct Attention`` of csrc/attention.h."""

    _fields_ = (
        ("B", c_int64), ("H", c_int64), ("T", c_int64), ("D", c_int64),
        ("q", c_void_p), ("k", c_void_p), ("v", c_void_p),
        ("q_strides", c_int64 * 3), ("k_strides", c_int64 * 3), ("v_strides", c_int64 * 3),
        ("lengths", c_void_p), ("bias", c_void_p), ("bias_strides", c_int64 * 3),
        ("window", c_int64), ("scale", c_float), ("dropout", c_double), ("seed", c_uint64),
        ("out", c_void_p), ("lse", c_void_p), ("threads", c_int64),
    )  # fmt: skip


class AttentionGradient(ctypes.Structure):
    """``struct AttentionGradient`` of csrc/attention_backward.h."""

    _fields_ = (
        ("forward", Attention), ("grad_out", c_void_p), ("grad_strides", c_int64 * 3),
        ("delta", c_void_p), ("dq", c_void_p), ("dk", c_void_p), ("dv", c_void_p),
        ("dbias", c_void_p), ("bias_sizes", c_int64 * 2), ("dbias_strides", c_int64 * 4),
    )  # fmt: skip


class GroupNorm(ctypes.Structure):
    """``struct GroupNorm`` of csrc/norm.h."""

    _fields_ = (
        ("B", c_int64), ("C", c_int64), ("T", c_int64), ("groups", c_int64),
        ("x", c_void_p), ("x_strides", c_int64 * 2), ("lengths", c_void_p),
        ("weight", c_void_p), ("bias", c_void_p), ("eps", c_float),
        ("mean", c_void_p), ("rstd", c_void_p), ("out", c_void_p),
        ("grad", c_void_p), ("grad_strides", c_int64 * 2),
        ("dweight", c_void_p), ("dbias", c_void_p), ("threads", c_int64),
    )  # fmt: skip


class NormQuantize(ctypes.Structure):
    """``struct NormQuantize`` of csrc/norm.h."""

    _fields_ = (
        ("rows", c_int64), ("columns", c_int64), ("x", c_void_p), ("residual", c_void_p),
        ("weight", c_void_p), ("bias", c_void_p), ("eps", c_float),
        ("h", c_void_p), ("y", c_void_p), ("q", c_void_p), ("scale", c_void_p),
        ("mean", c_void_p), ("rstd", c_void_p), ("threads", c_int64),
    )  # fmt: skip


class ActivationQuantize(ctypes.Structure):
    """``struct ActivationQuantize`` of csrc/norm.h."""

    _fields_ = (
        ("rows", c_int64), ("columns", c_int64), ("x", c_void_p),
        ("activation", c_int32), ("glu", c_int32), ("static_scale", c_void_p),
        ("y", c_void_p), ("q", c_void_p), ("scale", c_void_p), ("threads", c_int64),
    )  # fmt: skip


SIGNATURES = {
    "has_int8_matmul": (),
    "advise_large_pages": (c_void_p, c_int64),
    "matmul_int8": (ctypes.POINTER(Matmul), c_void_p, c_void_p),
    "linear_int8": (ctypes.POINTER(Matmul), c_void_p, c_void_p),
    "matmul_float": (ctypes.POINTER(Matmul), ctypes.POINTER(PackedWeight)),
    "matmul_few_rows": (ctypes.POINTER(Matmul), ctypes.POINTER(PackedWeight)),
    "shared_scale": (c_void_p, c_int64, c_int64, c_void_p, c_int64),
    "quantize_frames": (
        c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_int64,
        c_void_p, c_void_p, c_void_p, c_int64,
    ),
    "depthwise": (ctypes.POINTER(Depthwise),),
    "attention": (ctypes.POINTER(Attention),),
    "attention_backward": (ctypes.POINTER(AttentionGradient),),
    "group_norm": (ctypes.POINTER(GroupNorm),),
    "norm_quantize": (ctypes.POINTER(NormQuantize),),
    "activation_quantize": (ctypes.POINTER(ActivationQuantize),),
    "first_conv": (ctypes.POINTER(FirstConv), ctypes.POINTER(RowFinish)),
    "finish_rows": (c_void_p, c_int64, ctypes.POINTER(RowFinish)),
    "glu": (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64),
}  # fmt: skip


def pointer(tensor: Tensor | None) -> int | None:
    """A tensor's address for ctypes; None stays a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def threads() -> int:
    """Threads of a kernel: as many as PyTorch's own operators use."""
    return torch.get_num_threads()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.empty, on large pages where it is large."""
    tensor = torch.empty(shape, dtype=dtype)
    library = native()
    if library is not None and tensor.nbytes >= LARGE_BYTES:
        library.advise_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def native() -> ctypes.CDLL | None:
    """The compiled kernels, or None, after one warning, where they cannot be had."""
    library, reason = _load()
    if library is None:
        _warn_once(reason)
    return library


def native_int8() -> ctypes.CDLL | None:
    """The compiled kernels where the processor has AVX512-VNNI; else None, and oneDNN serves."""
    library = native()
    return library if library is not None and library.has_int8_matmul() else None


def cpu_backend() -> str:
    """What runs the CPU operators on this machine, in words, for reports."""
    library, reason = _load()
    if library is None:
        return f"oneDNN and PyTorch operators ({reason})"
    return "native, int8 by " + ("AVX512-VNNI" if library.has_int8_matmul() else "oneDNN")


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.name != "posix":
        return None, f"compiled kernels need a POSIX system, this is {os.name}"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        return None, f"no C++ compiler: none of $CXX, {', '.join(COMPILERS)}"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} failed: {error.stderr.strip().splitlines()[:1]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{compiler}: {error}"
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library, ""


def _compiled(compiler: str) -> Path:
    """The shared library for these sources, this compiler and this processor."""
    sources = sorted(SOURCES.iterdir())
    key = hashlib.sha256()
    for part in (compiler, *FLAGS, _processor()):
        key.update(part.encode())
    for source in sources:
        key.update(source.read_bytes())
    folder = _cache_folder()
    path = folder / f"native-{key.hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "native.so"
            subprocess.run(
                [*shlex.split(compiler), *FLAGS, str(SOURCES / "native.cpp"), "-o", str(built)],
                check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS,
            )  # fmt: skip
            # renamed whole, so that a second process never loads half a file
            os.replace(built, path)
    return path


def _processor() -> str:
    """What ``-march=native`` depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path:
    """Where compiled kernels are kept; only its owner may write there: we run what it holds."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "lowbit_kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} must belong to this user and be writable by nobody else")
    return folder


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"lowbit_kernels runs its slower CPU path, through oneDNN and PyTorch: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
