"""Triton kernel for y = epilogue(x @ W.T + bias) + residual, dequantized in registers.

Dimension key: M rows of x, seen as [B, T]; N output features, N_out N / 2 with ``glu`` and N
without; K input features. A grouped convolution has G products of these sizes, side by side in y.

The tile is that of y.T: the weight is the left operand, which ``wgmma`` takes from registers. A
step of the loop over K is ``UNROLL`` blocks of packed bytes (``formats/packing.py``), a ``tl.dot``
is one slice of a block, or two for ``wgmma``.
"""

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul.dispatch import (
    LinearConfig,
    bytes_per_part,
    parts_per_dot,
    stats_tiles_padded,
    weights_per_block,
)
from lowbit_kernels.matmul.epilogue_kernel import finish_triton
from lowbit_kernels.matmul.gpu import pairs_of, sms_of
from lowbit_kernels.matmul.launch import Constants, Launcher
from lowbit_kernels.matmul.persistent_kernel import (
    describe_rows,
    launch_persistent,
    programs_that_stay,
)
from lowbit_kernels.matmul.reference import InputNorm
from lowbit_kernels.matmul.statistics_kernel import merge_statistics
from lowbit_kernels.matmul.tile_kernel import (
    decode_run,
    load_bytes,
    scale_columns,
    tile_rows,
    write_tile,
)

# of each row of the weight, into L2 before an early start's wait
PREFETCH_LINES, LINE_BYTES = tl.constexpr(4), tl.constexpr(128)


