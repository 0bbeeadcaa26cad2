"""The device that a tensor is on, as dispatch sees it."""

import functools
from dataclasses import replace
from typing import Any

import torch
import triton

from lowbit_kernels.matmul.dispatch import Gpu, LinearConfig, byte_pairs

INTERPRETED_PAIRS = 1
INTERPRETED_SMS = 2


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Name, capability and limits of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    # AMD's properties lack the second limit: every program may use all of it
    shared = getattr(
        properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
    )
    return Gpu(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        shared,
        torch.version.hip is not None,
    )


def pairs_of(device: torch.device, kernel: Any) -> tuple[int, int]:
    """``byte_pairs`` of the device; and the same, or 0 where a kernel has no inline assembly.

    Triton's interpreter has none; its kernels have the structure of the first number all the same.
    """
    if not isinstance(kernel, triton.JITFunction):
        return INTERPRETED_PAIRS, 0
    pairs = byte_pairs(gpu_of(device))
    return pairs, pairs


def sms_of(device: torch.device, kernel: Any) -> int:
    """Multiprocessors of the device; two where a kernel is interpreted."""
    if not isinstance(kernel, triton.JITFunction):
        return INTERPRETED_SMS
    return gpu_of(device).num_sms


def taking_norm(config: LinearConfig, gpu: Gpu) -> LinearConfig:
    """The tile of a kernel that takes a norm of its input, too."""
    # of more steps in flight, Triton 3.6 makes nothing for AMD's GPUs
    return replace(config, num_stages=min(config.num_stages, 3)) if gpu.is_hip else config
