"""What the attention kernels are compiled for ahead of time: the defaults of every target."""

from collections.abc import Callable
from typing import Any

import torch

from bench.static.compile import AotCase
from bench.static.gpus import GPUS
from lowbit_kernels.attention.config import (
    MAX_FP32_HEAD_DIM,
    clips_offsets,
    default_config,
    input_precision,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = ("forward", "backward_dq", "backward_dkdv", "offsets")
PROBLEMS = [  # dtype, D, kind of the position scheme, whether there are dropout and a window
    ("bf16", 64, None, False),
    ("bf16", 128, None, False),
    ("bf16", 256, None, False),
    ("bf16", 64, None, True),
    ("fp16", 36, "dense", True),
    ("bf16", 64, "dense", True),
    ("bf16", 81, "dense", True),
    ("bf16", 128, "dense", True),
    ("bf16", 256, "dense", True),
    ("fp32", 64, "dense", True),
    ("fp32", 128, "dense", True),
    ("fp32", 256, "dense", True),
    ("bf16", 64, "offset", True),
    ("bf16", 80, "offset", False),
    ("fp32", 64, "offset", True),
    ("bf16", 64, "relative", False),
    ("bf16", 128, "relative", False),
    ("fp16", 36, "relative", True),
    ("bf16", 64, "relative", True),
    ("bf16", 81, "relative", True),
    ("bf16", 256, "relative", True),
    ("fp32", 64, "relative", True),
    ("fp32", 128, "relative", True),
    ("fp32", 256, "relative", True),
]
# of the forward without gradients: biases added to the queries, an int8 result
INFERENCE = [
    ("bf16", 64, None),
    ("bf16", 64, "relative"),
    ("fp16", 36, "relative"),
    ("bf16", 128, "relative"),
    ("bf16", 256, "relative"),
    ("fp32", 64, "relative"),
    ("fp32", 128, "relative"),
    ("fp32", 256, "relative"),
]


# with a window and no dropout
WINDOWED = [("bf16", 64, None), ("bf16", 128, None), ("bf16", 256, None), ("bf16", 64, "relative")]
# utterances one after the other
PACKED = [
    ("bf16", 64, None, False),
    ("fp16", 36, "offset", True),
    ("bf16", 64, "relative", False),
    ("bf16", 81, "relative", True),
    ("fp32", 64, "relative", True),
]
# with int8 queries and keys
INT8 = [
    ("bf16", 64, None),
    ("fp16", 128, None),
    ("bf16", 256, None),
    ("bf16", 64, "offset"),
    ("bf16", 64, "relative"),
    ("fp32", 64, None),
]

# with low-bit probabilities, all kernels but the plain forward
LOW_BIT = [
    ("bf16", 64, None, False),
    ("bf16", 128, None, False),
    ("bf16", 256, None, False),
    ("bf16", 64, "dense", False),
    ("bf16", 64, "relative", False),
    ("bf16", 64, None, True),
    ("fp16", 36, "offset", True),
    ("bf16", 81, "relative", True),
    ("fp32", 64, None, False),
    ("fp32", 64, "relative", True),
    ("fp32", 256, "dense", True),
]
LOW_BIT_KERNELS = ("low_bit", "low_bit_delta", "backward_dq", "backward_dkdv", "offsets")


def is_served(kernel: str, dtype: str, head_dim: int, kind: str | None, everything: bool) -> bool:
    """Whether the kernel has such a problem."""
    if kind not in ("offset", "relative"):
        return kernel != "offsets"
    return dtype != "fp32" or kernel in ("forward", "low_bit") or head_dim <= MAX_FP32_HEAD_DIM


def load_kernel(kernel: str) -> Callable[[], Any]:
    def load() -> Any:
        from lowbit_kernels.attention import (
            backward_kernel,
            forward_kernel,
            gate_kernel,
            int8_kernel,
            low_bit_kernel,
            offsets_kernel,
        )

        return {
            "forward": forward_kernel._flash_attention_fwd_kernel,
            "backward_delta": backward_kernel._flash_attention_bwd_delta_kernel,
            "backward_dq": backward_kernel._flash_attention_bwd_dq_kernel,
            "backward_dkdv": backward_kernel._flash_attention_bwd_dkdv_kernel,
            "offsets": offsets_kernel._flash_attention_bwd_offsets_kernel,
            "low_bit": low_bit_kernel._low_bit_attention_fwd_kernel,
            "low_bit_delta": low_bit_kernel._low_bit_attention_delta_kernel,
            "quantize_heads": int8_kernel._quantize_heads_kernel,
            "position_gate": gate_kernel._position_gate_kernel,
        }[kernel]

    return load


def strides(names: str) -> dict[str, str]:
    return {f"stride_{name}": "i32" for name in names.split()}


def scores_case(
    target: str, kernel: str, dtype: str, head_dim: int, kind: str | None, everything: bool,
    inference: bool = False, bits: int = 0, int8: bool = False, has_window: bool = False,
    is_packed: bool = False, clipped: bool = False,
) -> AotCase:  # fmt: skip
    config = default_config(
        kernel, head_dim, DTYPES[dtype], kind,
        everything, GPUS[target].program_shared_bytes,
    )  # fmt: skip
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "v")}
    pointers |= {"lengths_ptr": "*i32" if is_packed else "*i64", "lse_ptr": "*fp32"}
    head_strides = strides("qb qh qt kb kh kt vb vh vt ob oh ot")
    constants: dict[str, Any] = {"KIND": kind}
    if not kernel.startswith("low_bit"):
        constants["IS_PACKED"] = is_packed
    if bits:
        pointers["step_ptr"], constants["HIGH"] = "*fp32", 2**bits - 1
    elif kernel != "forward":
        constants |= {"step_ptr": None, "HIGH": 0}
    elif int8:
        pointers |= {"q_ptr": "*i8", "k_ptr": "*i8", "block_scales_ptr": "*fp32"}
    else:
        constants["block_scales_ptr"] = None
    signature = {"H": "i32", "T": "i32", "scale": "fp32", "dropout_p": "fp32", "largest": "i32"}
    if everything:
        pointers["seed_ptr"] = "*i64"
        signature["window"] = "i32"
    else:
        constants |= {"seed_ptr": None} if has_window else {"seed_ptr": None, "window": None}
        signature |= {"window": "i32"} if has_window else {}
    if clipped:
        signature["right"] = "i32"
    elif kernel == "forward":
        constants["right"] = None
    names = {None: "", "dense": "table", "offset": "table rows", "relative": "table rows"}[kind]
    if inference and kind == "relative":
        names = "table" if clipped else "table content position"
    names += " out_scale" * (inference and not clipped)
    optional = ("content", "position", "out_scale") if kernel == "forward" else ()
    for name in ("table", "rows", *optional):
        if name in names.split():
            pointers[f"{name}_ptr"] = "*fp32" if name == "out_scale" else f"*{dtype}"
        else:
            constants[f"{name}_ptr"] = None
    gradients = {
        "forward": "", "backward_dkdv": "dk dv", "low_bit": "", "low_bit_delta": "",
        "backward_dq": {"dense": "dq dtable", "relative": "dq drows"}.get(str(kind), "dq"),
        "offsets": "dtable",
    }[kernel].split()  # fmt: skip
    if kernel == "forward":
        pointers["out_ptr"] = "*i8" if inference and not clipped else f"*{dtype}"
    elif kernel == "low_bit":
        pointers["out_ptr"] = f"*{dtype}"
    else:
        pointers |= {"grad_ptr": f"*{dtype}", "delta_ptr": "*fp32"}
        head_strides |= strides("gb gh gt")
    pointers |= {f"{name}_ptr": f"*{dtype}" for name in gradients}
    if "dtable" in gradients:
        pointers["dtable_ptr"] = "*fp32"
    if kernel == "low_bit_delta":
        pointers["dstep_ptr"] = "*fp32"
        head_strides = {n: t for n, t in head_strides.items() if not n.startswith("stride_o")}
    if kernel == "backward_dq":
        if kind == "offset":
            pointers["drows_ptr"] = "*fp32"
        constants |= {f"{n}_ptr": None for n in ("dtable", "drows") if f"{n}_ptr" not in pointers}
    if kernel == "offsets":
        blocks = {"BLOCK": config.block_n}
        head_strides = {n: t for n, t in head_strides.items() if not n.startswith("stride_o")}
    else:
        blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    constants |= blocks | {
        "D": head_dim,
        "BLOCK_D": max(32, config.block_d) if int8 else config.block_d,
        "INPUT_PRECISION": input_precision(DTYPES[dtype]),
    }
    # inputs are padded to features that make it so; a dense bias may begin anywhere
    multiples = [name for name in head_strides if head_dim % 16 == 0 or "_o" not in name]
    if kind == "relative":
        multiples += strides("ab ah aq rb rh rt")
    terms = (f"-{kind}" if kind else "") + "-everything" * everything + "-inference" * inference
    terms += f"-{bits}bit" if bits else "-int8" * int8
    terms += "-window" * has_window + "-packed" * is_packed + "-clipped" * clipped
    # sm_90's wgmma takes 64 rows a warp group; a band of offsets has as many as queries and keys
    rows = config.block_n if kernel == "backward_dkdv" else config.block_m
    rows *= 2 if kernel == "backward_dkdv" and kind == "relative" else 1
    instruction = "mma" if rows >= 64 else "mma_sync"
    instruction += "_s8" * int8
    # with a position, int8 products are not the first that are met everywhere
    is_known = dtype != "fp32" and not (int8 and kind)
    return AotCase(
        name=f"attention-{kernel}-{dtype}-d{head_dim}{terms}-{target}",
        kernel=load_kernel(kernel),
        signature=pointers | signature | head_strides | strides("ab ah aq ak rb rh rt"),
        constexprs=constants,
        aligned=(*pointers, *multiples),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        expect=instruction if is_known else None,
        targets=(target,),
    )


