"""What the normalizations refuse."""

import torch
from torch import Tensor

from lowbit_kernels.checks import EPILOGUES

ACTIVATIONS = tuple(name for name in EPILOGUES if name != "glu")


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


def check_activation(activation: str | None) -> None:
    """Refuse an activation that no normalization is followed by."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")


def check_scale(scale: Tensor | None, x: Tensor) -> None:
    """Refuse a static scale that is not one fp32 number on x's device."""
    if scale is not None and (
        scale.dim() or scale.dtype != torch.float32 or scale.device != x.device
    ):
        raise ValueError(
            f"scale must be [] fp32 on {x.device}, "
            f"got {list(scale.shape)} {scale.dtype} on {scale.device}"
        )
