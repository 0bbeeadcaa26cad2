"""What the kernels of normalizations and activations are compiled for ahead of time."""

from typing import Any

from bench.static.compile import AotCase
from lowbit_kernels.norm.group_norm_kernel import BLOCK_T, NUM_WARPS
from lowbit_kernels.norm.norm_quantize_kernel import MAX_FEATURES, backward_tiles, row_tiles

FEATURES = (768, 1024, 3072, 4096, MAX_FEATURES)


def pointers(names: str, dtype: str) -> dict[str, str]:
    return {f"{name}_ptr": f"*{dtype}" for name in names.split()}


def integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def group_norm_kernel(name: str) -> Any:
    from lowbit_kernels.norm import group_norm_kernel

    return getattr(group_norm_kernel, f"_masked_group_norm_{name}_kernel")


def norm_quantize_kernel(name: str) -> Any:
    from lowbit_kernels.norm import norm_quantize_kernel

    return getattr(norm_quantize_kernel, f"_norm_quantize_{name}_kernel")


def activation_quantize_kernel() -> Any:
    from lowbit_kernels.norm.activation_quantize_kernel import _activation_quantize_kernel

    return _activation_quantize_kernel


def group_norm_cases(dtype: str) -> list[AotCase]:
    shared = pointers("mean rstd", "fp32") | {"lengths_ptr": "*i64"}
    tensors = {
        "fwd": pointers("x weight bias y", dtype) | shared,
        "bwd": pointers("grad x weight dx", dtype) | shared | pointers("dweight dbias", "fp32"),
    }
    return [
        AotCase(
            name=f"norm-masked_group_norm-{name}-{dtype}",
            kernel=lambda name=name: group_norm_kernel(name),
            signature=signature | integers("C T G") | ({"eps": "fp32"} if name == "fwd" else {}),
            constexprs={"BLOCK_T": BLOCK_T},
            aligned=tuple(signature),
            options={"num_warps": NUM_WARPS},
        )
        for name, signature in tensors.items()
    ]


def norm_quantize_case(name: str, dtype: str, N: int) -> AotCase:
    tensors = pointers("mean rstd", "fp32")
    if name == "fwd":
        tensors |= pointers("x residual weight bias h y", dtype)
        tensors |= {"q_ptr": "*i8", "scale_ptr": "*fp32"}
        sizes = integers("M") | {"eps": "fp32"}
        strides = integers("stride_xm stride_rm stride_qm")
        block_m, block_n, num_warps = row_tiles(N)
    else:
        tensors |= pointers("grad_y grad_h h weight dh", dtype) | pointers("dweight dbias", "fp32")
        sizes, strides = integers("M NUM_PROGRAMS"), integers("stride_ym stride_gm stride_hm")
        block_m, block_n, num_warps = backward_tiles(N)
    return AotCase(
        name=f"norm-norm_quantize-{name}-{dtype}-n{N}",
        kernel=lambda: norm_quantize_kernel(name),
        signature=tensors | sizes | strides,
        constexprs={"N": N, "BLOCK_M": block_m, "BLOCK_N": block_n},
        aligned=(*tensors, *strides),
        options={"num_warps": num_warps},
    )


def activation_quantize_case(activation: str, dtype: str, N: int, training: bool) -> AotCase:
    tensors = pointers("x", dtype) | {"q_ptr": "*i8", "scale_ptr": "*fp32"}
    tensors |= pointers("y", dtype) if training else {}
    strides = integers("stride_xm stride_qm")
    block_m, block_n, num_warps = row_tiles(N)
    return AotCase(
        name=f"norm-activation_quantize-{activation}{'-y' * training}-{dtype}-n{N}",
        kernel=activation_quantize_kernel,
        signature=tensors | integers("M") | strides,
        constexprs={
            "static_scale_ptr": None, "N": N, "ACTIVATION": activation, "TO_HALF": dtype != "fp32",
            "BLOCK_M": block_m, "BLOCK_N": block_n,
        } | ({} if training else {"y_ptr": None}),
        aligned=(*tensors, *strides),
        options={"num_warps": num_warps},
    )  # fmt: skip


CASES = [
    *group_norm_cases("bf16"),
    *group_norm_cases("fp32"),
    *(norm_quantize_case(name, "bf16", N) for name in ("fwd", "bwd") for N in FEATURES),
    *(norm_quantize_case(name, "fp32", N) for name in ("fwd", "bwd") for N in (1024, MAX_FEATURES)),
    *(activation_quantize_case("gelu", "bf16", N, training=False) for N in FEATURES),
    *(activation_quantize_case("gelu", "fp32", N, training=True) for N in (1024, MAX_FEATURES)),
    *(activation_quantize_case(a, "bf16", 3072, False) for a in ("gelu_tanh", "silu", "glu")),
]
