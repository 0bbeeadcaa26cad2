"""What the normalization kernels are compiled for ahead of time."""

from typing import Any

from lowbit_kernels.norm.group_norm_kernel import BLOCK_T, NUM_WARPS
from lowbit_kernels.norm.norm_quantize_kernel import MAX_FEATURES, default_config
from tests.aot.harness import AotCase


def pointers(names: str, dtype: str) -> dict[str, str]:
    return {f"{name}_ptr": f"*{dtype}" for name in names.split()}


def group_norm_kernel(name: str) -> Any:
    from lowbit_kernels.norm import group_norm_kernel

    return getattr(group_norm_kernel, f"_masked_group_norm_{name}_kernel")


def norm_quantize_kernel(name: str) -> Any:
    from lowbit_kernels.norm import norm_quantize_kernel

    return getattr(norm_quantize_kernel, f"_norm_quantize_{name}_kernel")


def group_norm_cases(dtype: str) -> list[AotCase]:
    shared = pointers("mean rstd", "fp32") | {"lengths_ptr": "*i64"}
    tensors = {
        "fwd": pointers("x weight bias y", dtype) | shared,
        "bwd": pointers("grad x weight dx", dtype) | shared | pointers("dweight dbias", "fp32"),
    }
    sizes = {"C": "i32", "T": "i32", "G": "i32"}
    return [
        AotCase(
            name=f"norm-masked_group_norm-{name}-{dtype}",
            kernel=lambda name=name: group_norm_kernel(name),
            signature=signature | sizes | ({"eps": "fp32"} if name == "fwd" else {}),
            constexprs={"BLOCK_T": BLOCK_T},
            aligned=tuple(signature),
            options={"num_warps": NUM_WARPS},
        )
        for name, signature in tensors.items()
    ]


def norm_quantize_cases(dtype: str, num_features: int) -> list[AotCase]:
    block_n, num_warps = default_config(num_features)
    statistics = pointers("mean rstd", "fp32")
    forward = pointers("x residual weight bias h y", dtype) | statistics
    forward |= {"q_ptr": "*i8", "scale_ptr": "*fp32"}
    backward = pointers("grad_y grad_h h weight dh", dtype) | statistics
    backward |= pointers("dweight dbias", "fp32")
    sizes = {
        "fwd": {"N": "i32", "eps": "fp32"},
        "bwd": {"M": "i32", "N": "i32", "NUM_PROGRAMS": "i32"},
    }
    return [
        AotCase(
            name=f"norm-norm_quantize-{name}-{dtype}-n{num_features}",
            kernel=lambda name=name: norm_quantize_kernel(name),
            signature=signature | sizes[name],
            constexprs={"BLOCK_N": block_n},
            aligned=(*signature, "N"),
            options={"num_warps": num_warps},
        )
        for name, signature in (("fwd", forward), ("bwd", backward))
    ]


CASES = [
    *group_norm_cases("bf16"),
    *group_norm_cases("fp32"),
    *norm_quantize_cases("bf16", 768),
    *norm_quantize_cases("fp32", 1024),
    *norm_quantize_cases("bf16", MAX_FEATURES),
]
