"""QConv1d: nn.Conv1d with a low-bit weight."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from lowbit_kernels.conv1d import low_bit_conv1d
from lowbit_kernels.formats import (
    QuantizedWeight,
    QuantSpec,
    empty_depthwise_weight,
    empty_weight,
    quantize_depthwise_weight,
    quantize_weight,
)
from lowbit_kernels.formats.spec import LOW_INPUTS
from lowbit_kernels.matmul import low_bit_linear
from lowbit_kernels.modules.base import QuantizedModule, check_spec

CONV1D_INPUTS = (None, "int8", *LOW_INPUTS)
CONV1D_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
)


class QConv1d(QuantizedModule, nn.Conv1d):
    """``nn.Conv1d`` with a weight of 1, 2, 4 or 8 bits. Takes ``nn.Conv1d``'s arguments.

    >>> qconv = QConv1d.from_float(nn.Conv1d(512, 512, 3, stride=2), QuantSpec(bits=4))
    >>> y = qconv(torch.randn(2, 512, 1601))  # [2, 512, 800]

    Dense and strided, grouped and depthwise; any size, stride, padding and dilation. The output is
    [B, N, T] with channels contiguous in memory (and so is the best input), which chained layers
    keep. The weight is frozen; gradients flow to the input and to the bias.

    With ``spec.input_offset`` the int8 input is the distance from ``input_offset`` [C], which
    ``set_input_offset`` sets; the rest, a constant of each output channel, joins the bias. It is
    exact without rounding, and keeps quiet frames, which lie near a constant, from being rounded
    away (``integrations/silence.py``).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode, device, dtype: as ``nn.Conv1d``.
        spec: how the weight and the input are quantized; ``None`` means ``QuantSpec()``.

    Raises:
        ValueError: for ``spec.input_offset`` with padding, groups or one tap.
        NotImplementedError: for a ``padding_mode`` other than ``"zeros"``, or ``spec.inputs`` that
            this version does not compute with.
    """

    input_offset: Tensor | None
    offset_bias: Tensor | None

    def __init__(self, *args: Any, spec: QuantSpec | None = None, **kwargs: Any) -> None:
        conv = nn.Conv1d(*args, **kwargs)
        self._init(conv, QuantSpec() if spec is None else spec)
        if conv.weight.is_meta:
            self._set_quantized(self._empty())
        else:
            self._set_quantized(self._quantize(conv.weight))
        self.register_parameter("bias", conv._parameters["bias"])

    def _init(self, conv: nn.Conv1d, spec: QuantSpec) -> None:
        check_spec("spec", spec, CONV1D_INPUTS)
        if conv.padding_mode != "zeros":
            raise NotImplementedError(
                f"padding_mode must be 'zeros' for a QConv1d, got {conv.padding_mode!r}"
            )
        nn.Module.__init__(self)
        for name in CONV1D_ATTRIBUTES:
            setattr(self, name, getattr(conv, name))
        self.spec = spec
        if spec.input_offset and not takes_offset(conv):
            raise ValueError(
                "spec.input_offset must be False for a convolution with padding, groups or one "
                f"tap, got True for {conv}"
            )

    def _set_quantized(self, weight: QuantizedWeight) -> None:
        super()._set_quantized(weight)
        device = weight.qweight.device
        for name, size in (("input_offset", self.in_channels), ("offset_bias", self.out_channels)):
            zeros = torch.zeros(size, dtype=torch.float32, device=device)
            self.register_buffer(name, zeros if self.spec.input_offset else None)

    def set_input_offset(self, offset: Tensor) -> None:
        """Quantize the input around ``offset``.

        Args:
            offset: [C], finite, any floating-point dtype.

        Raises:
            ValueError: if ``spec.input_offset`` is False, or for another shape or values that are
                not finite; the layer is unchanged.
        """
        if self.input_offset is None:
            raise ValueError("spec.input_offset must be True to set an input offset, got False")
        if offset.shape != (self.in_channels,) or not offset.isfinite().all():
            raise ValueError(
                f"offset must be finite and of shape {(self.in_channels,)}, "
                f"got {offset.dtype} {tuple(offset.shape)}"
            )
        self.input_offset.copy_(offset.detach())
        self._weight_changed()

    def _weight_changed(self) -> None:
        if self.input_offset is not None and self.offset_bias is not None:
            weight = self.quantized_weight().dequantize(torch.float64)
            taps = weight.view(self.out_channels, -1, self.in_channels).sum(1)
            self.offset_bias.copy_(taps @ self.input_offset.double())

    def bias_with_offset(self) -> Tensor | None:
        """What is added to the product with the int8 input: the bias, and the offset's share."""
        bias = self._parameters["bias"]
        if self.offset_bias is None or bias is None:
            return bias if self.offset_bias is None else self.offset_bias
        return bias + self.offset_bias

    @classmethod
    def from_float(cls, conv: nn.Conv1d, spec: QuantSpec, *, method: str = "rtn") -> Self:
        """Quantize a trained layer; weight norm of either style is folded into the weight.

        Args:
            conv: the float layer, left as it is. The bias is shared, not copied.
            spec: how to quantize.
            method: rounding, see ``formats.quantize_weight``.

        Raises:
            ValueError: if the weight is not finite or ``method`` is unknown.
            NotImplementedError: for a ``padding_mode`` other than ``"zeros"``.
        """
        self = cls.__new__(cls)
        self._init(conv, spec)
        self._set_quantized(self._quantize(folded_weight(conv), method))
        self.register_parameter("bias", conv._parameters["bias"])
        self.training = conv.training
        return self

    @classmethod
    def empty_like(cls, conv: nn.Conv1d, spec: QuantSpec) -> Self:
        """A layer of the same shape, device and bias dtype, to load a state dict into."""
        device = next((t.device for t in conv.state_dict().values()), None)
        self = cls.__new__(cls)
        self._init(conv, spec)
        self._set_quantized(self._empty())
        bias = conv._parameters["bias"]
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.to("meta")))
        return self.to_empty(device=device).train(conv.training)

    def _empty(self) -> QuantizedWeight:
        empty = empty_depthwise_weight if is_depthwise(self) else empty_weight
        taps = self.kernel_size[0] * self.in_channels // self.groups
        return empty(self.out_channels, taps, self.spec, device="meta")

    def to_float(self) -> nn.Conv1d:
        """A plain ``nn.Conv1d`` with the dequantized weight; weight norm does not come back."""
        weight = self.weight.as_subclass(Tensor)
        conv = nn.Conv1d(1, 1, 1, bias=False, device="meta")
        for name in CONV1D_ATTRIBUTES:
            setattr(conv, name, getattr(self, name))
        conv.weight = nn.Parameter(weight)
        conv.register_parameter("bias", self._parameters["bias"])
        return conv.train(self.training)

    def _quantize(self, weight: Tensor, method: str = "rtn") -> QuantizedWeight:
        if is_depthwise(self):
            return quantize_depthwise_weight(weight.squeeze(1), self.spec, method)
        return quantize_weight(weight.permute(0, 2, 1).flatten(1), self.spec, method)

    def _shape_weight(self, matrix: Tensor) -> Tensor:
        taps = matrix.view(self.out_channels, self.kernel_size[0], -1)  # [N, taps, C_in / groups]
        return taps.transpose(1, 2).contiguous()

    def forward(self, x: Tensor, *, epilogue: str | None = None) -> Tensor:
        """``nn.Conv1d``'s call; ``epilogue`` fuses the activation that follows."""
        if x.dim() == 2:  # unbatched [C, T], as nn.Conv1d
            return self.forward(x[None], epilogue=epilogue)[0]
        if is_pointwise(self):  # a linear layer over frames: int8 inputs get a scale a frame
            frames, weight = self._operands(x.transpose(1, 2))
            y = low_bit_linear(frames, weight, self.bias, epilogue=epilogue)
            return y.transpose(1, 2)
        bias = self.bias
        if self.input_offset is not None:
            x = x - self.input_offset[:, None].to(x.dtype)
            bias = self.bias_with_offset()
            bias = None if bias is None else bias.to(x.dtype)
        frames, weight = self._operands(x.mT, keeps_zeros=True)
        return low_bit_conv1d(frames.mT, weight, bias, epilogue=epilogue, **conv_options(self))

    def extra_repr(self) -> str:
        return f"{nn.Conv1d.extra_repr(self)}, {self.spec}"  # type: ignore[no-untyped-call]


