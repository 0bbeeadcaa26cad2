"""Our CPU kernels: compiled by the machine's C++ compiler on first use and kept in a cache.

They are needed for speed alone. Without a compiler every function has a slower path through oneDNN
and PyTorch's own operators, and one warning says so.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from ctypes import c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
COMPILERS = ("c++", "g++", "clang++")
# a compiler that takes longer hangs
COMPILE_SECONDS = 120
# below, memory is mostly reused and its pages are there already
LARGE_BYTES = 4 << 20


def _number(kind: str) -> Any:
    """The ctypes type of ``int64_t``, ``float`` and the like."""
    return getattr(ctypes, f"c_{kind.removesuffix('_t')}")


def _fields(header: str, name: str, **structs: type[ctypes.Structure]) -> list[tuple[str, Any]]:
    """The fields of a struct of csrc, as C++ declares them: ``const type* a; type b, c[3];``.

    Args:
        header: the file that declares the struct.
        name: of the struct.
        **structs: structs that are fields of it.
    """
    text = re.sub("//.*", "", (SOURCES / header).read_text("utf-8"))
    body = text.partition(f"struct {name} {{")[2].partition("};")[0]
    fields = []
    for kind, star, names in re.findall(r"(?:const )?(\w+)(\*?) ([^;]+);", body):
        plain = c_void_p if star else structs.get(kind) or _number(kind)
        for field, count in re.findall(r"(\w+)(?:\[(\d+)\])?", names):
            fields.append((field, plain * int(count) if count else plain))
    return fields


class Matmul(ctypes.Structure):
    """``struct Matmul`` of csrc/matmul.h."""

    _fields_ = _fields("matmul.h", "Matmul")


class PackedWeight(ctypes.Structure):
    """``struct PackedWeight`` of csrc/weight.h."""

    _fields_ = _fields("weight.h", "PackedWeight")


class Depthwise(ctypes.Structure):
    """``struct Depthwise`` of csrc/frames.h."""

    _fields_ = _fields("frames.h", "Depthwise")


class RowFinish(ctypes.Structure):
    """``struct RowFinish`` of csrc/rows.h."""

    _fields_ = _fields("rows.h", "RowFinish")


class FirstConv(ctypes.Structure):
    """``struct FirstConv`` of csrc/rows.h."""

    _fields_ = _fields("rows.h", "FirstConv")


class Attention(ctypes.Structure):
    """``struct Attention`` of csrc/attention.h."""

    _fields_ = _fields("attention.h", "Attention")


class AttentionGradient(ctypes.Structure):
    """``struct AttentionGradient`` of csrc/attention_backward.h."""

    _fields_ = _fields("attention_backward.h", "AttentionGradient", Attention=Attention)


class GroupNorm(ctypes.Structure):
    """``struct GroupNorm`` of csrc/norm.h."""

    _fields_ = _fields("norm.h", "GroupNorm")


class NormQuantize(ctypes.Structure):
    """``struct NormQuantize`` of csrc/norm.h."""

    _fields_ = _fields("norm.h", "NormQuantize")


def _argument(declaration: str) -> Any:
    """The ctypes type of an argument in csrc: a number, or a pointer to numbers or a struct."""
    kind, star, _ = declaration.partition("*")
    if not star:
        return _number(kind.split()[0])
    struct = globals().get(kind.split()[-1])  # the classes above are named as in C++
    return c_void_p if struct is None else ctypes.POINTER(struct)


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
    text = (SOURCES / "native.cpp").read_text("utf-8")
    for name, arguments in re.findall(r'extern "C" \w+ (\w+)\(([^)]*)\)', text):
        getattr(library, name).argtypes = [_argument(part) for part in arguments.split(",") if part]
    return library, ""


def _compiled(compiler: str) -> Path:
    """The shared library for these sources, this compiler and this processor."""
    sources = sorted(SOURCES.iterdir())
    key = hashlib.sha256("".join((compiler, *FLAGS, _processor())).encode())
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
