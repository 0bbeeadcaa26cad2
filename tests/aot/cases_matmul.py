"""Kernels of the low-bit linear layer, with the tiles that they are launched with."""

from collections.abc import Iterator
from typing import Any

from lowbit_kernels.matmul.dispatch import choose_config
from tests.aot.harness import TARGETS, AotCase

NUM_SMS = 132


def linear_kernel() -> Any:
    from lowbit_kernels.matmul.kernel import _linear_kernel

    return _linear_kernel


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


def linear_case(
    target: str,
    M: int,
    bits: int,
    x: str = "bf16",
    *,
    epilogue: str | None = "gelu",
    asymmetric: bool = False,
    split: bool = False,
) -> AotCase:
    int8, group_size = x == "int8", 64 if bits in (2, 4) else 0
    shared_bytes = TARGETS[target].shared_bytes
    config = choose_config(M, 1024, 1024, bits, 1 if int8 else 2, NUM_SMS, shared_bytes)
    fused = None if split else "*bf16"
    return make_case(
        f"linear_w{bits}{'_asymmetric' if asymmetric else ''}_{x}_m{M}"
        + ("_split" if split else f"_{epilogue}"),
        linear_kernel,
        {
            "x_ptr": "*i8" if int8 else f"*{x}",
            **weight_pointers(group_size, asymmetric),
            "x_scale_ptr": "*fp32" if int8 else None,
            "bias_ptr": fused,
            "residual_ptr": fused,
            "y_ptr": fused or ("*i32" if int8 else "*fp32"),
            "z_ptr": None,
        },
        integers(
            "M N K T N_out num_groups blocks_per_split stride_xb stride_xt stride_qn stride_rm"
        ),
        {
            "BITS": bits,
            "GROUP_SIZE": group_size,
            "EPILOGUE": None if split else epilogue,
            "IS_SPLIT": split,
            "BLOCK_N": config.block_n,
            "BLOCK_M": config.block_m,
            "BLOCK_BYTES": config.block_bytes,
        },
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        expect="mma_s8" if int8 else "mma",
        # 16 rows are too few for every thread to copy 16 bytes
        async_loads=M > 16,
        targets=(target,),
    )


def dx_case(bits: int, *, asymmetric: bool = False, small: bool = False) -> AotCase:
    group_size = 64 if bits in (2, 4) else 0
    return make_case(
        f"linear_dx_w{bits}" + "_asymmetric" * asymmetric + "_small" * small,
        dx_kernel,
        {"dz_ptr": "*bf16", **weight_pointers(group_size, asymmetric), "dx_ptr": "*bf16"},
        integers("M N K row_bytes num_groups stride_dm stride_qn"),
        {
            "BITS": bits,
            "GROUP_SIZE": group_size,
            "BLOCK_M": 32 if small else 128,
            "BLOCK_N": 64,
            "BLOCK_BYTES": 64 if small else 128,
        },
        options={"num_warps": 4 if small else 8, "num_stages": 3},
        # 32 rows are too few for wgmma
        expect="mma_sync" if small else "mma",
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
                "bias_ptr": "*bf16",
                "residual_ptr": "*bf16",
                "y_ptr": "*bf16",
                "z_ptr": "*bf16",
            },
            integers("M N N_out num_parts stride_rm"),
            {"EPILOGUE": epilogue, "BLOCK": 1024},
        )
        yield make_case(
            f"epilogue_backward_{epilogue}",
            epilogue_backward_kernel,
            {"dy_ptr": "*bf16", "z_ptr": "*bf16", "dz_ptr": "*bf16", "partial_ptr": "*fp32"},
            integers("M N N_out stride_ym"),
            {"EPILOGUE": epilogue, "ROWS": 64, "BLOCK_M": 16, "BLOCK_N": 64},
        )
    for has_scale in (False, True):
        yield make_case(
            f"quantize_rows_{'given' if has_scale else 'own'}_scale",
            quantize_kernel,
            {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32"},
            integers("K T stride_xb stride_xt stride_qm"),
            {"HAS_SCALE": has_scale, "INT8_MAX": 127.0, "MIN_SCALE": 2.0**-126, "BLOCK": 1024},
        )


def linear_cases(target: str) -> Iterator[AotCase]:
    for x in ("bf16", "int8"):
        for bits in (1, 2, 4, 8):
            yield linear_case(target, 2000, bits, x)
        yield linear_case(target, 499, 4, x)
        yield linear_case(target, 2000, 4, x, epilogue="glu")
        yield linear_case(target, 16, 4, x, split=True)
    yield linear_case(target, 64, 4, split=True)
    yield linear_case(target, 499, 8)
    yield linear_case(target, 2000, 4, "fp16")
    yield linear_case(target, 2000, 4, asymmetric=True)


CASES = [
    *(case for target in TARGETS for case in linear_cases(target)),
    *(dx_case(bits) for bits in (1, 2, 4, 8)),
    dx_case(4, asymmetric=True),
    dx_case(4, small=True),
    *elementwise_cases(),
]
