"""Kernels of the low-bit linear layer, with the tiles that they are launched with."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from bench.static.compile import AotCase, Problem
from bench.static.gpus import GPUS
from lowbit_kernels.matmul.dispatch import (
    Gpu,
    LinearConfig,
    byte_pairs,
    bytes_per_part,
    choose_config,
    choose_dx_config,
    parts_per_dot,
    stats_tiles_padded,
    weights_per_block,
)
from lowbit_kernels.matmul.gpu import taking_norm


def linear_kernel() -> Any:
    from lowbit_kernels.matmul.kernel import _linear_kernel

    return _linear_kernel


def persistent_kernel() -> Any:
    from lowbit_kernels.matmul.persistent_kernel import _linear_persistent_kernel

    return _linear_persistent_kernel


def dx_kernel() -> Any:
    from lowbit_kernels.matmul.backward_kernel import _linear_dx_kernel

    return _linear_dx_kernel


def dequantize_kernel() -> Any:
    from lowbit_kernels.matmul.decode_kernel import _dequantize_kernel

    return _dequantize_kernel


def finish_kernel() -> Any:
    from lowbit_kernels.matmul.epilogue_kernel import _finish_kernel

    return _finish_kernel


def epilogue_backward_kernel() -> Any:
    from lowbit_kernels.matmul.epilogue_kernel import _epilogue_backward_kernel

    return _epilogue_backward_kernel


def quantize_kernel() -> Any:
    from lowbit_kernels.matmul.quantize_kernel import _quantize_rows_kernel

    return _quantize_rows_kernel


def integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def weight_pointers(group_size: int, asymmetric: bool) -> dict[str, str | None]:
    return {
        "qweight_ptr": "*u8",
        "scale_ptr": "*fp16" if asymmetric else "*fp32",
        "group_scale_ptr": "*u8" if group_size and not asymmetric else None,
        "zero_point_ptr": "*fp16" if asymmetric else None,
    }


def make_case(
    name: str,
    kernel: Any,
    pointers: dict[str, str | None],
    sizes: dict[str, str],
    constexprs: dict[str, Any],
    **options: Any,
) -> AotCase:
    """A case whose pointers and strides are aligned; absent pointers are None."""
    present = {k: v for k, v in pointers.items() if v is not None}
    return AotCase(
        name=name,
        kernel=kernel,
        signature=present | sizes,
        constexprs=constexprs | {k: None for k, v in pointers.items() if v is None},
        aligned=(*present, *(n for n in sizes if n in ("N", "K", "N_out") or "stride" in n)),
        **options,
    )


def linear_problem(
    M: int, N: int, K: int, bits: int, x_bytes: int, config: LinearConfig, groups: int = 1
) -> Problem:
    """A layer with bias and residual, or parts of its sum. Dimension key: as in ``dispatch``."""
    tiles = -(-N // config.block_n) * -(-M // config.block_m)
    y_bytes = 4 * config.splits if config.splits > 1 else 2 * 2
    return Problem(
        sizes=f"{M} x {K} x {N}" + f" x {groups}" * (groups > 1),
        operand_bytes=x_bytes,
        flops=2 * M * N * K * groups,
        bytes=(M * K * x_bytes + N * K * bits // 8 + M * N * y_bytes) * groups,
        programs=tiles * config.splits * groups,
    )


def dispatch_gpu(target: str) -> Gpu:
    """The target as dispatch sees it."""
    gpu = GPUS[target]
    major, minor = (9, 4) if target == "gfx942" else divmod(int(gpu.arch), 10)
    shared = gpu.program_shared_bytes
    return Gpu(gpu.name, (major, minor), gpu.num_sms, shared, is_hip=target == "gfx942")


# inputs quantized before the product, and their pointers
BYTE_INPUTS = {"int8": "*i8", "fp8": "*fp8e4nv"}
FP8_TARGETS = ("sm_89", "sm_90", "sm_100", "sm_120")


def linear_case(
    target: str,
    M: int,
    bits: int,
    x: str = "bf16",
    *,
    N: int = 1024,
    K: int = 1024,
    epilogue: str | None = "gelu",
    asymmetric: bool = False,
    normed: bool = False,
    stats: bool = False,
    early_start: bool = False,
    groups: int = 1,
) -> AotCase:
    """The kernel for a shape, with the tiles, and the split of the sum, that dispatch gives it."""
    int8, group_size = x == "int8", 64 if bits in (2, 4) else 0
    is_byte = x in BYTE_INPUTS
    gpu, x_bytes = dispatch_gpu(target), 1 if is_byte else 2
    config, pairs = choose_config(M, N, K, bits, x_bytes, gpu, groups), byte_pairs(gpu)
    config = replace(config, early_start=early_start)
    config = taking_norm(config, gpu) if normed else config
    split = config.splits > 1
    # another kernel adds the parts, and does what follows
    has_norm, normed, stats = normed, normed and not split, stats and not split
    fused = None if split else "*bf16"
    is_even = K % (weights_per_block(bits, x_bytes, pairs) * config.unroll) == 0
    return make_case(
        f"linear_w{bits}{'_asymmetric' if asymmetric else ''}_{x}"
        f"_{config.block_n}x{config.block_m}" + ("" if is_even else "_ragged")
        + ("_split" if split else f"_{epilogue}") + "_normed" * has_norm + "_stats" * stats
        + "_early" * early_start + f"_groups{groups}" * (groups > 1),
        linear_kernel,
        {
            "x_ptr": BYTE_INPUTS.get(x, f"*{x}"),
            **weight_pointers(group_size, asymmetric),
            "x_scale_ptr": "*fp32" if is_byte else None,
            "x_stats_ptr": "*fp32" if normed else None,
            "norm_weight_ptr": f"*{x}" if has_norm else None,
            "columns_ptr": "*fp32" if normed else None,
            "bias_ptr": fused,
            "residual_ptr": fused,
            "y_ptr": fused or ("*i32" if int8 else "*fp32"),
            "z_ptr": None,
            "out_scale_ptr": None,
            "stats_ptr": "*fp32" if stats else None,
            "out_offset_ptr": None,
            "largest_ptr": None,
        },
        integers(
            "M N K T N_out num_groups steps_per_split stride_xb stride_xt stride_qn stride_rm"
        ),
        {
            "GROUPS": groups,
            "BITS": bits,
            "GROUP_SIZE": group_size,
            "EPILOGUE": None if split else epilogue,
            "IS_SPLIT": split,
            "EVEN_K": is_even,
            "PER_DOT": parts_per_dot(bits, x_bytes, pairs),
            "PAIRS": pairs,
            "EPS": 1e-5 if normed else None,
            "STATS_TILES": stats_tiles_padded(K) if normed else 0,
            "EARLY_START": config.early_start,
            "BLOCK_N": config.block_n,
            "BLOCK_M": config.block_m,
            "BLOCK_BYTES": bytes_per_part(bits, x_bytes),
            "UNROLL": config.unroll,
        },
        options=config.options,
        expect={"int8": "mma_s8", "fp8": "mma_e4m3"}.get(x, "mma"),
        # 16 rows are too few for every thread to copy 16 bytes
        async_loads=config.block_m > 16,
        targets=(target,),
        problem=linear_problem(M, N, K, bits, x_bytes, config, groups),
    )  # fmt: skip


def persistent_case(M: int, x: str = "bf16") -> AotCase:
    """The kernel whose programs stay, of Hopper, with the tiles of the other one."""
    case = linear_case("sm_90", M, 4, x, N=4096)
    block_m = case.constexprs["BLOCK_M"]
    run = case.constexprs["PER_DOT"] * case.constexprs["BLOCK_BYTES"]
    element = BYTE_INPUTS.get(x, f"*{x}")[1:]
    dropped = {
        "x_ptr", "x_stats_ptr", "norm_weight_ptr", "columns_ptr", "stats_ptr", "out_offset_ptr",
        "largest_ptr", "K", "T", "steps_per_split", "stride_xb", "stride_xt", "GROUPS", "IS_SPLIT",
        "EPS", "STATS_TILES", "EARLY_START",
    }  # fmt: skip
    signature = {k: v for k, v in case.signature.items() if k not in dropped}
    return replace(
        case,
        name=f"{case.name}_persistent",
        kernel=persistent_kernel,
        signature=signature | {"x_desc": f"tensordesc<{element}[{block_m},{run}]>", "steps": "i32"},
        constexprs={k: v for k, v in case.constexprs.items() if k not in dropped},
        aligned=tuple(name for name in case.aligned if name not in dropped),
    )


def dx_case(target: str, bits: int, *, asymmetric: bool = False, M: int = 2000) -> AotCase:
    group_size = 64 if bits in (2, 4) else 0
    config = choose_dx_config(M, bits, not asymmetric, deterministic=False)
    small = config.block_m < 64
    return make_case(
        f"linear_dx_w{bits}" + "_asymmetric" * asymmetric + "_small" * small,
        dx_kernel,
        {"dz_ptr": "*bf16", **weight_pointers(group_size, asymmetric), "dx_ptr": "*bf16"},
        integers("M N K row_bytes num_groups stride_dm stride_qn"),
        {
            "BITS": bits,
            "GROUP_SIZE": group_size,
            "PAIRS": 0 if target == "gfx942" else 2,
            "BLOCK_M": config.block_m,
            "BLOCK_N": 64,
            "BLOCK_BYTES": config.block_bytes,
        },
        options={"num_warps": config.num_warps, "num_stages": 3},
        # 32 rows are too few for wgmma
        expect="mma_sync" if small else "mma",
        targets=(target,),
    )


def elementwise_cases() -> Iterator[AotCase]:
    for bits, asymmetric in ((4, False), (4, True), (1, False)):
        group_size = 64 if bits == 4 else 0
        yield make_case(
            f"dequantize_w{bits}" + "_asymmetric" * asymmetric,
            dequantize_kernel,
            {**weight_pointers(group_size, asymmetric), "out_ptr": "*fp32"},
            integers("N K num_groups stride_qn"),
            {"BITS": bits, "GROUP_SIZE": group_size, "BLOCK_N": 64},
        )
    for epilogue, parts in (("gelu", "*fp32"), ("glu", "*i32")):
        yield make_case(
            f"finish_{epilogue}",
            finish_kernel,
            {
                "parts_ptr": parts,
                "scale_ptr": "*fp32",
                "x_scale_ptr": "*fp32" if parts == "*i32" else None,
                "x_stats_ptr": None,
                "columns_ptr": None,
                "bias_ptr": "*bf16",
                "residual_ptr": "*bf16",
                "y_ptr": "*bf16",
                "z_ptr": "*bf16",
                "out_scale_ptr": None,
                "stats_ptr": None,
            },
            integers("M N K N_out num_parts stride_rm"),
            {"EPILOGUE": epilogue, "EPS": None, "STATS_TILES": 0, "BLOCK": 1024},
        )
        yield make_case(
            f"epilogue_backward_{epilogue}",
            epilogue_backward_kernel,
            {"dy_ptr": "*bf16", "z_ptr": "*bf16", "dz_ptr": "*bf16", "partial_ptr": "*fp32"},
            integers("M N N_out stride_ym"),
            {"EPILOGUE": epilogue, "ROWS": 64, "BLOCK_M": 16, "BLOCK_N": 64},
        )
    yield make_case(
        "finish_normed_stats",
        finish_kernel,
        {
            "parts_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "x_scale_ptr": None,
            "x_stats_ptr": "*fp32",
            "columns_ptr": "*fp32",
            "bias_ptr": "*bf16",
            "residual_ptr": "*bf16",
            "y_ptr": "*bf16",
            "z_ptr": None,
            "out_scale_ptr": None,
            "stats_ptr": "*fp32",
        },
        integers("M N K N_out num_parts stride_rm"),
        {"EPILOGUE": None, "EPS": 1e-5, "STATS_TILES": 16, "BLOCK": 1024},
    )
    for has_scale, q, is_whole in (
        (False, "int8", True), (False, "int8", False), (True, "int8", True),
        (False, "fp8", True), (True, "fp8", True),
    ):  # fmt: skip
        yield make_case(
            f"quantize_rows_{'given' if has_scale else 'own'}_scale"
            + "_fp8" * (q == "fp8") + "_long" * (not is_whole),
            quantize_kernel,
            {"x_ptr": "*bf16", "q_ptr": BYTE_INPUTS[q], "scale_ptr": "*fp32"},
            integers("K T stride_xb stride_xt stride_qm"),
            {
                "HAS_SCALE": has_scale, "BLOCK": 1024 if is_whole else 4096,
                "IS_WHOLE": is_whole, "INTERPRETED": False,
            },
            targets=None if q == "int8" else FP8_TARGETS,
        )  # fmt: skip


# one row of a stream, a short chunk, one utterance, and batches of them
ROWS = (1, 64, 250, 499, 2000, 16000)


def linear_cases(target: str) -> Iterator[AotCase]:
    for x in ("bf16", "int8"):
        for M in ROWS:
            yield linear_case(target, M, 4, x)
            yield linear_case(target, M, 4, x, N=4096)
        for bits in (1, 2, 8):
            yield linear_case(target, 16, bits, x)
            yield linear_case(target, 499, bits, x)
            yield linear_case(target, 2000, bits, x, N=4096)
        yield linear_case(target, 2000, 4, x, N=4096, epilogue="glu")
        yield linear_case(target, 2000, 4, x, N=324, K=324)
    for M, N, bits in ((64, 1024, 4), (499, 4096, 4), (2000, 4096, 4), (2000, 4096, 2)):
        # of fc1 in a pre-norm block, and of fc2
        yield linear_case(target, M, bits, N=N, normed=True)
        yield linear_case(target, M, bits, N=N, epilogue=None, stats=True)
    # of queries, keys and values, and of a convolution module
    yield linear_case(target, 2000, 4, N=3072, epilogue=None, normed=True)
    yield linear_case(target, 2000, 4, N=2048, epilogue="glu", normed=True)
    if target in FP8_TARGETS:
        for M in (64, 499, 16000):
            yield linear_case(target, M, 4, "fp8", N=4096)
        for bits in (1, 2, 8):
            yield linear_case(target, 2000, bits, "fp8", N=4096)
        yield linear_case(target, 1, 8, "fp8")
        yield linear_case(target, 2000, 4, "fp8", N=4096, epilogue="glu")
        yield linear_case(target, 2000, 4, "fp8", N=324, K=324)
    if target in ("sm_90", "sm_100", "sm_120"):
        yield linear_case(target, 499, 4, early_start=True)
    if target == "sm_90":
        for x in ("bf16", "int8", "fp8"):
            yield persistent_case(16000, x)
    yield linear_case(target, 499, 4, "fp16")
    yield linear_case(target, 2000, 4, "fp16", N=4096)
    yield linear_case(target, 2000, 4, asymmetric=True)


def distinct(cases: Iterable[AotCase]) -> list[AotCase]:
    """The first of each name: many shapes share their tiles."""
    return list({case.name: case for case in reversed(list(cases))}.values())[::-1]


CASES = [
    *(case for target in GPUS for case in distinct(linear_cases(target))),
    *(dx_case(target, bits) for target in GPUS for bits in (1, 2, 4, 8)),
    *(dx_case(target, 4, asymmetric=True) for target in GPUS),
    *(dx_case(target, 4, M=16) for target in GPUS),
    *elementwise_cases(),
]
