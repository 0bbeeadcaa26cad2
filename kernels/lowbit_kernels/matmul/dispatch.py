"""Which kernel, and which tiles, serve a shape: pure functions of numbers, tested without a GPU.

Dimension key: M rows of the input, N output features, K input features.
"""

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch

from lowbit_kernels.matmul.csrc import CsrcConfig
from lowbit_kernels.matmul.reference import num_stats_tiles
from lowbit_kernels.matmul.tuned import Layer, tuned_choice

BACKENDS = ("fused", "dequant_cublas", "resident_int8", "csrc")

# from here on, where nothing follows the product, the weight is dequantized once and cuBLAS
# multiplies: a whole dequantized weight costs less than 2 % of a product with thousands of rows.
# With an activation or a residual the fused kernel saves a pass over the output, which costs a
# third of the product's own time at K = 1024
DEQUANTIZE_FROM_M = 4096

# a gradient's weight passes through shared memory on its way to the matrix unit, which leaves the
# fused loop about three quarters of its rate: a dequantized weight is worth its bytes sooner
DEQUANTIZE_DX_FROM_M = 1024

# of an H100: what one multiprocessor multiplies, operands of one byte; what the L2 cache moves; and
# a second launch, which adds the parts of a sum. They only compare tiles with each other
MACS_PER_CYCLE = 4096
L2_BYTES_PER_CYCLE = 2500
SPLIT_CYCLES = 1500

# rows that a deterministic layer takes its tiles for, however many it gets: ten seconds of frames
DETERMINISTIC_ROWS = 512


@dataclass(frozen=True)
class Gpu:
    """What dispatch knows of a device.

    Args:
        name: as the driver says it.
        capability: as ``torch.cuda.get_device_capability`` gives it.
        num_sms: multiprocessors.
        shared_bytes: shared memory that one program may use.
        is_hip: whether it is AMD's.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_bytes: int
    is_hip: bool = False


@dataclass(frozen=True)
class LinearConfig:
    """Tile sizes of the fused kernel.

    Args:
        block_n: output features a tile.
        block_m: rows a tile.
        num_warps: warps a program.
        num_stages: steps in flight.
        splits: parts of the sum over K.
        unroll: blocks of packed bytes a step.
        max_registers: of a thread; None leaves it to the compiler.
        early_start: programmatic dependent launch, of capability 9.0 and later: programs start
            while the kernel ahead ends, fetch their weights into L2 and wait for it.
        persistent: programs stay for several tiles, and the tensor memory accelerator of capability
            9.0 copies x. Inputs that it cannot copy are served without, with the same result.
    """

    block_n: int
    block_m: int
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1
    unroll: int = 1
    max_registers: int | None = None
    early_start: bool = False
    persistent: bool = False

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options | {"launch_pdl": True} if self.early_start else options


def bytes_per_part(bits: int, itemsize: int) -> int:
    """Packed bytes a row that the fused kernel reads at a time, for inputs of ``itemsize`` bytes.

    Those of the format's block; of 8-bit weights and inputs 128, the most that the matrix unit
    reads at once: int8 goes to it as it is.
    """
    return 128 if bits == 8 and itemsize == 1 else 32


def parts_per_dot(bits: int, itemsize: int, pairs: int) -> int:
    """Runs of ``bytes_per_part`` weights that the fused kernel multiplies at once.

    Two for ``wgmma`` (``pairs`` of 1, as of ``byte_pairs``), which reads x from shared memory in
    its own order; int8 weights that need no unpacking are one long run.
    """
    return 2 if pairs == 1 and not (bits == 8 and itemsize == 1) else 1


def weights_per_block(bits: int, itemsize: int, pairs: int) -> int:
    """Weights a row of a block of the fused kernel; ``pairs`` as of ``byte_pairs``."""
    if bits < 8:
        return 32 * 8 // bits
    return bytes_per_part(bits, itemsize) * parts_per_dot(bits, itemsize, pairs)


def byte_pairs(gpu: Gpu) -> int:
    """Pairs of packed bytes that one register holds in the matrix unit's order.

    Returns:
        1 for ``wgmma``, 2 for ``mma.sync``; 0 where there is no PTX.
    """
    if gpu.is_hip:
        return 0
    return 1 if gpu.capability[0] == 9 else 2


def choose_backend(
    M: int,
    inputs: str | None,
    dtype: torch.dtype,
    capability: tuple[int, int],
    deterministic: bool = False,
    is_plain: bool = True,
) -> str:
    """The backend that serves a linear layer on CUDA where no measurement names another.

    Args:
        M, dtype: rows and dtype of the input.
        inputs, deterministic: of the ``QuantSpec``; if deterministic the answer ignores M.
        capability: of the device, as ``torch.cuda.get_device_capability`` gives it.
        is_plain: whether neither an activation nor a residual follows.

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
    if dtype == torch.float32 or (is_plain and M >= DEQUANTIZE_FROM_M):
        return "dequant_cublas"
    return "fused"


