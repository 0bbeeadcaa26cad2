"""What the attention kernels are compiled for ahead of time: the defaults of every target."""

from collections.abc import Callable
from typing import Any

import torch

from bench.static.compile import AotCase
from bench.static.gpus import GPUS
from lowbit_kernels.attention.config import default_config, input_precision

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = ("forward", "backward_dq", "backward_dkdv")
PROBLEMS = [  # dtype, D, whether the scores have a bias, dropout and a window
    ("bf16", 64, False),
    ("bf16", 128, False),
    ("bf16", 256, False),
    ("fp16", 36, True),
    ("bf16", 64, True),
    ("bf16", 81, True),
    ("bf16", 128, True),
    ("bf16", 256, True),
    ("fp32", 64, True),
    ("fp32", 128, True),
    ("fp32", 256, True),
]


def load_kernel(kernel: str) -> Callable[[], Any]:
    def load() -> Any:
        from lowbit_kernels.attention import backward_kernel, forward_kernel

        return {
            "forward": forward_kernel._flash_attention_fwd_kernel,
            "backward_delta": backward_kernel._flash_attention_bwd_delta_kernel,
            "backward_dq": backward_kernel._flash_attention_bwd_dq_kernel,
            "backward_dkdv": backward_kernel._flash_attention_bwd_dkdv_kernel,
        }[kernel]

    return load


def strides(names: str) -> dict[str, str]:
    return {f"stride_{name}": "i32" for name in names.split()}


def scores_case(target: str, kernel: str, dtype: str, head_dim: int, everything: bool) -> AotCase:
    config = default_config(
        kernel, head_dim, DTYPES[dtype], everything, GPUS[target].program_shared_bytes
    )
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("q", "k", "v")}
    pointers |= {"lengths_ptr": "*i64", "lse_ptr": "*fp32"}
    head_strides = strides("qb qh qt kb kh kt vb vh vt ob oh ot")
    constants: dict[str, Any] = {"bias_ptr": None, "seed_ptr": None, "window": None}
    signature = {"H": "i32", "T": "i32", "scale": "fp32", "dropout_p": "fp32"}
    if everything:
        constants = {}
        pointers |= {"bias_ptr": f"*{dtype}", "seed_ptr": "*i64"}
        signature["window"] = "i32"
    if kernel == "forward":
        pointers["out_ptr"] = f"*{dtype}"
    else:
        pointers |= {"grad_ptr": f"*{dtype}", "delta_ptr": "*fp32"}
        head_strides |= strides("gb gh gt")
    if kernel == "backward_dkdv":
        pointers |= {"dk_ptr": f"*{dtype}", "dv_ptr": f"*{dtype}"}
    if kernel == "backward_dq":
        pointers["dq_ptr"] = f"*{dtype}"
        if everything:
            pointers["dbias_ptr"] = "*fp32"
        else:
            constants["dbias_ptr"] = None
    constants |= {
        "D": head_dim,
        "BLOCK_D": config.block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "INPUT_PRECISION": input_precision(DTYPES[dtype]),
    }
    # sm_90's wgmma takes 64 rows a warp group
    rows = config.block_n if kernel == "backward_dkdv" else config.block_m
    instruction = "mma" if rows >= 64 else "mma_sync"
    return AotCase(
        name=f"attention-{kernel}-{dtype}-d{head_dim}{'-everything' * everything}-{target}",
        kernel=load_kernel(kernel),
        signature=pointers | signature | head_strides | strides("ab ah aq ak"),
        constexprs=constants,
        # heads of 8 features start on 16 bytes; frames of a bias need not
        aligned=(*pointers, *(head_strides if head_dim % 16 == 0 else ())),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        expect=None if dtype == "fp32" else instruction,
        targets=(target,),
    )


def delta_case() -> AotCase:
    pointers = {"out_ptr": "*bf16", "grad_ptr": "*bf16", "delta_ptr": "*fp32"}
    return AotCase(
        name="attention-backward_delta-bf16-d64",
        kernel=load_kernel("backward_delta"),
        signature=pointers | {"H": "i32", "T": "i32"} | strides("ob oh ot gb gh gt"),
        constexprs={"D": 64, "BLOCK_D": 64, "BLOCK_M": 64},
        aligned=(*pointers, *strides("ob oh ot gb gh gt")),
        options={"num_warps": 4},
    )


CASES = [
    delta_case(),
    *(
        scores_case(target, kernel, *problem)
        for target in GPUS
        for kernel in KERNELS
        for problem in PROBLEMS
    ),
]
