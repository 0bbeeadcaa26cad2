"""QuantSpec: what low-bit means for one layer."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

BITS = (1, 2, 4, 8)
# of fewer than 8 bits: around zero, and from zero on
LOW_INPUTS = ("int4", "int2", "int1", "uint4", "uint2", "uint1")
INPUTS = (None, "int8", "fp8", *LOW_INPUTS)
INPUT_SCALES = ("token", "utterance", "static")

GroupSize = int | None | Literal["auto", "tensor"]


@dataclass(frozen=True)
class QuantSpec:
    """How a layer's weight, and its input, are quantized.

    Args:
        bits: bits a weight: 1, 2, 4 or 8.
        group_size: weights that share a scale along the reduction: a power of two >= 32, ``None``
            (one scale a channel), ``"tensor"`` (one scale), or ``"auto"``, which becomes 64
            for 4 and 2 bits and ``None`` for 8 and 1. 8 bits take ``None`` or ``"tensor"``.
        symmetric: levels around zero. Asymmetric weights: 2 and 4 bits with ``inputs=None``.
        inputs: ``None`` (16-bit or float arithmetic), ``"int8"``, ``"fp8"`` (e4m3, linear layers
            only), ``"int4"``, ``"int2"``, ``"int1"``, ``"uint4"``, ``"uint2"`` or ``"uint1"``: how
            the layer's input is quantized. Those of fewer than 8 bits have a scale that training
            learns (``prepare_qat``) and are multiplied as int8; "uint" is for what is not negative,
            such as the result of a ReLU.
        input_scale: ``"token"`` (a scale a row; a convolution, whose taps cross rows, uses one an
            utterance), ``"utterance"``, or ``"static"`` (from calibration clips).
        deterministic: the layer's result for an utterance has the same bits whatever else is in
            the batch, for tiles and sums that do not follow its size; see ``quantize``.
        input_offset: a convolution without padding quantizes its input's distance from a static
            value a channel, its ``input_offset``; ``quantize`` decides where that helps.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """

    bits: int = 4
    group_size: GroupSize = "auto"
    symmetric: bool = True
    inputs: str | None = None
    input_scale: str = "token"
    deterministic: bool = False
    input_offset: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")
        if self.group_size == "auto":
            object.__setattr__(self, "group_size", 64 if self.bits in (2, 4) else None)
        self._check_group_size()
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric must be True or False, got {self.symmetric!r}")
        if self.inputs not in INPUTS:
            raise ValueError(f"inputs must be one of {INPUTS}, got {self.inputs!r}")
        if self.input_scale not in INPUT_SCALES:
            raise ValueError(f"input_scale must be one of {INPUT_SCALES}, got {self.input_scale!r}")
        if not isinstance(self.deterministic, bool):
            raise ValueError(f"deterministic must be True or False, got {self.deterministic!r}")
        is_bool = isinstance(self.input_offset, bool)
        if not is_bool or (self.input_offset and self.inputs != "int8"):
            raise ValueError(
                "input_offset must be False, or True with inputs='int8', "
                f"got {self.input_offset!r} with inputs={self.inputs!r}"
            )
        if not self.symmetric and (self.bits not in (2, 4) or self.inputs is not None):
            raise ValueError(
                "symmetric=False needs bits 2 or 4 and inputs=None, "
                f"got bits={self.bits} and inputs={self.inputs!r}"
            )

    def _check_group_size(self) -> None:
        size = self.group_size
        if size is None or size == "tensor":
            if not self.symmetric:
                raise ValueError(
                    f"group_size must be a power of two >= 32 with symmetric=False, got {size!r}"
                )
            return
        if self.bits == 8:
            raise ValueError(
                "group_size must be None (one scale a channel) or 'tensor' with bits=8, as a group "
                f"scale would leave int8, got {size!r}"
            )
        if not isinstance(size, int) or isinstance(size, bool) or size < 32 or size & (size - 1):
            raise ValueError(
                "group_size must be a power of two >= 32, None (one scale a channel), 'tensor' or "
                f"'auto', got {size!r}"
            )

    @property
    def has_low_inputs(self) -> bool:
        """Whether inputs have fewer than 8 bits."""
        return self.inputs in LOW_INPUTS

    @property
    def group(self) -> int:
        """Weights a group scale; 0 where the format has no group scales."""
        return self.group_size if isinstance(self.group_size, int) else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; ``QuantSpec(**d)`` gives the spec back."""
        return asdict(self)

    def __str__(self) -> str:
        size = f"g{self.group}" if self.group else (self.group_size or "channel")
        text = f"w{self.bits} {size}" + ("" if self.symmetric else " asymmetric")
        if self.inputs is not None:
            text += f", {self.inputs} inputs"
            text += "" if self.input_scale == "token" else f" ({self.input_scale})"
            text += " around an offset" if self.input_offset else ""
        return text + (", deterministic" if self.deterministic else "")
