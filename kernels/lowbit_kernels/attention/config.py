"""The tile of each attention kernel for a GPU's shared memory."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class TileConfig:
    """Sizes of a tile and how it is compiled: M queries, N keys, D head features."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def default_config(
    kernel: Literal["forward", "backward_dq", "backward_dkdv"],
    head_dim: int,
    element_size: int,
    shared_limit: int,
) -> TileConfig:
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    return TileConfig(32, 32, block_d, 4, 2)


def shared_limit(device: torch.device) -> int:
    if device.type == "cpu":
        return 101376
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def input_precision(dtype: torch.dtype) -> str | None:
    return "ieee" if dtype == torch.float32 else None
