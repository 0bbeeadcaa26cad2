"""Kernels of grouped and dense convolutions: the positional ones of speech encoders, and frames.

Dimension key: B batch, C input channels, N output channels, T frames, K = taps * C / groups.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.static.cases.matmul import distinct, integers, linear_case, make_case
from bench.static.compile import AotCase, Problem
from bench.static.gpus import GPUS

GROUPS = 16
# channels a group and K: of the base models, the large ones, and one of data2vec's five
BASE, LARGE, DATA2VEC = (48, 128 * 48), (64, 128 * 64), (48, 19 * 48)


def positional_cases(target: str) -> Iterator[AotCase]:
    """The linear layer's kernel, a group a program_id(2): one utterance of 10 s, and 32."""
    for model, (N, K), rows, bits, x in (
        ("base", BASE, 499, 4, "bf16"),
        ("base", BASE, 16000, 4, "bf16"),
        ("base", BASE, 16000, 8, "int8"),
        ("large", LARGE, 16000, 4, "fp16"),
        ("large", LARGE, 499, 4, "int8"),
        ("large", LARGE, 16000, 4, "int8"),
        ("large", LARGE, 16000, 8, "bf16"),
        ("large", LARGE, 16000, 2, "bf16"),
        ("large", LARGE, 16000, 1, "bf16"),
        ("data2vec", DATA2VEC, 499, 4, "bf16"),
        ("data2vec", DATA2VEC, 16000, 4, "int8"),
    ):
        case = linear_case(target, rows, bits, x, N=N, K=K, groups=GROUPS)
        yield replace(case, name=f"conv1d_positional_{model}_{case.name}")
    case = linear_case(target, 16000, 4, N=48, K=BASE[1], groups=GROUPS, asymmetric=True)
    yield replace(case, name=f"conv1d_positional_base_{case.name}")


def grouped_kernel() -> Any:
    from lowbit_kernels.conv1d.kernels.grouped import _grouped_kernel

    return _grouped_kernel


def grouped_dw_kernel() -> Any:
    from lowbit_kernels.conv1d.kernels.grouped import _grouped_dw_kernel

    return _grouped_dw_kernel


def grouped_case(
    name: str, N: int, K: int, groups: int, *, is_dx: bool = False, phases: int = 1, is_many: bool
) -> AotCase:
    from lowbit_kernels.conv1d.kernels.grouped import _constants

    _, _, constants = _constants(N, K, groups, phases, is_many)
    values = dict(constants.values)
    options = {key: values.pop(key) for key in ("num_warps", "num_stages")}
    return make_case(
        f"conv1d_grouped_{name}",
        grouped_kernel,
        {
            "x_ptr": "*bf16",
            "w_ptr": "*bf16",
            "bias_ptr": None if is_dx else "*bf16",
            "lengths_ptr": "*i64" if is_dx else None,
            "y_ptr": "*bf16",
        },
        integers("M N K T stride_xb stride_xt"),
        values,
        options=options,
        expect="mma",
        async_loads=True,
    )


def grouped_dw_case(name: str, N: int, K: int, groups: int) -> AotCase:
    from lowbit_kernels.conv1d.kernels.grouped import _dw_constants

    _, _, constants = _dw_constants(N, groups)
    values = dict(constants.values)
    options = {key: values.pop(key) for key in ("num_warps", "num_stages")}
    rows = 16000
    return make_case(
        f"conv1d_grouped_dw_{name}",
        grouped_dw_kernel,
        {"dz_ptr": "*bf16", "x_ptr": "*bf16", "part_ptr": "*fp32"},
        integers(
            "N K T steps steps_per_utterance steps_per_part stride_zb stride_zt stride_xb stride_xt"
        ),
        values,
        options=options,
        expect="mma",
        async_loads=True,
        problem=Problem(
            f"{N} x {rows} x {K} x {groups}",
            operand_bytes=2,
            flops=2 * N * rows * K * groups,
            bytes=rows * (N + K) * groups * 2 + 4 * N * K * groups,
            programs=-(-N // values["BLOCK_N"]) * -(-K // values["BLOCK_K"]) * groups,
        ),
    )


def frames_case(name: str, int8: bool, groups: int = 1) -> AotCase:
    from lowbit_kernels.conv1d.kernels.frames import _copy_constants

    _, constants = _copy_constants(groups, 768 // groups, 32 if int8 else 1)
    case = make_case(
        f"conv1d_frames_{name}",
        _frames("_copy_frames_kernel"),
        {
            "x_ptr": "*bf16",
            "part_ptr": "*fp32" if int8 else None,
            "static_scale_ptr": None,
            "lengths_ptr": "*i64",
            "out_ptr": "*i8" if int8 else "*bf16",
            "scale_ptr": "*fp32" if int8 else None,
        },
        integers("T T_padded C left tiles_t scale_rows stride_xb stride_xt"),
        constants.values,
    )
    return replace(case, aligned=(*case.aligned, "C"))


def largest_case() -> AotCase:
    from lowbit_kernels.conv1d.kernels.frames import _largest_constants

    case = make_case(
        "conv1d_frames_largest_magnitude",
        _frames("_largest_magnitude_kernel"),
        {"x_ptr": "*bf16", "lengths_ptr": "*i64", "part_ptr": "*fp32"},
        integers("T C stride_xb stride_xt"),
        _largest_constants(32).values,
    )
    return replace(case, aligned=(*case.aligned, "C"))


def _frames(name: str) -> Any:
    def load() -> Any:
        from lowbit_kernels.conv1d.kernels import frames

        return getattr(frames, name)

    return load


CASES = [
    *(case for target in GPUS for case in distinct(positional_cases(target))),
    grouped_case("base", *BASE, GROUPS, is_many=True),
    grouped_case("base_few", *BASE, GROUPS, is_many=False),
    grouped_case("large_dx", *LARGE, GROUPS, is_dx=True, is_many=True),
    grouped_case("data2vec", *DATA2VEC, GROUPS, is_many=True),
    grouped_case("front_end_dx", 1024, 1024, 1, is_dx=True, phases=2, is_many=True),
    grouped_case("dense", 512, 1536, 1, is_many=True),
    grouped_dw_case("base", *BASE, GROUPS),
    grouped_dw_case("large", *LARGE, GROUPS),
    grouped_dw_case("dense", 512, 1536, 1),
    frames_case("copy", int8=False),
    frames_case("copy_groups", int8=False, groups=GROUPS),
    frames_case("quantize_groups", int8=True, groups=GROUPS),
    largest_case(),
]
