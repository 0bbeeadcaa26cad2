"""Kernels of the low-bit linear layer, with the tiles that they are launched with."""

from typing import Any

from lowbit_kernels.matmul.dispatch import choose_config
from tests.aot.harness import AotCase

TORCH_TO_TRITON = {"fp16": "*fp16", "bf16": "*bf16", "int8": "*i8", "fp32": "*fp32"}


def linear_kernel() -> Any:
    from lowbit_kernels.matmul.kernel import _linear_kernel

    return _linear_kernel


def linear_case(
    name: str,
    M: int,
    bits: int,
    group_size: int,
    x: str = "bf16",
    *,
    epilogue: str | None = None,
    asymmetric: bool = False,
    split: bool = False,
    expect: str = "mma",
) -> AotCase:
    config = choose_config(M, 1024, 1024, bits, num_sms=132)
    int8 = x == "int8"
    signature = {
        "x_ptr": TORCH_TO_TRITON[x],
        "qweight_ptr": "*u8",
        "scale_ptr": "*fp16" if asymmetric else "*fp32",
        "y_ptr": ("*i32" if int8 else "*fp32") if split else "*bf16",
        **dict.fromkeys(("M", "N", "K", "T", "N_out", "num_groups", "blocks_per_split"), "i32"),
        **dict.fromkeys(("stride_xb", "stride_xt", "stride_qn", "stride_rm"), "i32"),
    }
    absent = []
    for pointer, type_, present in (
        ("group_scale_ptr", "*u8", group_size and not asymmetric),
        ("zero_point_ptr", "*fp16", asymmetric),
        ("x_scale_ptr", "*fp32", int8),
        ("bias_ptr", "*bf16", not split),
        ("residual_ptr", "*bf16", not split),
        ("z_ptr", "*bf16", False),
    ):
        if present:
            signature[pointer] = type_
        else:
            absent.append(pointer)
    return AotCase(
        name=name,
        kernel=linear_kernel,
        signature=signature,
        constexprs={
            "BITS": bits,
            "GROUP_SIZE": group_size,
            "EPILOGUE": epilogue,
            "IS_SPLIT": split,
            "BLOCK_N": config.block_n,
            "BLOCK_M": config.block_m,
            "BLOCK_BYTES": config.block_bytes,
            **dict.fromkeys(absent),
        },
        aligned=tuple(n for n in signature if n not in ("M", "T", "num_groups", "blocks_per_split")),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        expect=expect,
    )


CASES = [
    linear_case("linear_w4g64_m499", 499, 4, 64, epilogue="gelu"),
    linear_case("linear_w4g64_m2000", 2000, 4, 64, epilogue="gelu"),
    linear_case("linear_w4g64_m2000_glu", 2000, 4, 64, epilogue="glu"),
    linear_case("linear_w4g64_m2000_fp16", 2000, 4, 64, "fp16"),
    linear_case("linear_w4g64_m16_split", 16, 4, 64, split=True),
    linear_case("linear_w4g64_m64_split", 64, 4, 64, split=True),
    linear_case("linear_w8_m2000", 2000, 8, 0, epilogue="gelu"),
    linear_case("linear_w8_m499", 499, 8, 0, epilogue="gelu"),
    linear_case("linear_w2g64_m2000", 2000, 2, 64, epilogue="gelu"),
    linear_case("linear_w1_m2000", 2000, 1, 0, epilogue="gelu"),
    linear_case("linear_w4g64_asymmetric_m2000", 2000, 4, 64, asymmetric=True),
    linear_case("linear_w4g64_a8_m2000", 2000, 4, 64, "int8", epilogue="gelu", expect="mma_s8"),
    linear_case("linear_w4g64_a8_m2000_glu", 2000, 4, 64, "int8", epilogue="glu", expect="mma_s8"),
    linear_case("linear_w4g64_a8_m499", 499, 4, 64, "int8", epilogue="gelu", expect="mma_s8"),
    linear_case("linear_w4g64_a8_m16_split", 16, 4, 64, "int8", split=True, expect="mma_s8"),
    linear_case("linear_w8_a8_m2000", 2000, 8, 0, "int8", epilogue="gelu", expect="mma_s8"),
    linear_case("linear_w2g64_a8_m2000", 2000, 2, 64, "int8", epilogue="gelu", expect="mma_s8"),
    linear_case("linear_w1_a8_m2000", 2000, 1, 0, "int8", epilogue="gelu", expect="mma_s8"),
]
