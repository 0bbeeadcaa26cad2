"""The resident int8 copy of a packed weight: made once, on first use, and dropped with the weight.

Dimension key: N output channels, K the reduction, both of one group; P panels of 48 channels.
"""

import threading
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.formats.packing import pack, to_codes

PANEL = 48
ZERO_POINT = 128


@dataclass(frozen=True)
class Resident:
    """A weight expanded to int8, in the order in which one kernel reads it.

    Args:
        layout: ``"native"``: panels int8 [groups, P, ceil(K / 4), 48, 4]; ``"onednn"``: oneDNN's
            own order, one [K, N] matrix a group; ``"float"``: the integers in fp32 [groups * N, K];
            ``"rows"``: packed at 8 bits, as ``formats/packing.py`` says, for a GPU.
        tensors: the copy. A native one is followed by int32 [groups, P * 48]: -128 times the sum
            of each channel, which cancels the input's zero point.
    """

    layout: str
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() if t.layout == torch.strided else t.numel()
                   for t in self.tensors)  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    resident: Resident
    groups: int
    state: tuple[object, ...]
    # inference tensors count no versions: their content is kept and compared
    copies: tuple[Tensor, ...]


_entries: MutableMapping[Tensor, _Entry] = WeakIdKeyDictionary()
_lock = threading.Lock()


def resident_int8(weight: QuantizedWeight, layout: str, groups: int = 1) -> Resident:
    """The int8 copy of a symmetric weight, made now unless it is there and still true.

    A copy is true while ``qweight`` and ``group_scale`` are the same tensors, unchanged.

    Args:
        weight: a symmetric weight, [groups * N, K].
        layout: as in ``Resident``.
        groups: convolution groups, whose channels never share a panel.
    """
    with _lock:
        entry = _entries.get(weight.qweight)
    if entry is not None and _is_true(entry, weight, layout, groups):
        return entry.resident
    parts = _parts(weight)
    state, copies = _state(parts), tuple(t.clone() for t in parts if t.is_inference())
    made = _expand(weight.integers(), layout, groups)
    with _lock:
        _entries[weight.qweight] = _Entry(made, groups, state, copies)
    return made


def resident_made(weight: QuantizedWeight, layout: str) -> Resident | None:
    """The copy that ``resident_int8`` would return without making it; None if there is none.

    It reads no tensor, so that it may be asked while a CUDA graph is captured: of tensors that
    count no versions it cannot know whether they changed, and has none.
    """
    with _lock:
        entry = _entries.get(weight.qweight)
    if entry is None or entry.copies or not _is_true(entry, weight, layout, 1):
        return None
    return entry.resident


def resident_bytes(qweight: Tensor) -> int:
    """Bytes of the int8 copy that ``qweight`` has now; 0 before its first use."""
    with _lock:
        entry = _entries.get(qweight)
    return 0 if entry is None else entry.resident.nbytes


def _parts(weight: QuantizedWeight) -> tuple[Tensor, ...]:
    qweight, group_scale = weight.qweight, weight.group_scale
    return (qweight,) if group_scale is None else (qweight, group_scale)


def _state(parts: tuple[Tensor, ...]) -> tuple[object, ...]:
    return tuple([
        (id(t), t.data_ptr(), t.shape, None if t.is_inference() else t._version) for t in parts
    ])  # fmt: skip


def _is_true(entry: _Entry, weight: QuantizedWeight, layout: str, groups: int) -> bool:
    parts = _parts(weight)
    if entry.state != _state(parts) or entry.groups != groups or entry.resident.layout != layout:
        return False
    if not entry.copies:
        return True
    untracked = [t for t in parts if t.is_inference()]
    return all(torch.equal(a, b) for a, b in zip(entry.copies, untracked, strict=True))


def _expand(integers: Tensor, layout: str, groups: int) -> Resident:
    if layout == "float":
        return Resident(layout, (integers.float(),))
    if layout == "rows":
        return Resident(layout, (pack(to_codes(integers, 8), 8),))
    per_group = integers.view(groups, -1, integers.shape[1])
    if layout == "onednn":
        packed = [torch.ops.onednn.qlinear_prepack(w.contiguous(), None) for w in per_group]
        return Resident(layout, tuple(packed))
    _, N, K = per_group.shape
    pad_n, pad_k = -N % PANEL, -K % 4
    padded = torch.nn.functional.pad(per_group, (0, pad_k, 0, pad_n))
    start = -ZERO_POINT * padded.sum(2, dtype=torch.int32)
    panels = padded.view(groups, (N + pad_n) // PANEL, PANEL, (K + pad_k) // 4, 4)
    return Resident(layout, (panels.transpose(2, 3).contiguous(), start))