def choose_dx_backend(
    M: int, dtype: torch.dtype, capability: tuple[int, int], deterministic: bool
) -> str:
    """The backend of the gradient of a layer's input; as ``choose_backend``."""
    backend = choose_backend(M, None, dtype, capability, deterministic)
    return "dequant_cublas" if M >= DEQUANTIZE_DX_FROM_M and not deterministic else backend


@dataclass(frozen=True)
class _Tile:
    """A tile, and the share of the matrix unit's rate that its loop allows.

    The share is read off the disassembly (``python -m bench static``), with something taken off
    where only one program fits on a multiprocessor and nothing fills its waits.
    """

    config: LinearConfig
    share: float
    max_rows: int | None = None


_HOPPER = (
    _Tile(LinearConfig(128, 256, num_warps=8, num_stages=3), 1.0),
    _Tile(LinearConfig(128, 128, num_warps=8, num_stages=4, max_registers=128), 0.9),
    _Tile(LinearConfig(64, 128, num_stages=4), 0.8),
    _Tile(LinearConfig(64, 64, num_stages=4), 0.6),
    _Tile(LinearConfig(64, 32, num_stages=4), 0.38, max_rows=32),
    _Tile(LinearConfig(64, 16, num_stages=4), 0.2, max_rows=16),
    _Tile(LinearConfig(128, 16, num_stages=4, unroll=2), 0.26, max_rows=16),
)
_OTHERS = (
    _Tile(LinearConfig(128, 128, num_warps=8, num_stages=3), 0.8),
    _Tile(LinearConfig(128, 64, num_stages=4), 0.7),
    _Tile(LinearConfig(64, 64, num_stages=4), 0.6),
    _Tile(LinearConfig(64, 32, num_stages=4), 0.38, max_rows=32),
    _Tile(LinearConfig(64, 16, num_stages=4), 0.2, max_rows=16),
)


def planned_rows(M: int, deterministic: bool, typical: int = DETERMINISTIC_ROWS) -> int:
    """The rows to choose tiles for: M, or the typical number where bits must not depend on M."""
    return typical if deterministic else max(M, 1)


@functools.lru_cache(maxsize=4096)
def choose_config(
    M: int, N: int, K: int, bits: int, itemsize: int, gpu: Gpu, groups: int = 1
) -> LinearConfig:
    """Tiles of the fused kernel for a shape: those whose busiest multiprocessor is done first.

    Args:
        M: rows of the input, at least 1.
        N, K: output and input features.
        bits: bits a weight.
        itemsize: bytes an element of the input, 1 for int8 and fp8.
        gpu: the device.
        groups: products of these sizes in one launch.
    """
    return min(_fitted(M, N, K, bits, itemsize, gpu, groups), key=lambda config: config[1])[0]


