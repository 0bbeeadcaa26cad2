"""A SHA-256 over the tensors of a transformers checkpoint, kept in its files' metadata.

It covers dtype, shape and bytes of every tensor as it is stored, and no name: on the way to the
file transformers renames and unties tensors, and cuts the file into shards.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

KEY = "lowbit_sha256"
_log = logging.getLogger("lowbit_kernels")


def checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over tensors in any order; one that comes twice counts once."""
    digests = set()
    for tensor in tensors:
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests.add(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def check_files(files: Sequence[Path]) -> int:
    """Compare the tensors of a checkpoint with the checksum in its files; warn if it has none.

    Args:
        files: every file of the checkpoint.

    Returns:
        How many tensors it holds.

    Raises:
        ValueError: naming the file and the reason: not safetensors, truncated, or changed.
    """
    found = {file: read_header(file) for file in files}
    wanted = {expected for expected, _ in found.values() if expected is not None}
    names = ", ".join(map(str, files))
    if not wanted:
        _log.warning("%s: holds no checksum, so a change of it cannot be seen; save it anew", names)
    # a shard without the checksum leaves its tensors out of the sum
    elif wanted != {checksum(_tensors(file for file, entry in found.items() if entry[0]))}:
        raise ValueError(f"{names}: changed, the SHA-256 of its tensors does not match")
    return sum(count for _, count in found.values())


def read_header(file: Path) -> tuple[str | None, int]:
    """The checksum that a file's metadata holds, and how many tensors the file holds.

    Raises:
        ValueError: naming the file and the reason: not safetensors, missing, truncated.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: not a safetensors file")
    if not file.is_file():
        raise ValueError(f"{file}: not found")
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get(KEY), len(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or not a safetensors file ({error})") from None


def _tensors(files: Iterable[Path]) -> Iterator[Tensor]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                yield opened.get_tensor(name)
