"""QuantizedWeight: the tensors of one quantized weight and what they mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_kernels.formats.packing import row_bytes, to_levels, unpack
from lowbit_kernels.formats.spec import QuantSpec

MAX_GROUP_SCALE = {1: 127, 2: 42, 4: 16}
# of a weight, those that its file holds and that have a row for each output channel
TENSORS = ("qweight", "scale", "group_scale", "zero_point")


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight, seen as [N, K] (see ``packing.py`` for the view and the bytes).

    Symmetric: ``W = level * group_scale * scale``. The product ``level * group_scale`` is an
    integer in [-128, 127], exact in int8, bf16 and fp16, so every backend works on identical
    integers and ``scale`` is applied once, to the finished sum.

    Asymmetric: ``W = (code - zero_point) * scale``, both per group.

    Args:
        qweight: [N, row_bytes(K, bits)] uint8; depthwise: [taps, N] int8 levels.
        scale: [N] fp32; asymmetric [N, ceil(K / G)] fp16.
        group_scale: [N, ceil(K / G)] uint8, 1 to 16 (4 bits), 42 (2 bits) or 127 (1 bit); ``None``
            where each row has one scale.
        zero_point: [N, ceil(K / G)] fp16, asymmetric weights only.
        K: length of the reduction.
        spec: the spec it was made with.
        input_scale: [] fp32, the static scale of the layer's quantized input; only with
            ``spec.input_scale == "static"``.
    """

    qweight: Tensor
    scale: Tensor
    group_scale: Tensor | None
    zero_point: Tensor | None
    K: int
    spec: QuantSpec
    input_scale: Tensor | None = None

    @property
    def is_depthwise(self) -> bool:
        return self.qweight.dtype == torch.int8

    @property
    def N(self) -> int:
        return self.qweight.shape[1 if self.is_depthwise else 0]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        tensors = (getattr(self, name) for name in TENSORS)
        return sum(t.nbytes for t in tensors if t is not None)

    def integers(self) -> Tensor:
        """``level * group_scale``, int8 [N, K]; symmetric weights only."""
        if not self.spec.symmetric:
            raise ValueError("an asymmetric weight has no integer form; dequantize it instead")
        if self.is_depthwise:
            return self.qweight.t().contiguous()
        return integers(self.qweight, self.group_scale, self.K, self.spec.bits, self.spec.group)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K]; computed in fp32 (fp64 for ``torch.float64``), then cast."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self.zero_point is not None:
            codes = unpack(self.qweight, self.K, self.spec.bits).to(wide)
            zero = expand_groups(self.zero_point.to(wide), self.spec.group, self.K)
            scale = expand_groups(self.scale.to(wide), self.spec.group, self.K)
            return ((codes - zero) * scale).to(dtype)
        return (self.integers().to(wide) * self.scale.to(wide)[:, None]).to(dtype)


def integers(
    qweight: Tensor, group_scale: Tensor | None, K: int, bits: int, group_size: int
) -> Tensor:
    """``level * group_scale``, int8 [N, K], from the stored tensors of a symmetric weight."""
    levels = to_levels(unpack(qweight, K, bits), bits)
    if group_scale is None:
        return levels.contiguous()
    return levels * expand_groups(group_scale.view(torch.int8), group_size, K)


def expand_groups(values: Tensor, group_size: int, K: int) -> Tensor:
    """Repeat one value a group [N, groups] to one an element [N, K]."""
    return values.repeat_interleave(group_size, dim=1)[:, :K]


def empty_weight(
    N: int, K: int, spec: QuantSpec, *, device: torch.device | str | None = None
) -> QuantizedWeight:
    """Tensors of the right shapes and unspecified content, for a checkpoint to be loaded into."""
    qweight = torch.zeros(N, row_bytes(K, spec.bits), dtype=torch.uint8, device=device)
    scale, group_scale, zero = torch.zeros(N, dtype=torch.float32, device=device), None, None
    per_group = (N, -(-K // spec.group) if spec.group else 0)
    if not spec.symmetric:
        scale, zero = (torch.zeros(per_group, dtype=torch.float16, device=device) for _ in range(2))
    elif spec.group:
        group_scale = torch.ones(per_group, dtype=torch.uint8, device=device)
    input_scale = _empty_input_scale(spec, device)
    return QuantizedWeight(qweight, scale, group_scale, zero, K, spec, input_scale)


def empty_depthwise_weight(
    N: int, taps: int, spec: QuantSpec, *, device: torch.device | str | None = None
) -> QuantizedWeight:
    """Like ``empty_weight`` for a depthwise convolution."""
    levels = torch.zeros(taps, N, dtype=torch.int8, device=device)
    scale = torch.zeros(N, dtype=torch.float32, device=device)
    input_scale = _empty_input_scale(spec, device)
    return QuantizedWeight(levels, scale, None, None, taps, spec, input_scale)


def _empty_input_scale(spec: QuantSpec, device: torch.device | str | None) -> Tensor | None:
    # the default dtype may be a 16-bit one while a checkpoint is loaded
    dtype = torch.float32
    return torch.ones((), dtype=dtype, device=device) if spec.input_scale == "static" else None