def delta_case(is_packed: bool) -> AotCase:
    pointers = {"out_ptr": "*bf16", "grad_ptr": "*bf16", "delta_ptr": "*fp32"}
    if is_packed:
        pointers["lengths_ptr"] = "*i32"
    return AotCase(
        name="attention-backward_delta-bf16-d64" + "-packed" * is_packed,
        kernel=load_kernel("backward_delta"),
        signature=pointers | {"H": "i32", "T": "i32"} | strides("ob oh ot gb gh gt"),
        constexprs={"D": 64, "BLOCK_D": 64, "BLOCK_M": 64, "IS_PACKED": is_packed}
        | ({} if is_packed else {"lengths_ptr": None}),
        aligned=(*pointers, *strides("ob oh ot gb gh gt")),
        options={"num_warps": 4},
    )


def quantize_heads_case(dtype: str, head_dim: int) -> AotCase:
    """Queries and keys to int8."""
    pointers = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "lengths_ptr": "*i64"}
    pointers |= {"q_out_ptr": "*i8", "k_out_ptr": "*i8", "scales_ptr": "*fp32"}
    of_heads = strides("qb qh qt kb kh kt ob oh ot")
    block_d = 1 << (head_dim - 1).bit_length()
    return AotCase(
        name=f"attention-quantize_heads-{dtype}-d{head_dim}",
        kernel=load_kernel("quantize_heads"),
        signature=pointers | {"H": "i32", "T": "i32"} | of_heads,
        constexprs={"D": head_dim, "BLOCK_D": block_d, "BLOCK": 64},
        aligned=(*pointers, *(of_heads if head_dim % 16 == 0 else strides("qb qh qt kb kh kt"))),
        options={"num_warps": max(4, block_d // 16)},
    )


def gate_case(dtype: str, head_dim: int) -> AotCase:
    """The gate of WavLM's position bias."""
    from lowbit_kernels.attention.gate_kernel import tile_rows

    block_d = 1 << (head_dim - 1).bit_length()
    tensors = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weight", "bias", "const")}
    tensors |= {"out_ptr": "*fp32"}
    return AotCase(
        name=f"attention-position_gate-{dtype}-d{head_dim}",
        kernel=load_kernel("position_gate"),
        signature=tensors | {"M": "i32", "T": "i32", "H": "i32"} | strides("b t"),
        constexprs={"D": head_dim, "BLOCK_M": tile_rows(block_d), "BLOCK_D": block_d},
        aligned=(*tensors, *strides("b t")),
        options={"num_warps": 4},
    )


CASES = [
    delta_case(False),
    delta_case(True),
    *(gate_case(*problem) for problem in (("bf16", 64), ("bf16", 81), ("fp32", 256))),
    *(
        scores_case(target, kernel, *problem)
        for target in GPUS
        for kernel in KERNELS
        for problem in PROBLEMS
        if is_served(kernel, *problem)
    ),
    *(
        scores_case(target, "forward", *problem, everything=False, inference=True)
        for target in GPUS
        for problem in INFERENCE
    ),
    *(
        scores_case(target, "forward", *problem, everything=False, inference=True, clipped=True)
        for target in GPUS
        for problem in INFERENCE
        if problem[2] == "relative" and clips_offsets(problem[1], DTYPES[problem[0]])
    ),
    *(
        scores_case(target, kernel, *problem, everything=False, has_window=True)
        for target in GPUS
        for kernel in KERNELS
        for problem in WINDOWED
        if is_served(kernel, *problem, False)
    ),
    *(
        scores_case(target, kernel, *problem, is_packed=True)
        for target in GPUS
        for kernel in KERNELS
        for problem in PACKED
        if is_served(kernel, *problem)
    ),
    *(quantize_heads_case(*problem) for problem in (("bf16", 64), ("fp16", 81), ("fp32", 256))),
    *(
        scores_case(target, "forward", *problem, everything=False, int8=True)
        for target in GPUS
        for problem in INT8
    ),
    *(
        scores_case(target, kernel, *problem, bits=8)
        for target in GPUS
        for kernel in LOW_BIT_KERNELS
        for problem in LOW_BIT
        if is_served(kernel, *problem)
    ),
]
