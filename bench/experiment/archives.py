"""Real weights in other programs' files: tensors by name.

Only numbers are read: nothing in a file is run.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HAMA_MAGIC, HAMA_VERSION = b"HAMAPK", b"\x01\x02"
_HAMA_TYPES = {0: np.float32, 1: np.float16}
_HAMA_ALIGNMENT = 16
# of CTranslate2's binary files
CT2_VERSION, CT2_SPEC = 6, "WhisperSpec"
_CT2_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class _Reader:
    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.place = data, path, 0

    def take(self, form: str) -> tuple[int, ...]:
        """Numbers of ``struct``'s form, little endian."""
        try:
            found = struct.unpack_from(f"<{form}", self.data, self.place)
        except struct.error:
            raise ValueError(f"{self.path} must be whole, got {len(self.data)} bytes") from None
        self.place += struct.calcsize(f"<{form}")
        return found

    def text(self) -> str:
        """A string after its length."""
        (count,) = self.take("H")
        raw = self.data[self.place : self.place + count]
        self.place += count
        return raw.rstrip(b"\0").decode()

    def array(self, kind: Any, dims: tuple[int, ...], start: int) -> Tensor:
        """Numbers from ``start`` on, floats as float32."""
        count = int(np.prod(dims, dtype=np.int64))
        end = start + count * np.dtype(kind).itemsize
        if end > len(self.data):
            raise ValueError(f"{self.path} must be whole, got {len(self.data)} bytes of {end}")
        found = np.frombuffer(self.data[start:end], kind).reshape(dims)
        return torch.from_numpy(found.astype(np.float32 if found.dtype.kind == "f" else kind))


def read_hama(path: Path) -> dict[str, Tensor]:
    """The tensors of an archive of the package hama, in the file's order.

    Raises:
        ValueError: for another file, or half of one.
    """
    reader = _Reader(path.read_bytes(), path)
    start = HAMA_MAGIC + HAMA_VERSION
    if not reader.data.startswith(start):
        raise ValueError(f"{path} must begin with {start!r}, got {reader.data[:8]!r}")
    reader.place = len(start)
    (count,) = reader.take("I")
    entries = []
    for _ in range(count):
        name = reader.text()
        kind, rank = reader.take("BB")
        dims = reader.take(f"{rank}I")
        offset, _size = reader.take("QQ")
        entries.append((name, kind, dims, offset))
    base = -(-reader.place // _HAMA_ALIGNMENT) * _HAMA_ALIGNMENT
    return {
        name: reader.array(_HAMA_TYPES[kind], dims, base + offset)
        for name, kind, dims, offset in entries
    }


def read_ct2(parts: list[Path]) -> dict[str, Tensor]:
    """The variables of a Whisper model of CTranslate2, perhaps in several parts.

    Raises:
        ValueError: for another file, or half of one.
    """
    reader = _Reader(b"".join(part.read_bytes() for part in parts), parts[0])
    (version,), name = reader.take("I"), reader.text()
    if (version, name) != (CT2_VERSION, CT2_SPEC):
        raise ValueError(
            f"{parts[0]} must be a {CT2_SPEC} of version {CT2_VERSION}, got {name!r}, {version}"
        )
    _revision, count = reader.take("II")
    found = {}
    for _ in range(count):
        name = reader.text()
        (rank,) = reader.take("B")
        dims = reader.take(f"{rank}I")
        kind, size = reader.take("BI")
        found[name] = reader.array(_CT2_TYPES[kind], dims, reader.place)
        reader.place += size
    return found
