"""Which kernel, and which tiles, serve a shape: pure functions of numbers, tested without a GPU.

Dimension key: M rows of the input, N output features, K input features.
"""

from dataclasses import dataclass, replace

import torch

BACKENDS = ("fused", "dequant_cublas")

# from here on the weight is dequantized once and cuBLAS multiplies: the fused loop of plain Triton
# issues about as many cycles of unpacking as of matrix work, and a whole dequantized weight costs
# less than that when thousands of rows share it
DEQUANTIZE_FROM_M = 4096

# rows that a deterministic layer takes its tiles for, however many it gets: of a linear layer about
# ten seconds of an encoder's frames; of a front end's convolution so many that no sum is split,
# since a split sum's memory grows with the frames
DETERMINISTIC_ROWS = 512
DETERMINISTIC_FRAMES = 4096


@dataclass(frozen=True)
class LinearConfig:
    """Tile sizes of the fused kernel.

    Args:
        block_n: output features a tile.
        block_m: rows a tile.
        block_bytes: packed bytes a row and step; 32 below 8 bits.
        num_warps: warps a program.
        num_stages: steps in flight.
        splits: parts of the sum over K.
    """

    block_n: int
    block_m: int
    block_bytes: int = 32
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1


def choose_backend(
    M: int,
    inputs: str | None,
    dtype: torch.dtype,
    capability: tuple[int, int],
    deterministic: bool = False,
) -> str:
    """The backend that serves a linear layer on CUDA.

    Args:
        M: rows of the input.
        inputs: how the input is quantized, ``QuantSpec.inputs``.
        dtype: of the input.
        capability: of the device, as ``torch.cuda.get_device_capability`` gives it.
        deterministic: ``QuantSpec.deterministic``; the answer does not depend on M.

    Returns:
        ``"fused"``: the weight is unpacked in registers; ``"dequant_cublas"``: the weight is
        dequantized to memory, multiplied by cuBLAS, and one pass applies the rest.

    Raises:
        NotImplementedError: on a GPU older than the kernels serve; for a deterministic product of
            fp32, which is cuBLAS's.
    """
    if capability < (8, 0):
        raise NotImplementedError(
            f"low-bit kernels serve GPUs of capability 8.0 (A100) and later, got {capability}"
        )
    if inputs is not None:
        return "fused"
    if deterministic:
        if dtype == torch.float32:
            raise NotImplementedError(
                "deterministic=True serves fp16 and bf16 on CUDA, and fp32 with inputs='int8' and "
                "without gradients, got float32 (cuBLAS multiplies it, in an order that depends on "
                "the batch): call model.half(), or quantize with inputs='int8'"
            )
        return "fused"
    # the matrix units take fp32 as TF32 or not at all: that is torch's setting, so torch's product
    if dtype == torch.float32 or M >= DEQUANTIZE_FROM_M:
        return "dequant_cublas"
    return "fused"


# rows up to, tile: wgmma wants 64 features, 4 warps or a multiple, and 16 rows or more; few rows
# mean few programs, so small tiles share them among more multiprocessors
_TILES = (
    (16, LinearConfig(block_n=64, block_m=16, num_stages=4)),
    (64, LinearConfig(block_n=64, block_m=64, num_stages=4)),
    (512, LinearConfig(block_n=128, block_m=64, num_stages=4)),
)
_LARGEST = LinearConfig(block_n=128, block_m=128, num_warps=8, num_stages=3)


def planned_rows(M: int, deterministic: bool, typical: int = DETERMINISTIC_ROWS) -> int:
    """The rows to choose tiles for: M, or the typical number where bits must not depend on M."""
    return typical if deterministic else max(M, 1)


def choose_config(
    M: int, N: int, K: int, bits: int, itemsize: int, num_sms: int, shared_bytes: int
) -> LinearConfig:
    """Tiles of the fused kernel for a shape.

    Args:
        M: rows of the input, at least 1.
        N: output features.
        K: input features.
        bits: bits a weight.
        itemsize: bytes an element of the input, 1 for int8.
        num_sms: multiprocessors of the device.
        shared_bytes: shared memory that one program may use.
    """
    config = next((config for limit, config in _TILES if limit >= M), _LARGEST)
    if bits == 8:
        # nothing to unpack: longer steps cost no registers
        config = replace(config, block_bytes=64)
    # below 4 bits a step is a long run of x
    while _shared_bytes(config, bits, itemsize) > shared_bytes:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        else:
            config = replace(config, block_m=config.block_m // 2)
    tiles = -(-N // config.block_n) * -(-M // config.block_m)
    steps = -(-K * bits // (8 * config.block_bytes))
    # a part has at least 4 steps, so that its loads overlap its arithmetic
    splits = max(1, min(num_sms // tiles, steps // 4, 8))
    return replace(config, splits=splits)


def _shared_bytes(config: LinearConfig, bits: int, itemsize: int) -> int:
    """An upper bound: every stage holds its packed bytes and its part of x."""
    columns = config.block_bytes * 8 // bits
    step = config.block_n * config.block_bytes + config.block_m * columns * itemsize
    return config.num_stages * step
