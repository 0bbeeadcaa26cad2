"""What the kernels of normalizations and activations are compiled for ahead of time."""

from typing import Any

from bench.static.compile import AotCase
from lowbit_kernels.norm.channel_kernel import channel_tiles
from lowbit_kernels.norm.norm_quantize_kernel import MAX_FEATURES, backward_tiles, row_tiles

FEATURES = (768, 1024, 3072, 4096, MAX_FEATURES)


def pointers(names: str, dtype: str) -> dict[str, str]:
    return {f"{name}_ptr": f"*{dtype}" for name in names.split()}


def integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def channel_kernel(name: str) -> Any:
    from lowbit_kernels.norm import channel_kernel

    return getattr(channel_kernel, f"_{name}_kernel")


def norm_quantize_kernel(name: str) -> Any:
    from lowbit_kernels.norm import norm_quantize_kernel

    return getattr(norm_quantize_kernel, f"_norm_quantize_{name}_kernel")


def channel_case(name: str, dtype: str, channel_last: bool, activation: str | None) -> AotCase:
    """A pass over [B, C, T] of masked_group_norm or masked_batch_norm."""
    statistics = pointers("mean rstd", "fp32")
    applied = pointers("x weight bias", dtype) | statistics
    backward = applied | pointers("grad", dtype)
    kernel, tensors, strided, absent = {
        "statistics": ("statistics", pointers("x", dtype) | pointers("moments", "fp32"), "x", ()),
        "normalize": ("normalize", applied | pointers("y", dtype), "xy", ()),
        "sums": (
            "normalize_bwd", backward | pointers("sums", "fp32"), "gxd", ("means_ptr", "dx_ptr")
        ),
        "dx": (
            "normalize_bwd", backward | pointers("means", "fp32") | pointers("dx", dtype), "gxd",
            ("sums_ptr",),
        ),
    }[name]  # fmt: skip
    tensors |= {"lengths_ptr": "*i64"}
    near, far = ("c", "t") if channel_last else ("t", "c")
    strides = integers(" ".join(f"stride_{x}b stride_{x}{far}" for x in strided))
    strides |= {} if kernel == "statistics" else integers("stride_s")
    constants = channel_tiles(channel_last)
    options = {"num_warps": constants.pop("num_warps")}
    constants |= dict.fromkeys(absent) | {f"stride_{x}{near}": 1 for x in strided}
    if kernel != "statistics":
        constants |= {"ACTIVATION": activation, "TO_HALF": dtype != "fp32"}
    layout = "last" if channel_last else "first"
    return AotCase(
        name=f"norm-channels-{name}-{activation}-{layout}-{dtype}",
        kernel=lambda: channel_kernel(kernel),
        signature=tensors | integers("T C") | strides,
        constexprs=constants,
        # frames are not padded to multiples of anything
        aligned=(*tensors, "C", *(strides if channel_last else ())),
        options=options,
    )


MERGE_CASE = AotCase(
    name="norm-channels-merge",
    kernel=lambda: channel_kernel("merge"),
    signature=pointers("moments merged mean rstd", "fp32") | integers("E C") | {"eps": "fp32"},
    constexprs={"BLOCK_E": 32, "BLOCK_C": 32},
    aligned=("moments_ptr", "merged_ptr", "mean_ptr", "rstd_ptr", "C"),
    options={"num_warps": 4},
)


def norm_quantize_case(
    name: str,
    dtype: str,
    N: int,
    activation: str | None = None,
    out: str = "int8",
    first: bool = False,
) -> AotCase:
    """With an activation: valid frames of utterances; to int8 or, ``out="y"``, to x's dtype."""
    tensors = pointers("mean rstd", "fp32")
    constants: dict[str, Any] = {"N": N, "ACTIVATION": activation, "TO_HALF": dtype != "fp32"}
    if activation is None:
        constants |= {"lengths_ptr": None}
    else:
        tensors |= {"lengths_ptr": "*i64"}
    if name == "fwd":
        constants |= {"static_scale_ptr": None, "offset_ptr": None}
        if first:
            tensors |= pointers("first_weight first_bias h", dtype)
        else:
            constants |= {"first_weight_ptr": None, "first_bias_ptr": None}
        tensors |= pointers("x weight bias", dtype) | {"scale_ptr": "*fp32"}
        if first:
            constants |= {"residual_ptr": None}
        elif activation is None:
            tensors |= pointers("residual h", dtype)
        else:
            constants |= {"residual_ptr": None, "h_ptr": None}
        if out == "y" or (activation is None and not first):
            tensors |= pointers("y", dtype)
        else:
            constants |= {"y_ptr": None}
        if out == "y":
            constants |= {"q_ptr": None}
        else:
            tensors |= {"q_ptr": "*i8"}
        sizes = integers("M T") | {"first_eps": "fp32", "eps": "fp32"}
        strides = integers("stride_xm stride_rm stride_qm")
        block_m, block_n, num_warps = row_tiles(N)
    else:
        tensors |= pointers("grad_y grad_h h weight bias dh", dtype)
        tensors |= pointers("dweight dbias", "fp32")
        sizes, strides = integers("M T NUM_PROGRAMS"), integers("stride_ym stride_gm stride_hm")
        block_m, block_n, num_warps = backward_tiles(N)
    variant = "" if activation is None else f"-{activation}-{out}"
    variant = f"-second-{out}" if first else variant
    return AotCase(
        name=f"norm-norm_quantize-{name}{variant}-{dtype}-n{N}",
        kernel=lambda: norm_quantize_kernel(name),
        signature=tensors | sizes | strides,
        constexprs=constants | {"BLOCK_M": block_m, "BLOCK_N": block_n},
        aligned=(*tensors, *strides),
        options={"num_warps": num_warps},
    )


PASSES = ("statistics", "normalize", "sums", "dx")
CHANNEL_CASES = [
    *((name, "bf16", True, "gelu") for name in PASSES),
    *((name, "bf16", True, "silu") for name in PASSES[1:]),
    *((name, "bf16", False, "gelu") for name in PASSES),
    *((name, "fp32", channel_last, "gelu") for channel_last in (True, False) for name in PASSES),
]
CASES = [
    *(channel_case(*case) for case in CHANNEL_CASES),
    MERGE_CASE,
    *(norm_quantize_case("fwd", "bf16", 512, "gelu", out) for out in ("int8", "y")),
    *(norm_quantize_case("bwd", "bf16", N, "gelu", "y") for N in (512, MAX_FEATURES)),
    norm_quantize_case("fwd", "bf16", MAX_FEATURES, "gelu", "y"),
    norm_quantize_case("bwd", "fp32", 512, "gelu", "y"),
    *(norm_quantize_case(name, "bf16", N) for name in ("fwd", "bwd") for N in FEATURES),
    *(norm_quantize_case("fwd", "bf16", 1024, None, out, True) for out in ("int8", "y")),
    *(norm_quantize_case("fwd", dtype, MAX_FEATURES, first=True) for dtype in ("bf16", "fp32")),
    *(norm_quantize_case(name, "fp32", N) for name in ("fwd", "bwd") for N in (1024, MAX_FEATURES)),
]
