"""The kernels of the one-dimensional convolutions, with the shapes that speech encoders give them.

Dimension key: B batch, C input channels, N output channels, T input frames, T_out output frames.
"""

from bench.static.compile import AotCase


def _kernel(module, name):
    def load():
        import importlib

        return getattr(importlib.import_module(f"lowbit_kernels.conv1d.kernels.{module}"), name)

    return load


def _weight(bits, group_size, asymmetric=False):
    """Types, and the constants of pointers that are not there, of a packed weight."""
    types = {"qweight_ptr": "*u8", "scale_ptr": "*fp16" if asymmetric else "*fp32"}
    if asymmetric:
        types["zero_point_ptr"] = "*fp16"
    elif group_size:
        types["group_scale_ptr"] = "*u8"
    absent = {"group_scale_ptr", "zero_point_ptr"} - set(types)
    return types, {**dict.fromkeys(absent), "BITS": bits, "GROUP_SIZE": group_size}


def depthwise(name, taps, stride=1, dtype="*bf16", int8=False, flip=False, upsample=1):
    signature = {
        "x_ptr": "*i8" if int8 else dtype, "level_ptr": "*i8", "scale_ptr": "*fp32",
        "lengths_ptr": "*i64", "y_ptr": dtype, "T": "i32", "T_out": "i32", "C": "i32",
        "chunks": "i32", "stride_xb": "i32", "stride_xt": "i32", "left": "i32",
    }  # fmt: skip
    if not flip:
        signature |= {"bias_ptr": dtype, "z_ptr": dtype}
    if int8:
        signature["input_scale_ptr"] = "*fp32"
    pointers = ("input_scale_ptr", "bias_ptr", "residual_ptr", "z_ptr")
    constants = {
        "TAPS": taps, "STRIDE": stride, "DILATION": 1, "UPSAMPLE": upsample, "OUT_STEP": 1,
        "TAP_STEP": stride, "FLIP": flip, "EPILOGUE": None if flip else "silu", "WINDOW": 8,
        "BLOCK_C": 64,
    }  # fmt: skip
    return AotCase(
        f"conv1d_depthwise_{name}",
        _kernel("depthwise", "_depthwise_conv1d_kernel"),
        signature,
        {**dict.fromkeys(p for p in pointers if p not in signature), **constants},
        ("x_ptr", "level_ptr", "scale_ptr", "bias_ptr", "y_ptr", "z_ptr", "C", "stride_xb",
         "stride_xt") if not flip else ("x_ptr", "level_ptr", "y_ptr", "C"),
        {"num_warps": 1},
    )  # fmt: skip


def implicit_gemm(
    name, c_group, bits=4, group_size=64, dtype="*bf16", int8=False, dilation=1, asymmetric=False
):
    weight, weight_constants = _weight(bits, group_size, asymmetric)
    signature = {
        **weight, "x_ptr": "*i8" if int8 else dtype, "bias_ptr": dtype, "residual_ptr": dtype,
        "lengths_ptr": "*i64", "y_ptr": dtype, "T": "i32", "T_out": "i32", "N": "i32", "K": "i32",
        "N_group": "i32", "num_scales": "i32", "tiles_t": "i32", "stride_xb": "i32",
        "stride_xt": "i32", "stride_qn": "i32", "left": "i32",
    }  # fmt: skip
    if int8:
        signature["input_scale_ptr"] = "*fp32"
    constants = {"z_ptr": None} if int8 else {"z_ptr": None, "input_scale_ptr": None}
    from lowbit_kernels.conv1d.kernels.implicit_gemm import BLOCK_N, BLOCK_T

    constants |= {
        "C_GROUP": c_group, "STRIDE": 1, "DILATION": dilation, "EPILOGUE": "gelu",
        "BLOCK_N": BLOCK_N, "BLOCK_T": BLOCK_T[bits],
    }  # fmt: skip
    return AotCase(
        f"conv1d_implicit_gemm_{name}",
        _kernel("implicit_gemm", "_implicit_gemm_conv1d_kernel"),
        signature,
        {**weight_constants, **constants},
        ("x_ptr", "qweight_ptr", "scale_ptr", "y_ptr", "residual_ptr", "bias_ptr", "stride_xb",
         "stride_xt", "stride_qn", "N", "K", "N_group"),
        {"num_warps": 4, "num_stages": 3},
        "mma_s8" if int8 else "mma",
    )  # fmt: skip


