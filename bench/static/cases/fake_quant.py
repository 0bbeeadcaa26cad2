"""Fake quantization, and the weight gradient that ends with its gradient."""

from collections.abc import Iterator
from typing import Any

from bench.static.compile import AotCase, Problem
from bench.static.gpus import GPUS
from lowbit_kernels.fake_quant import Levels, Quantizer
from lowbit_kernels.fake_quant.dispatch import WeightGradientConfig, choose_weight_gradient_config

W4 = Quantizer(Levels.of_weight(4), method="lsq", group_size=64)
W1 = Quantizer(Levels.of_weight(1), method="elastic")


def kernel(name: str) -> Any:
    from lowbit_kernels.fake_quant import elementwise_kernel, weight_gradient_kernel

    module = weight_gradient_kernel if name == "weight_gradient" else elementwise_kernel
    return getattr(module, f"_{name}_kernel")


def make_case(
    name: str,
    kernel_name: str,
    pointers: dict[str, str | None],
    sizes: str,
    constexprs: dict[str, Any],
    **options: Any,
) -> AotCase:
    """A case whose pointers and long strides are aligned; absent pointers are None."""
    present = {f"{k}_ptr": v for k, v in pointers.items() if v is not None}
    absent = {f"{k}_ptr": None for k, v in pointers.items() if v is None}
    aligned = ("N", "K", "rows_per_part", "stride_zm", "stride_xm")
    return AotCase(
        name=f"fake_quant-{name}",
        kernel=lambda: kernel(kernel_name),
        signature=present | dict.fromkeys(sizes.split(), "i32"),
        constexprs=constexprs | absent,
        aligned=(*present, *(n for n in sizes.split() if n in aligned)),
        **options,
    )


def quantizer_constants(quantizer: Quantizer) -> dict[str, Any]:
    from lowbit_kernels.fake_quant.elementwise_kernel import constants

    return constants(quantizer)


def elementwise_cases() -> Iterator[AotCase]:
    tiles = {"BLOCK_M": 8, "CHUNKS": 4, "CHUNK": 64, "GROUP_SIZE": 64}
    for name, x, y, group_scale in (
        ("weight", "fp32", "bf16", "*u8"),
        ("input", "bf16", "bf16", None),
    ):
        constexprs = quantizer_constants(W4) | (
            tiles if group_scale else tiles | {"CHUNKS": 1, "CHUNK": 256, "GROUP_SIZE": 0}
        )
        shared = {"scale": "*fp32", "group_scale": group_scale}
        yield make_case(
            f"forward-{name}",
            "fake_quantize",
            {"x": f"*{x}", **shared, "center": None, "y": f"*{y}"},
            "M K num_chunks num_groups stride_sm stride_sg stride_cm",
            constexprs,
        )
        yield make_case(
            f"backward-{name}",
            "fake_quantize_bwd",
            {"grad": "*fp32" if group_scale else "*bf16", "x": f"*{x}", **shared}
            | {"dx": f"*{x}", "partial": "*fp32"},
            "M K num_parts num_chunks num_groups stride_sm stride_sg",
            constexprs | {"IS_SIGN": False},
        )
    yield make_case(
        "rows",
        "fake_quantize_rows",
        {"x": "*bf16", "y": "*bf16"},
        "K",
        quantizer_constants(Quantizer(Levels.of_input(8))) | {"BLOCK": 1024},
        options={"num_warps": 2},
    )


def weight_gradient_case(
    target: str, M: int, N: int, K: int, quantizer: Quantizer | None, x: str = "bf16"
) -> AotCase:
    config = choose_weight_gradient_config(M, N, K, GPUS[target].num_sms)
    if config.splits > 1:  # the quantizer's gradient is a pass of its own then
        quantizer = None
    grouped = quantizer is not None and quantizer.group_size > 0
    own = None if quantizer is None else "*fp32"
    kind = "float" if quantizer is None else f"{quantizer.method}-w{4 if grouped else 1}"
    constexprs = (
        {"LOW": 0.0, "HIGH": 0.0, "STEP": 1, "MIN_SCALE": 0.0}
        if quantizer is None
        else quantizer_constants(quantizer)
    )
    tiles = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_M": config.block_m}
    return make_case(
        f"dw-{kind}-{x}-{M}x{N}x{K}" + "-split" * (config.splits > 1),
        "weight_gradient",
        {"dz": f"*{x}", "x": f"*{x}", "weight": own, "scale": own}
        | {"group_scale": "*u8" if grouped else None, "dweight": "*fp32", "partial": own},
        "M N K rows_per_part num_groups stride_zm stride_xm stride_sn",
        constexprs
        | {
            "IS_SIGN": kind.startswith("elastic"),
            "GROUP_SIZE": 64 if grouped else 1,
            "STRIP": 8,
        }
        | tiles,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        expect="mma",
        async_loads=True,
        targets=(target,),
        problem=_problem(M, N, K, quantizer, config),
    )


def _problem(
    M: int, N: int, K: int, quantizer: Quantizer | None, config: WeightGradientConfig
) -> Problem:
    tiles = -(-N // config.block_n) * -(-K // config.block_k)
    weights = 4 * N * K * (config.splits + (quantizer is not None))
    return Problem(
        sizes=f"{M} x {N} x {K}",
        operand_bytes=2,
        flops=2 * M * N * K,
        bytes=2 * M * (N + K) + weights,
        programs=tiles * config.splits,
    )


def weight_gradient_cases(target: str) -> Iterator[AotCase]:
    shape = (2000, 4096, 1024)
    yield weight_gradient_case(target, *shape, None)
    yield weight_gradient_case(target, *shape, W4)
    yield weight_gradient_case(target, *shape, W1)
    yield weight_gradient_case(target, *shape, W4, "fp16")
    yield weight_gradient_case(target, 499, 1024, 1024, W4)
    yield weight_gradient_case(target, 2000, 196, 784, None)


CASES = [
    *elementwise_cases(),
    *(case for target in GPUS for case in weight_gradient_cases(target)),
]
