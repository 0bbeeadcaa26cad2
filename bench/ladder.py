"""Force a backend and tiles on a low-bit layer, where dispatch would choose by itself.

Dimension key: M rows, N output features, K input features; of a convolution M rows of the output,
N and K of one group.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from lowbit_kernels import QConv1d, QLinear, QuantSpec
from lowbit_kernels.conv1d import Geometry
from lowbit_kernels.matmul import csrc
from lowbit_kernels.matmul.dispatch import Choice, Gpu, candidates, choose_linear


def default_choice(
    M: int, N: int, K: int, spec: QuantSpec, dtype: torch.dtype, epilogue: str | None, gpu: Gpu
) -> Choice:
    """What dispatch chooses without a residual: from a tuned table, else by its defaults."""
    return choose_linear(
        M, N, K, spec.bits, spec.group, spec.inputs, dtype, epilogue is None, spec.deterministic,
        gpu, csrc.is_available() and csrc.serves_csrc(M, spec, dtype, epilogue),
    )  # fmt: skip


def choices(
    M: int, N: int, K: int, spec: QuantSpec, dtype: torch.dtype, epilogue: str | None, gpu: Gpu
) -> dict[str, list[Choice]]:
    """Backend to the choices worth measuring, the backend's default first."""
    itemsize = 2 if spec.inputs is None else 1
    fused = [Choice("fused", config) for config in candidates(M, N, K, spec.bits, itemsize, gpu)]
    found = {"fused": fused}
    if spec.inputs is None:
        found["dequant_cublas"] = [Choice("dequant_cublas")]
    elif spec.bits < 8:
        tiles = candidates(M, N, K, 8, itemsize, gpu)
        found["resident_int8"] = [Choice("resident_int8", config) for config in tiles]
    if csrc.is_available() and csrc.serves_csrc(M, spec, dtype, epilogue):
        default = csrc.choose_csrc_config(M, N, K, gpu.num_sms)
        others = [
            csrc.CsrcConfig(default.block_m, warps_n, splits)
            for warps_n in csrc.TILES[default.block_m] for splits in (1, 2, 4, 8)
        ]  # fmt: skip
        found["csrc"] = [Choice("csrc", config) for config in dict.fromkeys([default, *others])]
    return found


def conv1d_choices(M: int, N: int, K: int, groups: int, spec: QuantSpec, gpu: Gpu) -> list[Choice]:
    """The choices worth measuring for a convolution without dilation, the default tiles first."""
    tiles = candidates(M, N, K, spec.bits, 2 if spec.inputs is None else 1, gpu, groups)
    found = [Choice("matmul", config) for config in tiles]
    return [*found, Choice("dequant_cublas")] if spec.inputs is None and groups == 1 else found


def forced(layer: QLinear, x: Tensor, epilogue: str | None, choice: Choice) -> Callable[[], Tensor]:
    """A call of the layer's CUDA implementation with a choice that is not dispatch's."""
    from lowbit_kernels.matmul import cuda

    weight, bias = layer.quantized_weight(), layer.bias
    return _with_choice(
        cuda, "choose_linear", choice, lambda: cuda.linear_cuda(x, weight, bias, None, epilogue)[0]
    )


def forced_conv1d(
    layer: QConv1d, x: Tensor, epilogue: str | None, choice: Choice
) -> Callable[[], Tensor]:
    """As ``forced``, of a layer without dilation and x [B, C, T]."""
    from lowbit_kernels.conv1d import cuda

    weight, bias = layer.quantized_weight(), layer.bias
    (k,), (stride,), padding = layer.kernel_size, layer.stride, layer.padding
    assert not isinstance(padding, str), "a number"
    geometry = Geometry(k, stride, padding[0], padding[0], groups=layer.groups)
    return _with_choice(
        cuda, "choose_conv1d", choice,
        lambda: cuda.conv1d_cuda(x, weight, bias, None, None, geometry, epilogue)[0],
    )  # fmt: skip


def _with_choice(
    module: ModuleType, chooser: str, choice: Choice, run: Callable[[], Tensor]
) -> Callable[[], Tensor]:
    """``run``, during which a module's chooser has no choice."""

    def call() -> Tensor:
        chosen = getattr(module, chooser)
        setattr(module, chooser, lambda *_, **__: choice)
        try:
            return run()
        finally:
            setattr(module, chooser, chosen)

    return call


def gpu_of(device: torch.device) -> Gpu:
    """The device as dispatch sees it."""
    from lowbit_kernels.matmul.gpu import gpu_of

    return gpu_of(device)
