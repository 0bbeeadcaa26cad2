"""What both normalizations refuse."""

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_float_input(name: str, x: Tensor) -> None:
    """Refuse a dtype that the kernels do not serve.

    Raises:
        ValueError: naming the argument, the dtypes served and the one received.
    """
    if x.dtype not in DTYPES and not (x.dtype == torch.float64 and x.device.type == "cpu"):
        raise ValueError(f"{name} must be fp16, bf16 or fp32 (fp64 on a CPU only), got {x.dtype}")


def check_parameter(name: str, parameter: Tensor, x: Tensor, size: int) -> None:
    """Refuse a weight or bias that is not [size], floating point, on x's device.

    Raises:
        ValueError: naming the argument, the rule and what was received.
    """
    if parameter.shape != (size,):
        raise ValueError(f"{name} must be [{size}], got {list(parameter.shape)}")
    if not parameter.is_floating_point() or parameter.device != x.device:
        raise ValueError(
            f"{name} must be floating point on {x.device}, "
            f"got {parameter.dtype} on {parameter.device}"
        )
