"""The CUDA C++ kernel for few rows and a 4-bit weight, from the library that setup_cuda.py builds.

Dimension key: M rows of x, seen as [B, T]; N output features; K input features; S parts of a sum
over K.

Nothing depends on the library being there: ``is_available`` says whether it is, ``serves_csrc``
what it can do, and both are asked before ``linear_csrc`` is called.
"""

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.formats import QuantizedWeight, QuantSpec

LIBRARY = Path(__file__).parents[1] / "_csrc.so"

MAX_ROWS = 64
# an epilogue's place is its number in csrc/tile.cuh
EPILOGUES = (None, "gelu", "gelu_tanh", "silu", "relu")
# tiles that csrc/tile.cuh has: rows of x to the numbers of warps side by side, narrow and wide
TILES = {8: (1, 4), 16: (1, 4), 32: (2, 4), 64: (2, 4)}
# a second kernel adds the parts of a split sum: it pays once a thread block is spared about 64 KiB
SPLIT_WEIGHTS = 128 * 1024


@dataclass(frozen=True)
class CsrcConfig:
    """Tile of the kernel; ``TILES`` lists what there is.

    Args:
        block_m: rows of x a tile, M or more.
        warps_n: of a thread block's 8 warps those side by side along N; the others share K.
        splits: parts of the sum over K, each of its own thread blocks.
    """

    block_m: int
    warps_n: int
    splits: int = 1

    @property
    def block_n(self) -> int:
        """Output features a tile."""
        return 16 * self.warps_n * (2 if self.block_m >= 32 else 1)


@functools.cache
def is_available() -> bool:
    """Whether the library was built and loads; a warning says why it does not load."""
    if not LIBRARY.exists():
        return False
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        warnings.warn(f"cannot load {LIBRARY}, build it again: {error}", stacklevel=2)
        return False
    return True


def serves_csrc(M: int, spec: QuantSpec, dtype: torch.dtype, epilogue: str | None) -> bool:
    """Whether the kernel can serve a linear layer's forward pass without its pre-activation.

    Args:
        M: rows of the input.
        spec: of the weight: 4 bits, symmetric, float inputs. A deterministic layer's bits must not
            depend on M, and these do.
        dtype: of the input.
        epilogue: as in ``low_bit_linear``, but for ``"glu"``.
    """
    return (
        M <= MAX_ROWS
        and spec.bits == 4
        and spec.symmetric
        and spec.inputs is None
        and not spec.deterministic
        and dtype in (torch.float16, torch.bfloat16)
        and epilogue in EPILOGUES
    )


def choose_csrc_config(M: int, N: int, K: int, num_sms: int) -> CsrcConfig:
    """Tile for a shape, from the number of thread blocks and bytes; nothing here was timed.

    Args:
        M: rows of the input, 1 to 64.
        N: output features.
        K: input features.
        num_sms: multiprocessors of the device.
    """
    block_m = next(rows for rows in TILES if rows >= M)
    narrow, wide = (CsrcConfig(block_m, warps_n) for warps_n in TILES[block_m])
    # wide tiles read x less often; narrow ones keep more multiprocessors busy
    config = wide if 4 * -(-N // wide.block_n) >= 3 * num_sms else narrow
    tiles = -(-N // config.block_n)
    splits = min(2 * num_sms // tiles, config.block_n * K // SPLIT_WEIGHTS)
    return CsrcConfig(block_m, config.warps_n, max(1, splits))


def aligned_rows(x_btk: Tensor) -> Tensor:
    """x [B, T, K] as rows [B * T, K] that begin at multiples of 16 bytes.

    Copied only where utterances do not follow one another or rows are not aligned; zeros then make
    K a multiple of 8, which is still inside of the weight's last block.
    """
    x = x_btk.reshape(-1, x_btk.shape[-1])
    if x.data_ptr() % 16 or (x.shape[0] > 1 and x.stride(0) % 8):
        x = F.pad(x, (0, -x.shape[1] % 8))
    return x


def linear_csrc(
    x_btk: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    config: CsrcConfig,
    *,
    static_weight: bool = False,
) -> tuple[Tensor, None]:
    """Like ``kernel.linear_triton``, for what ``serves_csrc`` says and without pre-activation.

    Args:
        x_btk: [B, T, K], fp16 or bf16, B * T at most 64. Its last stride is 1.
        weight: [N, K].
        bias: [N].
        residual: [B * T, N], its last stride 1.
        epilogue: an entry of ``EPILOGUES``.
        config: tile.
        static_weight: that the kernel launched just before in this stream does not write the
            weight. On sm_90 and later this kernel then starts before that one ends and fetches the
            weight meanwhile (programmatic dependent launch).

    Returns:
        y: [B * T, N] in the dtype of ``x_btk``, and None for the pre-activation.

    Raises:
        NotImplementedError: listing what is served.
    """
    M, N = x_btk.shape[0] * x_btk.shape[1], weight.N
    if not serves_csrc(M, weight.spec, x_btk.dtype, epilogue):
        raise NotImplementedError(
            f"the csrc backend serves at most {MAX_ROWS} rows of fp16 or bf16, symmetric 4-bit "
            f"weights that are not deterministic, float inputs and the epilogues {EPILOGUES}; "
            f"got {M} rows of {x_btk.dtype}, {weight.spec}, epilogue {epilogue!r}"
        )
    y = torch.empty(M, N, dtype=x_btk.dtype, device=x_btk.device)
    if M == 0:
        return y, None
    parts = None
    if config.splits > 1:
        parts = torch.empty(config.splits, M, N, dtype=torch.float32, device=x_btk.device)
    # a call of an op inside another's implementation is no part of a traced graph, and costs the
    # host half of what a ctypes call with as many pointers does
    torch.ops.lowbit.linear_small_m.default(
        aligned_rows(x_btk), weight.qweight, weight.scale, weight.group_scale, bias, residual,
        weight.spec.group, EPILOGUES.index(epilogue), config.block_m, config.warps_n, static_weight,
        y, parts,
    )  # fmt: skip
    return y, None
