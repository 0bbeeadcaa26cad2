"""Frames on disk, [T, D] float32, written piece by piece: T is known only at the end.

Both formats begin with a header of text that may be padded, so a header of fixed size is left free,
the frames follow as they come, and the header is filled in last.

Dimension key: T frames, D features.
"""

import json
import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FORMATS = ("safetensors", "npy")
_HEADER_BYTES = 256
_NPY_MAGIC = b"\x93NUMPY\x01\x00"


class FramesWriter:
    """Writes one file; nothing stands under its name before ``finish``.

    Args:
        path: ends in ``.safetensors`` (one tensor, ``frames``) or ``.npy``.
        seconds_per_frame: noted in the header of a safetensors file.
    """

    def __init__(self, path: Path, seconds_per_frame: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # one fixed name, so that what a killed run left is overwritten by the next
        self.path, self.temporary = path, path.with_name(f".{path.name}.part")
        self.file = self.temporary.open("wb")
        self.file.write(bytes(_HEADER_BYTES))
        self.seconds_per_frame = seconds_per_frame
        self.T, self.D = 0, 0

    def write(self, frames: NDArray[np.float32]) -> None:
        """Append frames [T, D]."""
        self.D = frames.shape[1]
        self.T += len(frames)
        try:
            self.file.write(np.ascontiguousarray(frames, "<f4").tobytes())
        except OSError as error:  # a full disk, which names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def finish(self) -> int:
        """Write the header and give the file its name.

        Returns:
            The number of frames.
        """
        self.file.seek(0)
        self.file.write(self._header())
        self.file.close()
        os.replace(self.temporary, self.path)
        return self.T

    def discard(self) -> None:
        """Remove what was written."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def _header(self) -> bytes:
        if self.path.suffix == ".npy":
            about = {"descr": "<f4", "fortran_order": False, "shape": (self.T, self.D)}
            room = _HEADER_BYTES - len(_NPY_MAGIC) - 2
            text = repr(about).ljust(room - 1) + "\n"
            return _NPY_MAGIC + struct.pack("<H", room) + text.encode()
        entry = {
            "dtype": "F32",
            "shape": [self.T, self.D],
            "data_offsets": [0, 4 * self.T * self.D],
        }
        notes = {"format": "pt", "seconds_per_frame": f"{self.seconds_per_frame:g}"}
        room = _HEADER_BYTES - 8
        text = json.dumps({"__metadata__": notes, "frames": entry}).ljust(room)
        return struct.pack("<Q", room) + text.encode()


def read_shape(path: Path) -> tuple[int, int]:
    """The shape (T, D) of a complete frames file.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is not whole.
    """
    if path.suffix == ".npy":
        T, D = np.load(path, mmap_mode="r", allow_pickle=False).shape
        return T, D
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            T, D = file.get_slice("frames").get_shape()
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    return T, D
