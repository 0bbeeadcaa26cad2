"""Force a backend and tiles on a low-bit linear layer, where dispatch would choose by itself.

Dimension key: M rows, N output features, K input features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit_kernels import QLinear, QuantSpec
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


def forced(layer: QLinear, x: Tensor, epilogue: str | None, choice: Choice) -> Callable[[], Tensor]:
    """A call of the layer's CUDA implementation with a choice that is not dispatch's."""
    from lowbit_kernels.matmul import cuda

    weight, bias = layer.quantized_weight(), layer.bias

    def call() -> Tensor:
        chosen = cuda.choose_linear
        cuda.choose_linear = lambda *_, **__: choice  # type: ignore[assignment]
        try:
            return cuda.linear_cuda(x, weight, bias, None, epilogue)[0]
        finally:
            cuda.choose_linear = chosen

    return call


def gpu_of(device: torch.device) -> Gpu:
    """The device as dispatch sees it."""
    from lowbit_kernels.matmul.gpu import gpu_of

    return gpu_of(device)
