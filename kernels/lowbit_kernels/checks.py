"""What the ops check, and cast, alike.

Dimension key: N output features, K input features, N_out N / 2 with ``glu`` and N without.
"""

from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.formats import QuantizedWeight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EPILOGUES = (None, "gelu", "gelu_tanh", "silu", "relu", "glu")

# int32 sums of products up to 127 * 128 cannot overflow below
MAX_K_INT8 = (2**31 - 1) // (127 * 128)


def check_dtype(name: str, x: Tensor) -> None:
    """Refuse a dtype that is not served."""
    if x.dtype not in DTYPES and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        raise ValueError(f"{name} must be fp16, bf16 or fp32 (fp64 on a CPU only), got {x.dtype}")


def check_input(x: Tensor, K: int, weight: Tensor) -> None:
    """Refuse an input of a linear layer that is not [..., K], or not on the weight's device."""
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., K] with K = {K}, got shape {list(x.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")


def check_weight_inputs(weight: QuantizedWeight, served: tuple[str | None, ...]) -> None:
    """Refuse a weight whose inputs are quantized in a way that is not served."""
    spec = weight.spec
    if spec.inputs not in served:
        raise NotImplementedError(f"inputs must be one of {served} so far, got {spec.inputs!r}")
    if spec.inputs and spec.input_scale == "static" and weight.input_scale is None:
        raise ValueError("weight.input_scale must be a tensor with a static scale, got None")
    if spec.inputs == "int8" and weight.K > MAX_K_INT8:
        raise ValueError(
            f"K must be at most {MAX_K_INT8} with int8 inputs (int32 sums), got {weight.K}"
        )


def check_epilogue(epilogue: str | None, N: int) -> None:
    """Refuse an epilogue that no layer of N features has."""
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue must be one of {EPILOGUES}, got {epilogue!r}")
    if epilogue == "glu" and N % 2:
        raise ValueError(f"epilogue 'glu' needs an even number of rows, got N = {N}")


def check_like(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor
) -> None:
    """Refuse a tensor of another shape or dtype, or on another device than x."""
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} must be {dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}"
        )


def check_lengths(lengths: Tensor | None, x: Tensor) -> None:
    """Refuse lengths that are not [B], integers, on x's device."""
    if lengths is None:
        return
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if lengths.shape != x.shape[:1] or lengths.device != x.device:
        raise ValueError(
            f"lengths must be [{x.shape[0]}] on {x.device}, "
            f"got {list(lengths.shape)} on {lengths.device}"
        )


def output_shape(x: Tensor, N: int, epilogue: str | None) -> tuple[int, ...]:
    """[..., N_out] for x [..., K]."""
    return (*x.shape[:-1], N // 2 if epilogue == "glu" else N)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """What autocast makes of arguments of F.linear, maybe None: fp64 and integers stay."""
    x = tensors[0]
    device_type = x.device.type
    # autocast does not know the meta device
    if x.is_meta or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in tensors
    )