def implicit_gemm_dx(
    name, c_group, taps, bits=4, group_size=64, stride=1, dtype="*bf16", asymmetric=False
):
    weight, weight_constants = _weight(bits, group_size, asymmetric)
    from lowbit_kernels.conv1d.kernels.implicit_gemm_dx import BLOCK_C, BLOCK_N, BLOCK_T

    signature = {
        **weight, "dz_ptr": dtype, "lengths_ptr": "*i64", "dx_ptr": dtype, "T": "i32",
        "T_out": "i32", "N": "i32", "C": "i32", "N_group": "i32", "num_scales": "i32",
        "tiles_t": "i32", "stride_db": "i32", "stride_dt": "i32", "stride_qn": "i32",
        "left": "i32",
    }  # fmt: skip
    constants = {
        "C_GROUP": c_group, "TAPS": taps, "STRIDE": stride, "DILATION": 1, "TAP_STEP": stride,
        "BLOCK_T": BLOCK_T, "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C,
    }  # fmt: skip
    return AotCase(
        f"conv1d_implicit_gemm_dx_{name}",
        _kernel("implicit_gemm_dx", "_implicit_gemm_conv1d_dx_kernel"),
        signature,
        {**weight_constants, **constants},
        ("dz_ptr", "qweight_ptr", "scale_ptr", "dx_ptr", "stride_db", "stride_dt", "stride_qn",
         "N", "C", "N_group"),
        {"num_warps": 4, "num_stages": 3},
        "mma",
    )  # fmt: skip


def frames(name, int8):
    from lowbit_kernels.conv1d.kernels.frames import BLOCK_C, BLOCK_T

    signature = {
        "x_ptr": "*bf16", "lengths_ptr": "*i64", "out_ptr": "*i8" if int8 else "*bf16",
        "T": "i32", "T_padded": "i32", "C": "i32", "left": "i32", "tiles_t": "i32",
        "stride_xb": "i32", "stride_xt": "i32",
    }  # fmt: skip
    constants = {
        "static_scale_ptr": None, "PARTS": 128, "INT8_MAX": 127.0, "MIN_SCALE": 2.0**-126,
        "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C,
    }  # fmt: skip
    scales = {"part_ptr": "*fp32", "scale_ptr": "*fp32"}
    return AotCase(
        f"conv1d_frames_{name}",
        _kernel("frames", "_copy_frames_kernel"),
        signature | (scales if int8 else {}),
        constants | ({} if int8 else dict.fromkeys(scales)),
        ("x_ptr", "out_ptr", "C", "stride_xb", "stride_xt"),
    )


def largest_magnitude():
    from lowbit_kernels.conv1d.kernels.frames import BLOCK_C, BLOCK_T

    return AotCase(
        "conv1d_frames_largest_magnitude",
        _kernel("frames", "_largest_magnitude_kernel"),
        {
            "x_ptr": "*bf16", "lengths_ptr": "*i64", "part_ptr": "*fp32", "T": "i32", "C": "i32",
            "stride_xb": "i32", "stride_xt": "i32",
        },
        {"PARTS": 128, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C},
        ("x_ptr", "C", "stride_xb", "stride_xt"),
    )  # fmt: skip


CASES = [
    depthwise("k31", 31),
    depthwise("k65_fp32", 65, dtype="*fp32"),
    depthwise("k31_int8", 31, int8=True),
    depthwise("k5_stride2", 5, stride=2),
    depthwise("k31_dx", 31, flip=True),
    depthwise("k5_stride2_dx", 5, flip=True, upsample=2),
    # the positional convolutions of the base models (48 channels a group) and the large (64)
    implicit_gemm("base", 48),
    implicit_gemm("large_fp16", 64, dtype="*fp16"),
    implicit_gemm("large_int8", 64, int8=True),
    implicit_gemm("base_int8", 48, bits=8, group_size=0, int8=True),
    implicit_gemm("large_w8", 64, bits=8, group_size=0),
    implicit_gemm("large_w2", 64, bits=2),
    implicit_gemm("large_w1", 64, bits=1, group_size=0),
    implicit_gemm("dilated", 512, dilation=2),
    implicit_gemm("base_asymmetric", 48, asymmetric=True),
    implicit_gemm_dx("base", 48, 128),
    implicit_gemm_dx("base_asymmetric", 48, 128, asymmetric=True),
    implicit_gemm_dx("large_w8", 64, 128, bits=8, group_size=0),
    implicit_gemm_dx("front_end", 512, 3, stride=2),
    frames("copy", int8=False),
    frames("quantize", int8=True),
    largest_magnitude(),
]
