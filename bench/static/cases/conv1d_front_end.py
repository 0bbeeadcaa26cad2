"""The kernels of a front end: its first layer, and what lies between int8 layers.

Dimension key: S samples, T frames, N channels.
"""

from dataclasses import replace

from bench.static.cases.matmul import linear_case
from bench.static.compile import AotCase
from bench.static.gpus import GPUS
from lowbit_kernels.conv1d.geometry import MAX_WINDOW


def _kernel(module, name):
    def load():
        import importlib

        return getattr(importlib.import_module(f"lowbit_kernels.conv1d.kernels.{module}"), name)

    return load


def _case(name, module, kernel, pointers, absent, integers, constants, options, expect=None):
    """``integers``: those in capitals and strides of parameters are divisible by 16."""
    signature = {f"{p}_ptr": t for p, t in pointers.items()} | dict.fromkeys(
        integers.split(), "i32"
    )
    aligned = [f"{p}_ptr" for p in pointers] + [
        i for i in ("N", "C", "size", "stride_sb") if i in signature
    ]
    return AotCase(
        f"front_end_{name}",
        _kernel(module, kernel),
        signature,
        {**{f"{p}_ptr": None for p in absent.split()}, **constants},
        tuple(aligned),
        options,
        expect,
    )


def first_layer(name, dtype="*bf16", norm="group", taps=10, activation="gelu", end=""):
    from lowbit_kernels.conv1d.kernels.first_layer import tiles

    is_layer = norm == "layer"
    pointers = {"x": dtype, "weight": dtype, "y": "*i8" if end == "int8" else dtype}
    if norm == "group":
        pointers |= {"gain": "*fp32", "shift": "*fp32"}
    elif norm == "layer":
        pointers |= {"shift": dtype, "norm_weight": dtype, "norm_bias": dtype}
    if end == "int8":
        pointers |= {"out_scale": "*fp32", "out_offset": "*fp32"}
    elif end == "range":
        pointers |= {"largest": "*fp32", "lengths": "*i64"}
    every = "gain shift norm_weight norm_bias lengths out_scale out_offset largest"
    block_t, block_n, num_warps = tiles(512, is_layer)
    return _case(
        f"first_{name}",
        "first_layer",
        "_first_layer_kernel",
        pointers,
        " ".join(p for p in every.split() if p not in pointers),
        "S T N tiles_t stride_xb stride_sb",
        {
            "TAPS": taps, "STRIDE": 5, "EPS": 1e-5 if is_layer else None, "EPILOGUE": activation,
            "EVEN_N": True, "BLOCK_T": block_t, "BLOCK_N": block_n,
        },
        {"num_warps": num_warps},
        "mma",
    )  # fmt: skip


def moments():
    from lowbit_kernels.conv1d.kernels.first_layer import CHUNK

    pointers = {"x": "*bf16", "lengths": "*i64", "total": "*fp32", "squares": "*fp32"}
    constants = {"TAPS": 10, "STRIDE": 5, "BLOCK": CHUNK, "WIDTH": MAX_WINDOW}
    return _case(
        "moments", "first_layer", "_moments_kernel", pointers, "", "S chunks stride_xb",
        constants, {"num_warps": 1},
    )  # fmt: skip


def fold():
    from lowbit_kernels.conv1d.kernels.first_layer import CHUNK, FOLD_CHANNELS, MERGED

    pointers = dict.fromkeys(("total", "squares", "gain", "shift"), "*fp32") | {"lengths": "*i64"}
    pointers |= dict.fromkeys(("weight", "norm_weight", "norm_bias", "padded"), "*bf16")
    constants = {
        "TAPS": 10, "STRIDE": 5, "EPS": 1e-5, "CHUNK": CHUNK, "WIDTH": MAX_WINDOW,
        "MERGED": MERGED, "BLOCK_N": FOLD_CHANNELS,
    }  # fmt: skip
    return _case(
        "fold_norm", "first_layer", "_fold_norm_kernel", pointers, "", "S N chunks",
        constants, {"num_warps": 8},
    )  # fmt: skip


def between(name, kernel, pointers, absent, integers, **constants):
    from lowbit_kernels.conv1d.kernels.utterance_int8 import BLOCK

    return _case(
        name, "utterance_int8", kernel, pointers, absent, integers,
        constants | {"BLOCK": BLOCK}, {"num_warps": 8},
    )  # fmt: skip


def product(target, name, ends):
    """Layer 1 of 10 s, whose end makes the next layer's int8 or finds its range."""
    case = linear_case(target, 15_999, 4, "int8", N=512, K=1536)
    signature = {k: v for k, v in case.signature.items() if k != "residual_ptr"} | ends
    constants = {k: v for k, v in case.constexprs.items() if k not in ends}
    return replace(
        case,
        name=f"front_end_{case.name}_{name}",
        signature=signature,
        constexprs=constants | {"residual_ptr": None},
        aligned=(*case.aligned, *ends),
    )


RANGE = {"largest_ptr": "*fp32", "out_offset_ptr": "*fp32"}
STATIC = {"y_ptr": "*i8", "out_scale_ptr": "*fp32", "out_offset_ptr": "*fp32"}

CASES = [
    *(product(target, "range", RANGE) for target in GPUS),
    *(product(target, "static", STATIC) for target in GPUS),
    first_layer("base"),
    first_layer("base_fp16", dtype="*fp16"),
    first_layer("base_int8", end="int8"),
    first_layer("base_range", end="range"),
    first_layer("large", norm="layer"),
    first_layer("large_int8", norm="layer", end="int8"),
    first_layer("plain_taps16", norm=None, taps=16, activation="silu"),
    moments(),
    fold(),
    between(
        "largest", "_largest_kernel", {"x": "*fp32", "lengths": "*i64", "part": "*fp32"}, "offset",
        "S B size C planes parts field hop",
    ),
    between(
        "quantize", "_quantize_kernel",
        {"x": "*bf16", "part": "*fp32", "q": "*i8", "scale": "*fp32"}, "offset",
        "size C tiles parts rows", IS_STATIC=False, IS_SCALE=False, PARTS=512,
    ),
    between(
        "zero_padding", "_zero_padding_kernel", {"y": "*bf16", "lengths": "*i64"}, "",
        "S size C tiles field hop",
    ),
]  # fmt: skip