# lengths differ from utterance to utterance, and must not compile a kernel each
@triton.jit(do_not_specialize=["M", "T"])
def _linear_kernel(
    x_ptr, qweight_ptr, scale_ptr, group_scale_ptr, zero_point_ptr, x_scale_ptr,
    x_stats_ptr, norm_weight_ptr, columns_ptr,
    bias_ptr, residual_ptr, y_ptr, z_ptr, out_scale_ptr, stats_ptr, out_offset_ptr, largest_ptr,
    M, N, K, T, N_out, num_groups, steps_per_split,
    stride_xb, stride_xt, stride_qn, stride_rm,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, EPILOGUE: tl.constexpr, IS_SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, PER_DOT: tl.constexpr, PAIRS: tl.constexpr,
    EPS: tl.constexpr, STATS_TILES: tl.constexpr, EARLY_START: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_BYTES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # programs that share rows of x are neighbors: x is the large operand, the weight stays in L2
    IS_GLU: tl.constexpr = EPILOGUE == "glu"
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if IS_GLU else BLOCK_N
    tiles_n = tl.cdiv(N_out, BLOCK_OUT)
    start_n = (tl.program_id(0) % tiles_n) * BLOCK_OUT
    start_m = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M

    # rows past the end read the last one, and are not written
    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, M - 1)
    offs_n, index_n = tile_rows(start_n, N, N_out, BLOCK_N, IS_GLU)

    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SUM: tl.constexpr = tl.int32 if DTYPE.is_int() else tl.float32
    # a part of a block is a run of BLOCK_BYTES along K: a slice of its bytes, or bytes of its own
    # at 8 bits
    PARTS: tl.constexpr = PER_DOT if BITS == 8 else 8 // BITS
    RUN: tl.constexpr = PER_DOT * BLOCK_BYTES
    # windows overlap: through L1 a step finds most of the one before, which L2 could not move
    CACHE: tl.constexpr = ".ca" if GROUPS > 1 else ""
    offs_j = tl.arange(0, BLOCK_BYTES)
    offs_k = tl.arange(0, RUN)
    batch = rows // T
    if GROUPS > 1:
        # x is [B, G, T, K]
        batch = batch * GROUPS + tl.program_id(2)
        offs_n += tl.program_id(2) * N
        y_ptr += 0 if IS_SPLIT else tl.program_id(2) * N_out
        if residual_ptr is not None:
            residual_ptr += tl.program_id(2) * N_out
    x_rows = x_ptr + batch * stride_xb + rows % T * stride_xt
    x_ptrs = x_rows[None, :] + offs_k[:, None]
    q_ptrs = qweight_ptr + offs_n.to(tl.int64)[:, None] * stride_qn + offs_j[None, :]
    group_rows = offs_n * num_groups

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=SUM)
    first = tl.program_id(1) * steps_per_split
    if EARLY_START:
        # the kernel ahead is still at work: until it is done nothing of its is read, nothing
        # written; the weight comes as far as L2, which no late write of it would make stale
        offs_line = first * (BLOCK_BYTES * UNROLL) + tl.arange(0, PREFETCH_LINES) * LINE_BYTES
        offs_line = tl.minimum(offs_line, stride_qn - 1)
        lines = qweight_ptr + offs_n.to(tl.int64)[:, None] * stride_qn + offs_line[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        gdc_wait()
    last = tl.minimum(first + steps_per_split, tl.cdiv(K, BLOCK_BYTES * PARTS * UNROLL))
    for step in range(first, last):
        for i in tl.static_range(UNROLL):
            block = step * UNROLL + i
            q = None
            if BITS < 8:
                q = load_bytes(q_ptrs, block * BLOCK_BYTES, stride_qn, EVEN_K)
            for d in tl.static_range(PARTS // PER_DOT):
                start = (block * PARTS + d * PER_DOT) * BLOCK_BYTES
                if EVEN_K:
                    x = tl.load(x_ptrs + start, cache_modifier=CACHE)
                else:
                    # the weight's padding decodes to anything, so x must be 0 there
                    x = tl.load(
                        x_ptrs + start, mask=(start + offs_k < K)[:, None], other=0.0,
                        cache_modifier=CACHE,
                    )  # fmt: skip
                w = decode_run(
                    q, q_ptrs, scale_ptr, group_scale_ptr, zero_point_ptr, group_rows, start,
                    stride_qn, num_groups, BITS, GROUP_SIZE, d * PER_DOT, DTYPE, PAIRS,
                    PER_DOT, BLOCK_BYTES, EVEN_K,
                )  # fmt: skip
                if norm_weight_ptr is not None:
                    w = scale_columns(w, norm_weight_ptr, start, K, EVEN_K)
                acc = tl.dot(w, x, acc, out_dtype=SUM)
    if EARLY_START:
        gdc_launch_dependents()

    if IS_SPLIT:
        part = y_ptr + tl.program_id(1).to(tl.int64) * M * (N * GROUPS)
        mask = (offs_m < M)[None, :] & (index_n < N)[:, None]
        tl.store(part + offs_m[None, :] * (N * GROUPS) + offs_n[:, None], acc, mask=mask)
    else:
        scale = tl.load(scale_ptr + offs_n) if zero_point_ptr is None else None
        bias = tl.load(bias_ptr + offs_n).to(tl.float32) if bias_ptr is not None else None
        mean, rstd, column, shift = None, None, None, None
        if x_stats_ptr is not None:
            mean, rstd = merge_statistics(x_stats_ptr, rows, M, K, EPS, STATS_TILES)
            column = tl.load(columns_ptr + offs_n)
            shift = tl.load(columns_ptr + N + offs_n)
        write_tile(
            acc, scale, bias, mean, rstd, column, shift, x_scale_ptr, residual_ptr, y_ptr, z_ptr,
            out_scale_ptr, stats_ptr, out_offset_ptr, largest_ptr,
            start_m, start_n, offs_n, index_n < N_out, M, N, N_out, stride_rm,
            EPILOGUE, GROUPS, 0,
        )  # fmt: skip


_launch = Launcher(_linear_kernel)


@dataclass(frozen=True)
class _Plan:
    """What does not change from call to call of a layer: on the host every line counts.

    Args:
        width: features of the output.
        tile_width: features that the kernel writes, of a group: those of the output, or of a part
            of a sum.
        tiles_n: tiles along the features of a group.
        num_groups: group scales a row.
        steps_per_split: of the loop over K, a program.
        constants: of the kernel.
        run: weights a row that are multiplied at once.
        staying: programs of the persistent kernel, 0 where it does not serve.
        staying_constants: of the persistent kernel.
    """

    width: int
    tile_width: int
    tiles_n: int
    num_groups: int
    steps_per_split: int
    constants: Constants
    run: int
    staying: int
    staying_constants: Constants


@functools.lru_cache(maxsize=4096)
def _plan(
    N: int,
    K: int,
    bits: int,
    group_size: int,
    itemsize: int,
    epilogue: str | None,
    config: LinearConfig,
    device: torch.device,
    eps: float | None,
    groups: int,
) -> _Plan:
    is_split = config.splits > 1
    pairs, assembly = pairs_of(device, _linear_kernel)
    step = weights_per_block(bits, itemsize, pairs) * config.unroll
    per_dot, block_bytes = parts_per_dot(bits, itemsize, pairs), bytes_per_part(bits, itemsize)
    width = N // 2 if epilogue == "glu" else N
    # a part of a sum holds values and gates side by side, so its tiles are those of a plain layer
    interleaved = epilogue == "glu" and not is_split
    tile_width = N if is_split else width
    is_persistent = config.persistent and not is_split and eps is None and groups == 1
    shared = {
        "BITS": bits, "GROUP_SIZE": group_size, "EPILOGUE": None if is_split else epilogue,
        "EVEN_K": K % step == 0, "PAIRS": assembly, "PER_DOT": per_dot,
        "BLOCK_N": config.block_n, "BLOCK_M": config.block_m,
        "BLOCK_BYTES": block_bytes, "UNROLL": config.unroll,
    }  # fmt: skip
    early_start = config.early_start and assembly > 0
    return _Plan(
        width * groups,
        tile_width,
        tiles_n=-(-tile_width // (config.block_n // 2 if interleaved else config.block_n)),
        num_groups=-(-K // group_size) if group_size else 0,
        steps_per_split=-(-K // (step * config.splits)),
        constants=Constants(
            shared
            | {
                "GROUPS": groups, "IS_SPLIT": is_split, "EARLY_START": early_start,
                "EPS": eps, "STATS_TILES": stats_tiles_padded(K) if eps is not None else 0,
            }
            | replace(config, early_start=early_start).options
        ),
        run=per_dot * block_bytes,
        staying=programs_that_stay(config, sms_of(device, _linear_kernel)) * is_persistent,
        staying_constants=Constants(shared | replace(config, early_start=False).options),
    )  # fmt: skip


def linear_triton(
    x_btk: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    config: LinearConfig,
    *,
    x_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    want_preactivation: bool = False,
    out_scale: Tensor | None = None,
    norm: InputNorm | None = None,
    stats: Tensor | None = None,
    out_offset: Tensor | None = None,
    largest: Tensor | None = None,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel. The caller has checked the inputs.

    Args:
        x_btk: [B, T, K], fp16, bf16, or int8 or fp8 with ``x_scale``. Its last stride is 1, others
            are any: rows may overlap, as those of a strided convolution's ``as_strided`` view do.
            With groups [B * G, T, K].
        weight: [N, K].
        bias: [N].
        residual: [B * T, N_out], its last stride 1.
        epilogue: as in ``low_bit_linear``.
        config: tile sizes.
        x_scale: [B * T] fp32, the scale of each row of an int8 or fp8 input.
        dtype: of the result; that of ``x_btk`` unless that is int8 or fp8.
        want_preactivation: whether to store what the activation sees.
        out_scale: [] fp32, the static scale of an int8 result; ``dtype`` is int8 then.
        norm: a LayerNorm of x; x is not int8 then, and the weight symmetric.
        stats: [T, 2, B * T] fp32, to be filled with ``row_statistics`` of y; no ``"glu"`` then.
        out_offset: [N_out] fp32, subtracted from y before it is rounded; the sum is not split then.
        largest: [tiles of ``config.block_n``, B * T] fp32, to be filled with the largest magnitudes
            of a row's features in a tile; no split, residual or ``"glu"`` then.
        groups: G products, of N / G features each, in one launch; no ``"glu"``, norm or stats then.

    Returns:
        y: [B * T, N_out].
        preactivation: [B * T, N] in the same dtype, or None.
    """
    B, T, K = x_btk.shape
    M, width, spec, device = B * T // groups, weight.N, weight.spec, x_btk.device
    N = width // groups
    eps = None if norm is None or config.splits > 1 else norm.eps
    plan = _plan(N, K, spec.bits, spec.group, x_btk.itemsize, epilogue, config, device, eps, groups)
    dtype = dtype or x_btk.dtype
    z = torch.empty(M, width, dtype=dtype, device=device) if want_preactivation else None
    if M == 0:
        return torch.empty(0, plan.width, dtype=dtype, device=device), z
    grid = (plan.tiles_n * -(-M // config.block_m), config.splits, groups)
    sizes = (
        M, N, K, T, plan.tile_width, plan.num_groups, plan.steps_per_split,
        x_btk.stride(0) if B > 1 else 0, x_btk.stride(1), weight.qweight.stride(0),
        0 if residual is None else residual.stride(0),
    )  # fmt: skip
    packed = (weight.qweight, weight.scale, weight.group_scale, weight.zero_point)
    x_stats, norm_weight, columns = None, None, None
    if norm is not None:
        x_stats, norm_weight, columns = norm.stats, norm.weight, norm.columns
    if config.splits == 1:
        y = torch.empty(M, plan.width, dtype=dtype, device=device)
        outputs = (bias, residual, y, z, out_scale, stats, out_offset, largest)
        if plan.staying and all(extra is None for extra in outputs[-3:]):
            x_desc = describe_rows(x_btk, config.block_m, plan.run)
            if x_desc is not None:
                grid = (min(grid[0], plan.staying), 1, 1)
                counts = (M, N, plan.width, plan.num_groups, plan.steps_per_split, *sizes[-2:])
                inputs = (x_desc, *packed, x_scale)
                launch_persistent(grid, (*inputs, *outputs[:-3], *counts), plan.staying_constants)
                return y, z
        of_norm = (x_stats, norm_weight, columns)
        _launch(grid, (x_btk, *packed, x_scale, *of_norm, *outputs, *sizes), plan.constants)
        return y, z
    sums = torch.int32 if x_btk.dtype == torch.int8 else torch.float32
    parts = torch.empty(config.splits, M, width, dtype=sums, device=device)
    absent = (None, None, None)
    args = (x_btk, *packed, x_scale, None, norm_weight, *absent, parts, *absent, None, None, *sizes)
    _launch(grid, args, plan.constants)
    scale = weight.scale if spec.symmetric else None
    y = finish_triton(
        parts, scale, x_scale, bias, residual, epilogue, dtype, z, out_scale, norm, stats
    )
    return y, z