def conv_options(conv: nn.Conv1d) -> dict[str, Any]:
    """Stride, padding, dilation and groups as the ops take them."""
    padding = 0 if conv.padding == "valid" else conv.padding
    return {
        "stride": conv.stride[0],
        "padding": padding[0] if isinstance(padding, tuple) else padding,
        "dilation": conv.dilation[0],
        "groups": conv.groups,
    }


def is_pointwise(conv: nn.Conv1d) -> bool:
    """Whether a convolution is a linear layer over frames."""
    return (
        conv.kernel_size == conv.stride == (1,)
        and conv.groups == 1
        and conv.padding in ((0,), "same", "valid")
    )


def is_depthwise(conv: nn.Conv1d) -> bool:
    """Whether a convolution's weight is stored as one of a depthwise convolution."""
    return conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1


def takes_offset(conv: nn.Conv1d) -> bool:
    """Whether a convolution can quantize its input around an offset.

    Padding is zero, not the offset; groups are not served; one tap is a linear layer over frames,
    which has a scale a frame.
    """
    unpadded = conv.padding in ((0,), "valid")
    return unpadded and conv.groups == 1 and conv.kernel_size[0] > 1


def folded_weight(layer: Any) -> Tensor:
    """The weight a convolution or linear layer computes with, weight norm of any style applied."""
    if hasattr(layer, "weight_g"):  # torch.nn.utils.weight_norm keeps a stale copy in .weight
        hooks = layer._forward_pre_hooks.values()
        dim = next((h.dim for h in hooks if getattr(h, "name", "") == "weight"), 0)
        v, g = layer._parameters["weight_v"], layer._parameters["weight_g"]
        return torch._weight_norm(v.detach(), g.detach(), dim)
    weight: Tensor = layer.weight
    return weight.detach()