def candidates(
    M: int, N: int, K: int, bits: int, itemsize: int, gpu: Gpu, groups: int = 1
) -> list[LinearConfig]:
    """Tiles worth measuring for a shape, the default first; arguments as of ``choose_config``."""
    found = {choose_config(M, N, K, bits, itemsize, gpu, groups): None}
    for config, _ in _fitted(M, N, K, bits, itemsize, gpu, groups):
        steps = -(-K // _weights_per_step(config, bits, itemsize, gpu))
        most = min(steps, 2 * config.splits)
        found |= {replace(config, splits=s): None for s in (1, 2, 4, 8, 16) if s <= most}
        found[replace(config, num_stages=max(2, config.num_stages - 1))] = None
        # programs stay with wgmma alone, and only where each has more than one tile to do
        is_whole = groups == 1 and config.splits == 1
        if is_whole and byte_pairs(gpu) == 1 and _tiles(config, M, N) > gpu.num_sms:
            found[replace(config, persistent=True)] = None
    if gpu.capability >= (9, 0) and not gpu.is_hip:
        found[replace(next(iter(found)), early_start=True)] = None
    return list(found)


def _fitted(
    M: int, N: int, K: int, bits: int, itemsize: int, gpu: Gpu, groups: int = 1
) -> Iterator[tuple[LinearConfig, float]]:
    """Every tile that serves a shape, and the cycles until its busiest multiprocessor is done."""
    for tile in _HOPPER if gpu.capability[0] == 9 and not gpu.is_hip else _OTHERS:
        if tile.max_rows is not None and tile.max_rows < M:
            continue
        # for sm_100 Triton 3.6 gives each product of a block sums of its own in tensor memory; a
        # kernel that has too many becomes a trap, or nothing at all, without a word
        if gpu.capability[0] == 10 and bits < 4 and tile.config.block_n > 64:
            continue
        config = _fit(tile.config, K, bits, itemsize, gpu)
        if groups > 1:
            # what is left of a multiprocessor's memory is the cache that windows overlap in
            config = replace(config, num_stages=min(config.num_stages, 3))
        weights = _weights_per_step(config, bits, itemsize, gpu)
        steps = -(-K // weights)
        tiles = _tiles(config, M, N) * groups
        config = replace(config, splits=_splits(config, tiles, steps, gpu))
        programs = tiles * config.splits
        # its part of the steps, and about two more to fill the pipeline and write the tile
        work = (steps / config.splits + 2) * weights * config.block_n * config.block_m
        cycles = -(-programs // gpu.num_sms) * work / tile.share / (MACS_PER_CYCLE / itemsize)
        if config.splits > 1:
            cycles += SPLIT_CYCLES + config.splits * M * N * groups * 8 / L2_BYTES_PER_CYCLE
        yield config, cycles


def _fit(config: LinearConfig, K: int, bits: int, itemsize: int, gpu: Gpu) -> LinearConfig:
    """The config, made to fit a multiprocessor's memory, and its registers without a limit."""
    while _shared_bytes(config, bits, itemsize, gpu) > gpu.shared_bytes:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        else:
            config = replace(config, block_m=config.block_m // 2)
    # where two programs do not share a multiprocessor, kernels would spill for nothing
    is_even = K % _weights_per_step(config, bits, itemsize, gpu) == 0
    fits = bits == 4 and itemsize == 2 and is_even and not gpu.is_hip
    return config if fits else replace(config, max_registers=None)


def _splits(config: LinearConfig, tiles: int, steps: int, gpu: Gpu) -> int:
    """Parts of the sum over K: as many as there are multiprocessors left, with a few steps each."""
    # a few rows are a matter of latency: more and shorter programs, whose sums are small
    programs, least, most = (2, 2, 16) if config.block_m <= 32 else (1, 4, 8)
    free = programs * gpu.num_sms // tiles
    return max(1, min(free, steps // least, most))


def _tiles(config: LinearConfig, M: int, N: int) -> int:
    return -(-N // config.block_n) * -(-M // config.block_m)


def _weights_per_step(config: LinearConfig, bits: int, itemsize: int, gpu: Gpu) -> int:
    return config.unroll * weights_per_block(bits, itemsize, byte_pairs(gpu))


def _shared_bytes(config: LinearConfig, bits: int, itemsize: int, gpu: Gpu) -> int:
    """An upper bound: every stage holds its packed bytes and its part of x."""
    weights = _weights_per_step(config, bits, itemsize, gpu)
    step = config.block_n * weights * bits // 8 + config.block_m * weights * itemsize
    return config.num_stages * step


@dataclass(frozen=True)
class DxConfig:
    """Tile of the gradient kernel: rows, packed bytes a weight row, warps."""

    block_m: int
    block_bytes: int
    num_warps: int


def stats_tiles_padded(num_features: int) -> int:
    """Tiles of rows' statistics, up to a power of two, as kernels read them."""
    return 1 << (num_stats_tiles(num_features) - 1).bit_length()


def choose_dx_config(M: int, bits: int, symmetric: bool, deterministic: bool) -> DxConfig:
    """Tile of the gradient of x [M, K]: 128 columns of it, 64 of few rows, 256 at 1 bit."""
    if M <= 32 and not deterministic:
        return DxConfig(32, max(32, 8 * bits), num_warps=4)
    # more rows would spill on sm_80
    return DxConfig(128 if bits > 1 and symmetric else 64, max(32, 16 * bits), num_warps=8)


@dataclass(frozen=True)
class Choice:
    """A backend and the tiles of its kernel; None for ``"dequant_cublas"``, which has none."""

    backend: str
    config: LinearConfig | CsrcConfig | None = None


def measured(
    M: int, layer: Layer, dtype: torch.dtype, gpu: Gpu, barred: Collection[str]
) -> Choice | None:
    """What a device's table names for a layer; None where it names nothing, or what is barred."""
    found = tuned_choice(gpu.name, M, layer)
    # tables are of 16-bit products: fp32 is torch's
    if found is None or found[0] in barred or (dtype == torch.float32 and layer.inputs is None):
        return None
    backend, tiles = found
    kind = CsrcConfig if backend == "csrc" else LinearConfig
    return Choice(backend, None if tiles is None else kind(**tiles))


@functools.lru_cache(maxsize=4096)
def choose_linear(
    M: int,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    inputs: str | None,
    dtype: torch.dtype,
    is_plain: bool,
    deterministic: bool,
    gpu: Gpu,
    can_csrc: bool = False,
) -> Choice:
    """Backend and tiles of a linear layer: measured ones if the device has a table, else defaults.

    Args:
        M, N, K: rows of the input, output features, input features.
        bits, group_size, inputs, deterministic: of the weight's ``QuantSpec``.
        dtype: of the input.
        is_plain: whether neither an activation nor a residual follows.
        gpu: the device.
        can_csrc: whether the CUDA C++ kernel is there and serves the call.

    Raises:
        NotImplementedError: as ``choose_backend``; for fp8 inputs on a GPU without e4m3 operands.
    """
    if inputs == "fp8" and (gpu.is_hip or gpu.capability < (8, 9)):
        raise NotImplementedError(
            "inputs='fp8' serves NVIDIA GPUs of capability 8.9 and later, got "
            f"{gpu.name} of capability {gpu.capability}: quantize with inputs='int8'"
        )
    backend = choose_backend(M, inputs, dtype, gpu.capability, deterministic, is_plain)
    rows = planned_rows(M, deterministic)
    barred = ("dequant_cublas",) * deterministic + ("csrc",) * (not can_csrc)
    layer = Layer("linear", N, K, bits, group_size, inputs, is_plain)
    found = measured(rows, layer, dtype, gpu, barred)
    if found is not None or backend == "dequant_cublas":
        return found or Choice(backend)
    return Choice(backend, choose_config(rows, N, K, bits, 2 if inputs is None else 1, gpu))
