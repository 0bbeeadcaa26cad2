"""Which tile each attention kernel uses, chosen by compiling for every supported GPU.

Dimension key: D head dimension; M queries and N keys of a tile.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

Kernel = Literal["forward", "backward_dq", "backward_dkdv", "offsets", "low_bit", "low_bit_delta"]


@dataclass(frozen=True)
class TileConfig:
    """The sizes of a tile and how it is compiled."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


# below this much shared memory (sm_89, sm_120, gfx942) the large tiles do not fit
LARGE_TILE_SHARED_BYTES = 160 * 1024
# of sm_90 and later, whose matrix units read both operands there
WGMMA_SHARED_BYTES = 200 * 1024

# by kernel and the largest padded D: block_m, block_n, num_warps, num_stages
_LARGE = {
    "forward": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    "backward_dq": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    "backward_dkdv": {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (16, 32, 8, 2)},
}
# a bias's addresses and dropout's random numbers take the registers that a large tile needs
_SMALL = {
    "forward": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (64, 16, 8, 2)},
    "backward_dq": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
    "backward_dkdv": {64: (16, 64, 8, 1), 128: (32, 32, 8, 2), 256: (16, 32, 8, 2)},
}
# fp32 multiplies on the vector units: operands come through registers, not matrix fragments
_FP32 = {
    "forward": {64: (32, 32, 8, 2), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    "backward_dq": {64: (32, 16, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 4, 1)},
    "backward_dkdv": {64: (16, 32, 8, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
}
# of tables of offsets, as many queries as keys: block, num_warps, num_stages
_RELATIVE_LARGE = {
    "forward": {64: (64, 4, 2), 128: (64, 4, 1), 256: (32, 4, 1)},
    "backward_dq": {64: (64, 8, 2), 128: (32, 4, 2), 256: (32, 8, 1)},
    "backward_dkdv": {64: (64, 4, 2), 128: (32, 8, 2), 256: (16, 4, 1)},
    "offsets": {64: (64, 8, 2), 128: (32, 4, 2), 256: (32, 8, 1)},
}
_RELATIVE_SMALL = {
    "forward": {64: (32, 4, 2), 128: (32, 4, 2), 256: (32, 4, 1)},
    "backward_dq": {64: (32, 4, 2), 128: (32, 8, 1), 256: (32, 8, 1)},
    "backward_dkdv": {64: (32, 4, 2), 128: (32, 8, 2), 256: (16, 4, 1)},
    "offsets": {64: (32, 8, 2), 128: (32, 4, 2), 256: (32, 8, 1)},
}
_RELATIVE_SMALLEST = {
    "forward": {64: (32, 4, 2), 128: (32, 4, 2), 256: (16, 4, 1)},
    "backward_dq": {64: (32, 4, 2), 128: (16, 4, 1), 256: (16, 4, 1)},
    "backward_dkdv": {64: (32, 4, 2), 128: (16, 4, 1), 256: (16, 4, 1)},
    "offsets": dict.fromkeys((64, 128, 256), (16, 4, 1)),
}
_RELATIVE_FP32 = {
    "forward": {64: (32, 16, 1), 128: (16, 8, 1), 256: (16, 16, 1)},
    "backward_dq": {64: (16, 4, 1), 128: (16, 8, 1), 256: (16, 8, 1)},
    "backward_dkdv": {64: (32, 8, 1), 128: (16, 8, 1), 256: (16, 8, 1)},
    "offsets": {64: (16, 4, 1), 128: (16, 8, 1), 256: (16, 8, 1)},
}
_RELATIVE_SMALLEST_FP32 = {
    kernel: dict.fromkeys((64, 128, 256), (16, 4, 1)) for kernel in _RELATIVE_FP32
}
# operands of fp32 come through registers, which the gradients of larger heads overflow
MAX_FP32_HEAD_DIM = 64
# of 16 bits likewise the forward's, where places in a table of offsets are clipped in its tiles
MAX_CLIPPED_HEAD_DIM = 128
# AMD's 64 KB and 64-lane warps: kernels spill with the tiles above
SMALLEST_SHARED_BYTES = 80 * 1024
_SMALLEST = _SMALL | {
    "forward": _SMALL["forward"] | {64: (64, 32, 4, 1)},
    "backward_dq": _SMALL["backward_dq"] | {64: (64, 32, 4, 1), 128: (32, 16, 4, 1)},
    "backward_dkdv": _SMALL["backward_dkdv"] | {128: (16, 32, 4, 1)},
}
_SMALLEST_FP32 = _FP32 | {
    "backward_dq": _FP32["backward_dq"] | {64: (16, 16, 4, 1)},
    "backward_dkdv": _FP32["backward_dkdv"] | {64: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
}


def default_config(
    kernel: Kernel,
    head_dim: int,
    dtype: torch.dtype,
    kind: str | None,
    has_dropout: bool,
    shared_bytes: int,
) -> TileConfig:
    """The tile for a problem on a GPU.

    Args:
        kernel: which kernel.
        head_dim: D, at most 256.
        dtype: of q, k and v.
        kind: of the position scheme, see ``position.Scheme``.
        has_dropout: whether weights are dropped.
        shared_bytes: the shared memory that one program may use.
    """
    is_fp32 = dtype == torch.float32
    if kernel in ("low_bit", "low_bit_delta"):
        takes_less = is_fp32 and (kernel == "low_bit_delta" or kind == "relative")
        kernel = "backward_dq" if takes_less else "forward"
    # tl.dot takes powers of two, 16 at least
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    if kind == "relative" or kernel == "offsets":
        relative = _relative_tiles(is_fp32, has_dropout, shared_bytes)
        block, num_warps, num_stages = relative[kernel][max(64, block_d)]
        return TileConfig(block, block, block_d, num_warps, num_stages)
    extra_terms = kind is not None or has_dropout
    if shared_bytes < SMALLEST_SHARED_BYTES:
        table = _SMALLEST_FP32 if is_fp32 else _SMALLEST
    elif is_fp32:
        table = _FP32
    elif extra_terms or shared_bytes < LARGE_TILE_SHARED_BYTES:
        table = _SMALL
    else:
        table = _LARGE
    block_m, block_n, num_warps, num_stages = table[kernel][max(64, block_d)]
    return TileConfig(block_m, block_n, block_d, num_warps, num_stages)


def clips_offsets(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the forward takes a table of clipped offsets as it is, without one of all offsets."""
    return head_dim <= (MAX_FP32_HEAD_DIM if dtype == torch.float32 else MAX_CLIPPED_HEAD_DIM)


def _relative_tiles(
    is_fp32: bool, has_dropout: bool, shared_bytes: int
) -> dict[str, dict[int, tuple[int, int, int]]]:
    if shared_bytes < SMALLEST_SHARED_BYTES:
        return _RELATIVE_SMALLEST_FP32 if is_fp32 else _RELATIVE_SMALLEST
    if is_fp32:
        return _RELATIVE_FP32
    # large tiles spill where wgmma does not take operands from shared memory
    is_small = has_dropout or shared_bytes < WGMMA_SHARED_BYTES
    return _RELATIVE_SMALL if is_small else _RELATIVE_LARGE


def shared_bytes(device: torch.device) -> int:
    """The shared memory that one program may use on a device."""
    if device.type == "cpu":  # Triton's interpreter
        return 99 * 1024
    if torch.version.hip is not None:
        return 64 * 1024
    # torch's type stubs lack the field
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def input_precision(dtype: torch.dtype) -> str | None:
    """Of ``tl.dot``: exact products for fp32, whose default is TF32."""
    return "ieee" if dtype == torch.float32 else None
