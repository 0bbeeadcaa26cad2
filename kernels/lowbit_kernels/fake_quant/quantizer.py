"""Quantizer: the levels a tensor is rounded to, its scales, and how gradients pass.

Dimension key: K the last dimension, S scale groups along it, G elements a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("ste", "lsq", "elastic")


@dataclass(frozen=True)
class Levels:
    """The integers ``low, low + step, ..., high`` that ``x / scale`` is rounded to.

    The nearest one is taken, ``low`` first where the step is 2: the levels of 1 and 2 bits have no
    zero, and a zero becomes the lower neighbor as in ``formats.quantize_weight``.

    Args:
        low: lowest level.
        high: highest level, LSQ's Q_P.
        step: distance of two levels, 1 or 2.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    low: int
    high: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.step not in (1, 2):
            raise ValueError(f"step must be 1 or 2, got {self.step!r}")
        if self.high < 1 or self.low > 0 or (self.high - self.low) % self.step:
            raise ValueError(
                "low and high must enclose 0, high above it, a multiple of step apart, "
                f"got {self.low!r} and {self.high!r} with step {self.step}"
            )

    @property
    def is_binary(self) -> bool:
        """Whether the levels are -1 and 1."""
        return (self.low, self.high, self.step) == (-1, 1, 2)

    @staticmethod
    def of_weight(bits: int) -> "Levels":
        """The levels of the packed format (``formats/packing.py``): of 8, 4, 2 or 1 bits."""
        table = {8: (-127, 127, 1), 4: (-8, 7, 1), 2: (-3, 3, 2), 1: (-1, 1, 2)}
        if bits not in table:
            raise ValueError(f"bits must be one of {tuple(table)}, got {bits!r}")
        return Levels(*table[bits])

    @staticmethod
    def of_input(bits: int, *, signed: bool = True) -> "Levels":
        """The levels of an activation: of 8, 4, 2 or 1 bits.

        Signed: [-127, 127], else -2^(b-1) to 2^(b-1) - 1, for 1 bit {-1, 1}. Not signed (what
        leaves a ReLU or a softmax): 0 to 2^b - 1.
        """
        if bits not in (8, 4, 2, 1):
            raise ValueError(f"bits must be one of (8, 4, 2, 1), got {bits!r}")
        if not signed:
            return Levels(0, 2**bits - 1)
        half = 2 ** (bits - 1)
        return Levels(-1, 1, 2) if bits == 1 else Levels(-127 if bits == 8 else -half, half - 1)


# of ``QuantSpec.inputs``
INPUT_LEVELS = {"int8": Levels.of_input(8)} | {
    f"{'' if signed else 'u'}int{bits}": Levels.of_input(bits, signed=signed)
    for bits in (4, 2, 1)
    for signed in (True, False)
}


@dataclass(frozen=True)
class Quantizer:
    """How a tensor x [..., K] is quantized and dequantized again, and what its gradient is.

    Forward, with v = (x - center) / (group_scale * scale)::

        y = nearest level of v * group_scale * scale

    Backward, g the gradient of y, ``inside`` where low <= v <= high, n the elements that share a
    scale, and d scale = sum(g * slope * group_scale) / sqrt(n * high):

    =========== ========================= =======================================================
    method      dx                        slope
    =========== ========================= =======================================================
    "ste"       g                         none: the scale is computed from the data. Nothing is
                                          clipped, so a value outside of the range can come back
                                          (Bengio et al., 2013)
    "lsq"       g where inside, else 0    level - v where inside, else level (Esser et al., 2020,
                                          equations 3 to 5; their range is open, ours is closed
                                          like ``torch.clamp``'s)
    "elastic"   g where inside, else 0    level, for the levels {-1, 1}; as "lsq" for all others
                                          (Liu et al., "BiT", 2022)
    =========== ========================= =======================================================

    BiT's weights, mean|W| * sign(W - mean W) with the gradient passed straight through, are "ste"
    with that scale and that center.

    Args:
        levels: what v is rounded to.
        scale: floating point: one element for all of x, ``x.shape[:-1]`` for one a row,
            [..., S] for one a group of a row. Computed with in fp32; a learned one counts as 2^-24
            at least (BiT: 1e-5). None: ``"ste"`` takes each row's largest magnitude / high, as int8
            inputs are quantized.
        method: ``"ste"``, ``"lsq"`` or ``"elastic"``.
        group_scale: [..., S] uint8, a constant integer that multiplies the scale of a group: the
            two-level scale of ``formats.QuantizedWeight``. With a scale for all or one a row.
        group_size: G, a power of two >= 32, with scales or integers a group; S = ceil(K / G).
        center: like a scale for all or one a row, only with ``"ste"``.
    """

    levels: Levels
    scale: Tensor | None = None
    method: str = "ste"
    group_scale: Tensor | None = None
    group_size: int = 0
    center: Tensor | None = None


def check_quantizer(quantizer: Quantizer, name: str, x: Tensor) -> None:
    """Whether a quantizer fits x [..., K], which has the argument name ``name``.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if not isinstance(quantizer, Quantizer):
        raise ValueError(f"quantizer must be a Quantizer, got {type(quantizer).__name__}")
    method, size = quantizer.method, quantizer.group_size
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if x.dim() == 0:
        raise ValueError(f"{name} must be [..., K], got a scalar")
    if size and (size < 32 or size & (size - 1)):
        raise ValueError(f"group_size must be a power of two >= 32 or 0, got {size}")
    rows, K = tuple(x.shape[:-1]), x.shape[-1]
    grouped = (*rows, -(-K // size)) if size else None
    scale, group_scale, center = quantizer.scale, quantizer.group_scale, quantizer.center
    if scale is None:
        if method != "ste" or center is not None or size:
            raise ValueError(
                "scale must be given except with method 'ste', without groups and center, "
                f"got None with {method!r}"
            )
        return
    if group_scale is not None and (
        group_scale.dtype != torch.uint8 or tuple(group_scale.shape) != grouped
    ):
        raise ValueError(
            f"group_scale must be uint8 {grouped} with group_size {size}, "
            f"got {group_scale.dtype} {tuple(group_scale.shape)}"
        )
    wanted = (rows,) if grouped is None or group_scale is not None else (grouped,)
    _check_scale("scale", scale, wanted, x)
    if center is not None:
        if method != "ste":
            raise ValueError(f"center must be None with method {method!r}")
        _check_scale("center", center, (rows,), x)
    for other in (group_scale, center, scale):
        if other is not None and other.device != x.device:
            raise ValueError(
                f"the quantizer must be on {name}'s device {x.device}, got {other.device}"
            )


def _check_scale(name: str, scale: Tensor, shapes: tuple[tuple[int, ...], ...], x: Tensor) -> None:
    if not scale.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {scale.dtype}")
    if scale.numel() != 1 and tuple(scale.shape) not in shapes:
        raise ValueError(
            f"{name} must have 1 element or shape {shapes[0]} for a tensor of shape "
            f"{tuple(x.shape)}, got {tuple(scale.shape)}"
        )
