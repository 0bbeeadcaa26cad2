"""The kernels of the depthwise convolutions, with the shapes that Conformers give them.

Dimension key: B batch, C channels, T frames.
"""

import math

from bench.static.compile import AotCase

INTS = ("T", "T_out", "groups", "stride_xb", "stride_xt", "left")


def _kernel(module, name):
    def load():
        import importlib

        return getattr(importlib.import_module(f"lowbit_kernels.conv1d.kernels.{module}"), name)

    return load


def _case(name, module, kernel, signature, pointers, constants):
    options = {"num_warps": constants.pop("num_warps")}
    constants |= {p: None for p in pointers if p not in signature}
    aligned = tuple(p for p in signature if p.endswith("_ptr"))
    case_name = f"conv1d_depthwise_{name}"
    return AotCase(case_name, _kernel(module, kernel), signature, constants, aligned, options)


def depthwise(
    name, taps, C=512, stride=1, dtype="*bf16", weight="*i8", inputs=None, flip=False, upsample=1,
    many=True, norm=False, int8_rows=False, train=False,
):  # fmt: skip
    """``inputs``: None, or "utterance" or "frame", the scales of an int8 x."""
    import torch

    from lowbit_kernels.conv1d.kernels.depthwise import _constants

    signature = {
        "x_ptr": dtype if inputs is None else "*i8", "weight_ptr": weight, "lengths_ptr": "*i64",
        "y_ptr": "*i8" if int8_rows else dtype, **dict.fromkeys(INTS, "i32"),
    }  # fmt: skip
    signature |= {"scale_ptr": "*fp32"} if weight == "*i8" else {}
    signature |= {} if inputs is None else {"x_scale_ptr": "*fp32"}
    signature |= {} if flip else {"bias_ptr": dtype if train else "*fp32"}
    signature |= {"z_ptr": dtype} if train else {}
    signature |= {"norm_weight_ptr": dtype, "norm_bias_ptr": dtype} if norm else {}
    signature |= {"y_scale_ptr": "*fp32"} if int8_rows else {}
    whole_frames = norm or int8_rows
    torch_dtype = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}[dtype]
    constants, _ = _constants(
        C, math.gcd(C, 4 if whole_frames else 2), whole_frames, many, taps, stride, 1, upsample,
        flip, inputs == "frame", None if flip else "silu", 1e-5, torch_dtype, inputs is not None,
    )  # fmt: skip
    pointers = [
        f"{p}_ptr" for p in ("x_scale", "scale", "bias", "norm_weight", "norm_bias", "residual",
                             "out_scale", "z", "y_scale")
    ]  # fmt: skip
    return _case(
        name, "depthwise", "_depthwise_conv1d_kernel", signature, pointers, dict(constants.values)
    )


def weight_gradient(name, taps, C=512, stride=1, dtype="*bf16"):
    from lowbit_kernels.conv1d.kernels.depthwise_dw import constants_of

    pointers = {"dz_ptr": dtype, "x_ptr": dtype, "lengths_ptr": "*i64", "part_ptr": "*fp32"}
    ints = ("T", "T_out", "parts", "stride_db", "stride_dt", "stride_xb", "stride_xt", "left")
    return _case(
        name, "depthwise_dw", "_depthwise_conv1d_dw_kernel",
        pointers | dict.fromkeys(ints, "i32"), (), constants_of(C, 2, taps, stride, 1, 256),
    )  # fmt: skip


CASES = [
    depthwise("k31", 31),
    depthwise("k31_few", 31, C=1024, many=False),
    depthwise("k31_C324", 31, C=324),
    depthwise("k31_train", 31, train=True),
    depthwise("k31_float", 31, weight="*bf16"),
    depthwise("k3", 3),
    depthwise("k65_fp32", 65, dtype="*fp32"),
    depthwise("k31_int8", 31, inputs="utterance"),
    depthwise("k31_int8_frame", 31, inputs="frame"),
    depthwise("k5_stride2", 5, stride=2),
    depthwise("k31_dx", 31, flip=True),
    depthwise("k5_stride2_dx", 5, flip=True, upsample=2),
    depthwise("k31_norm", 31, C=1024, norm=True),
    depthwise("k31_norm_few", 31, C=1024, norm=True, many=False),
    depthwise("k31_norm_int8", 31, norm=True, int8_rows=True, many=False),
    depthwise("k31_to_int8", 31, C=1024, int8_rows=True),
    weight_gradient("k31_dw", 31),
    weight_gradient("k5_stride2_dw", 5, stride=2),
]
