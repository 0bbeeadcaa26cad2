"""The same arithmetic in PyTorch's own operators, where our kernels cannot be compiled.

Dimension key: M rows, N output channels, K the reduction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.cpu import library as lib
from lowbit_kernels.cpu.resident import ZERO_POINT, Resident
from lowbit_kernels.formats import QuantizedWeight

INT8_MAX = 127
# the smallest normal fp32 number: silence gets a scale whose reciprocal is finite
MIN_INPUT_SCALE = 2.0**-126
# products of this many int8 pairs sum to less than 2^24, exactly, in fp32
EXACT_K = 1024


def has_exact_onednn() -> bool:
    """Whether oneDNN's uint8 x int8 products are exact: without VNNI they saturate at 16 bits."""
    return bool(torch.cpu._is_vnni_supported()) and bool(torch._C._has_mkldnn)


def check_deterministic(weight: QuantizedWeight, epilogue: str | None) -> None:
    """Refuse a deterministic layer where PyTorch's rounding depends on what else is in the batch.

    Its float products do, and its activations, whose last elements are computed one by one.
    """
    spec, compiled = weight.spec, lib.native() is not None
    exact = spec.inputs is not None and epilogue in (None, "relu")
    needs_int8 = spec.inputs is not None and not weight.is_depthwise
    if exact or (lib.native_int8() is not None if needs_int8 else compiled):
        return
    remedy = "install a C++ compiler, or use inputs='int8' without a fused activation"
    raise NotImplementedError(
        f"deterministic=True with inputs={spec.inputs!r} and epilogue={epilogue!r} needs compiled "
        f"CPU kernels, and this machine runs {lib.cpu_backend()}: "
        f"{'use inputs=None' if compiled else remedy}"
    )


def scale_of(largest: Tensor) -> Tensor:
    """The int8 scale of a largest magnitude, fp32; NaN where that is not finite."""
    scale = (largest / INT8_MAX).clamp_min(MIN_INPUT_SCALE)
    return scale.masked_fill(largest.isinf(), torch.nan)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale to the nearest integer in [-127, 127], still fp32."""
    return (x * (1 / scale)).round().clamp(-INT8_MAX, INT8_MAX)


def activate(y: Tensor, epilogue: str | None) -> Tensor:
    """Apply an epilogue other than ``glu``."""
    if epilogue == "gelu":
        return F.gelu(y)
    if epilogue == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if epilogue == "silu":
        return F.silu(y)
    return F.relu(y) if epilogue == "relu" else y


def matmul_int8(q: Tensor, resident: Resident, group: int, N: int) -> Tensor:
    """Exact integer product of one group.

    Args:
        q: [M, K], uint8 with zero point 128.
        resident: the weight, in layout ``"onednn"`` or ``"float"``.
        group: which group of it.
        N: channels of a group.

    Returns:
        [M, N] fp32 of exact int32 sums.
    """
    if resident.layout == "onednn":
        ones, zeros = torch.ones(N), torch.zeros(N, dtype=torch.int32)
        return torch.ops.onednn.qlinear_pointwise.default(  # type: ignore[no-any-return]
            q.contiguous(), 1.0, ZERO_POINT, resident.tensors[group], ones, zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
    w, x = resident.tensors[0][group * N : (group + 1) * N], q.float() - ZERO_POINT
    total = torch.zeros(q.shape[0], N, dtype=torch.int32)
    for k in range(0, q.shape[1], EXACT_K):
        total += (x[:, k : k + EXACT_K] @ w[:, k : k + EXACT_K].t()).to(torch.int32)
    return total.float()
