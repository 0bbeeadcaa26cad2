"""The packed format, version 1, byte by byte.

A weight is seen as ``[N, K]``: N output channels, K the reduction. A linear layer's K is
``in_features``; a convolution's is tap-major, ``weight.permute(0, 2, 1).reshape(N, taps * C_in)``
with C_in the input channels of one group, so that a channel-last strided convolution is a matmul
over an overlapping view of its input.

* A row is a run of 32-byte blocks, ``ceil(K * bits / 256)`` of them; ``qweight`` is uint8
  ``[N, 32 * blocks]``. A row's pitch is a multiple of 32 bytes whatever K is.
* A block holds ``256 / bits`` elements as ``8 / bits`` slices of 32. Byte j of block i holds
  element ``i * 256 / bits + 32 * u + j`` in its bits ``[u * bits, (u + 1) * bits)``, u the slice.
  A slice of 32 is one step of a matrix instruction and never straddles a scale group.
* Codes to levels: 4 bits ``c - 8``; 2 bits ``2 c - 3``, that is {-3, -1, 1, 3}; 1 bit ``2 c - 1``;
  8 bits two's complement in [-127, 127]. Asymmetric weights use the codes themselves.
* Codes past K are padding and decode to anything (1 and 2 bits have no zero): readers must zero the
  input there, never rely on the weight.
* A depthwise convolution (one input and one output channel a group) stores its levels unpacked,
  int8 ``[taps, N]``, channels contiguous.

Scales are described in ``weight.py::QuantizedWeight``.
"""

import torch
from torch import Tensor

FORMAT_VERSION = 1
BLOCK_BYTES = 32


def row_bytes(K: int, bits: int) -> int:
    """Bytes of one packed row of K weights."""
    return BLOCK_BYTES * -(-K * bits // (8 * BLOCK_BYTES))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [N, K] uint8 (8 bits: the two's complement byte) into qweight [N, row_bytes]."""
    N, K = codes.shape
    pitch = row_bytes(K, bits)
    slices = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, pitch * slices - K))
    parts = padded.view(N, pitch // BLOCK_BYTES, slices, BLOCK_BYTES)
    packed = torch.zeros_like(parts[:, :, 0])
    for u in range(slices):
        packed |= parts[:, :, u] << (u * bits)
    return packed.view(N, pitch)


def unpack(qweight: Tensor, K: int, bits: int) -> Tensor:
    """Codes [N, K] uint8 of a packed weight [N, row_bytes]."""
    N, pitch = qweight.shape
    blocks = qweight.view(N, pitch // BLOCK_BYTES, 1, BLOCK_BYTES)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=qweight.device).view(-1, 1)
    codes = (blocks >> shifts) & (2**bits - 1)  # [N, blocks, slices, 32]
    return codes.view(N, -1)[:, :K]  # type: ignore[no-any-return]


def to_levels(codes: Tensor, bits: int) -> Tensor:
    """Levels, int8, of codes, uint8; any shape."""
    if bits == 8:
        return codes.view(torch.int8)
    signed = codes.to(torch.int8)
    return signed - 8 if bits == 4 else 2 * signed - (2**bits - 1)


def to_codes(levels: Tensor, bits: int) -> Tensor:
    """Inverse of ``to_levels``."""
    if bits == 8:
        return levels.view(torch.uint8)
    return (levels + 8 if bits == 4 else (levels + (2**bits - 1)) // 2).to(torch.uint8)
