"""The linear layer's kernel with programs that stay, x coming by the tensor memory accelerator.

A program does one tile after another in a single loop: while a tile is written, copies for the next
one run. The result is that of ``kernel.py``, bit for bit. A step costs at most 262 instructions a
thread where it costs 181 there (W4A16, 128 x 256 x 64, Triton 3.6), half the cycles that the matrix
unit needs. The gain is the latency of a tile's first copies, which nothing hides where only one
program fits on a multiprocessor: a prediction of 5 % at K = 1024 and 1 % at 4096. The tuner
measures it, and chooses it where it wins.

Dimension key: M rows of x, N output features, N_out N / 2 with ``glu`` and N without; K input
features.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lowbit_kernels.matmul.dispatch import LinearConfig
from lowbit_kernels.matmul.launch import Launcher
from lowbit_kernels.matmul.tile_kernel import decode_run, load_bytes, tile_rows, write_tile


# lengths differ from utterance to utterance, and must not compile a kernel each
@triton.jit(do_not_specialize=["M"])
def _linear_persistent_kernel(
    x_desc, qweight_ptr, scale_ptr, group_scale_ptr, zero_point_ptr, x_scale_ptr,
    bias_ptr, residual_ptr, y_ptr, z_ptr, out_scale_ptr,
    M, N, N_out, num_groups, steps, stride_qn, stride_rm,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, EPILOGUE: tl.constexpr,
    EVEN_K: tl.constexpr, PER_DOT: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_BYTES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    IS_GLU: tl.constexpr = EPILOGUE == "glu"
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if IS_GLU else BLOCK_N
    DTYPE: tl.constexpr = x_desc.dtype
    SUM: tl.constexpr = tl.int32 if DTYPE.is_int() else tl.float32
    PARTS: tl.constexpr = PER_DOT if BITS == 8 else 8 // BITS
    tiles_n = tl.cdiv(N_out, BLOCK_OUT)
    tiles = tiles_n * tl.cdiv(M, BLOCK_M)
    offs_j = tl.arange(0, BLOCK_BYTES)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        start_n = tile % tiles_n * BLOCK_OUT
        start_m = tile // tiles_n * BLOCK_M
        offs_n, index_n = tile_rows(start_n, N, N_out, BLOCK_N, IS_GLU)
        q_ptrs = qweight_ptr + offs_n.to(tl.int64)[:, None] * stride_qn + offs_j[None, :]
        group_rows = offs_n * num_groups
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=SUM)
        for step in range(0, steps):
            for i in tl.static_range(UNROLL):
                block = step * UNROLL + i
                q = None
                if BITS < 8:
                    q = load_bytes(q_ptrs, block * BLOCK_BYTES, stride_qn, EVEN_K)
                for d in tl.static_range(PARTS // PER_DOT):
                    start = (block * PARTS + d * PER_DOT) * BLOCK_BYTES
                    # zeros past the end of K, where the weight's padding decodes to anything
                    x = x_desc.load([start_m, start]).T
                    w = decode_run(
                        q, q_ptrs, scale_ptr, group_scale_ptr, zero_point_ptr, group_rows, start,
                        stride_qn, num_groups, BITS, GROUP_SIZE, d * PER_DOT, DTYPE, PAIRS,
                        PER_DOT, BLOCK_BYTES, EVEN_K,
                    )  # fmt: skip
                    acc = tl.dot(w, x, acc, out_dtype=SUM)
        scale = tl.load(scale_ptr + offs_n) if zero_point_ptr is None else None
        bias = tl.load(bias_ptr + offs_n).to(tl.float32) if bias_ptr is not None else None
        write_tile(
            acc, scale, bias, None, None, None, None, x_scale_ptr, residual_ptr, y_ptr, z_ptr,
            out_scale_ptr, None, None, None,
            start_m.to(tl.int64), start_n, offs_n, index_n < N_out, M, N, N_out, stride_rm,
            EPILOGUE, 1, 0,
        )  # fmt: skip


launch_persistent = Launcher(_linear_persistent_kernel)


def programs_that_stay(config: LinearConfig, num_sms: int) -> int:
    """Programs of the kernel that run at once on a GPU."""
    # two fit where their registers were held down for it
    return num_sms * (2 if config.max_registers is not None else 1)


def describe_rows(x_btk: Tensor, block_m: int, run: int) -> TensorDescriptor | None:
    """What the tensor memory accelerator needs to know of x to copy [block_m, run] of it at a time.

    None where it cannot: x [B, T, K] is no matrix, or its rows do not begin at multiples of 16
    bytes.
    """
    B, T, K = x_btk.shape
    stride_b, stride_t, _ = x_btk.stride()
    if B > 1 and T > 1 and stride_b != T * stride_t:
        return None
    stride = stride_b if T == 1 else stride_t
    if (stride * x_btk.itemsize) % 16 or x_btk.data_ptr() % 16 or stride < K:
        return None
    return TensorDescriptor(x_btk, [B * T, K], [stride, 1], [block_m, run])
