"""QATLinear and QATConv1d: training twins, whose float weight is fake-quantized in every forward.

Dimension key: B batch, C input channels, N output channels, T frames.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.conv1d import training_conv1d
from lowbit_kernels.fake_quant import training_linear
from lowbit_kernels.formats import QuantSpec
from lowbit_kernels.modules.conv1d import (
    CONV1D_ATTRIBUTES,
    QConv1d,
    conv_options,
    is_depthwise,
    is_pointwise,
)
from lowbit_kernels.modules.linear import QLinear
from lowbit_kernels.modules.qat_base import QATModule, check_qat


class QATLinear(QATModule, nn.Linear):
    """``nn.Linear`` that trains as it will be quantized. Takes ``nn.Linear``'s arguments.

    >>> layer = QATLinear.from_float(nn.Linear(1024, 4096), QuantSpec(bits=2))
    >>> y = layer(torch.randn(2, 50, 1024))  # [2, 50, 4096]
    >>> layer.to_quantized()  # the same outputs, to rounding, from 2-bit weights

    ``weight`` and ``bias`` stay float parameters. Their levels are those of ``spec``'s packed
    format, so ``to_quantized`` stores the very integers that the layer was trained with:
    ``W = level * group_scale * scale``, with integers ``group_scale`` that are chosen once, from
    the weight the layer starts with, and a float scale a row (or one for all):

    * ``"ste"``: from the weight's magnitudes in every forward (``fake_quant.weight_scale``);
    * ``"lsq"``: learned. ``weight_step`` is LSQ's step size, of the group with the largest possible
      ``group_scale``. It starts where the rounding error of the weight is least: LSQ's own start,
      2 mean|W| / sqrt(Q_P), is meant for levels one step apart and is twice too wide for 2 bits;
    * ``"elastic"``: as ``"lsq"`` above 1 bit; at 1 bit BiT's mean|W| * sign(W - mean W), over a row
      or, with ``group_size="tensor"`` as published, over the whole weight.

    Inputs (``spec.inputs``) of 8 bits are fake-quantized with a scale a token or utterance,
    straight through; with ``input_scale="static"`` the scale ``input_step`` is learned, by LSQ or
    BiT's elastic quantizer, from a start that the first batch sets. Below 8 bits it is always
    learned, and so not served by ``"ste"``: the largest magnitude, as the highest of few levels,
    would round nearly all to zero. BiT's second set, from zero on for what leaves a ReLU or a
    softmax, is asked for: ``inputs="uint1"``, ``"uint2"`` or ``"uint4"``. Train under autocast, not
    with 16-bit parameters, and without weight decay on steps.

    Args:
        in_features: K, any size.
        out_features: N, any size.
        bias: whether the layer has one.
        device: of the tensors.
        dtype: of weight and bias.
        spec: how weight and inputs will be quantized; ``None`` means ``QuantSpec()``.
        quantizer: ``"ste"``, ``"lsq"`` or ``"elastic"``.

    Raises:
        ValueError: naming the argument, the rule and the value.
        NotImplementedError: for specs that no training twin exists for.
    """

    _attributes = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spec: QuantSpec | None = None,
        quantizer: str = "lsq",
    ) -> None:
        spec = QuantSpec() if spec is None else spec
        check_qat(spec, quantizer)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._init_quantizer(spec, quantizer)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight

    def forward(
        self, x: Tensor, *, epilogue: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """``nn.Linear``'s call; ``epilogue`` and ``residual`` as in ``training_linear``."""
        weight = self.weight
        return training_linear(
            self._quantize_input(x, self.spec.input_scale),
            weight,
            self.bias,
            quantizer=self.weight_quantizer(weight),
            epilogue=epilogue,
            residual=residual,
        )

    def to_quantized(self) -> QLinear:
        layer = QLinear(
            self.in_features, self.out_features, bias=False, device="meta", spec=self.spec
        )
        layer._set_quantized(self._packed_weight())
        layer.register_parameter("bias", self._parameters["bias"])
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self.spec}, quantizer={self.quantizer!r}"


class QATConv1d(QATModule, nn.Conv1d):
    """``nn.Conv1d`` that trains as it will be quantized. Takes ``nn.Conv1d``'s arguments.

    >>> conv = QATConv1d.from_float(nn.Conv1d(512, 512, 3, stride=2), QuantSpec(4, None))
    >>> y = conv(torch.randn(2, 512, 1601))  # [2, 512, 800]
    >>> conv.to_quantized()  # a QConv1d: the same outputs, to rounding

    Weights, quantizers and inputs are those of ``QATLinear``, but an input has one scale an
    utterance where it has not a static one (a convolution of one tap, a linear layer over frames,
    has a scale a frame as ``spec`` says). A depthwise weight has a scale a channel, or one. Padded
    frames are expected to be zero, so that they raise no scale; they stay zero in one bit, too.

    Args:
        spec: how weight and inputs will be quantized; ``None`` means ``QuantSpec()``.
        quantizer: ``"ste"``, ``"lsq"`` or ``"elastic"``.

    Raises:
        ValueError: naming the argument, the rule and the value.
        NotImplementedError: for specs that no training twin exists for, or a ``padding_mode`` other
            than ``"zeros"``.
    """

    _attributes = CONV1D_ATTRIBUTES

    def __init__(
        self, *args: Any, spec: QuantSpec | None = None, quantizer: str = "lsq", **kwargs: Any
    ) -> None:
        spec = QuantSpec() if spec is None else spec
        check_qat(spec, quantizer)
        nn.Conv1d.__init__(self, *args, **kwargs)
        self._init_quantizer(spec, quantizer)

    def _init_quantizer(self, spec: QuantSpec, quantizer: str) -> None:
        if self.padding_mode != "zeros":
            raise NotImplementedError(
                f"padding_mode must be 'zeros' for a QATConv1d, got {self.padding_mode!r}"
            )
        super()._init_quantizer(spec, quantizer)

    @property
    def _is_depthwise(self) -> bool:
        return is_depthwise(self)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2).flatten(1)

    def forward(self, x: Tensor, *, epilogue: str | None = None) -> Tensor:
        """``nn.Conv1d``'s call; ``epilogue`` fuses the activation that follows."""
        if x.dim() == 2:  # unbatched [C, T], as nn.Conv1d
            return self.forward(x[None], epilogue=epilogue)[0]
        weight, kind = self.weight, self.spec.input_scale
        quantizer = self.weight_quantizer(weight)
        if is_pointwise(self):
            frames, weight = self._quantize_input(x.mT, kind), weight.squeeze(2)
            y = training_linear(frames, weight, self.bias, quantizer=quantizer, epilogue=epilogue)
            return y.mT
        kind = "static" if kind == "static" else "utterance"
        frames = self._quantize_input(x.mT, kind, keeps_zeros=True)
        return training_conv1d(
            frames.mT,
            weight,
            self.bias,
            quantizer=quantizer,
            epilogue=epilogue,
            **conv_options(self),
        )

    def to_quantized(self) -> QConv1d:
        layer = QConv1d.__new__(QConv1d)
        layer._init(self, self.spec)
        layer._set_quantized(self._packed_weight())
        layer.register_parameter("bias", self._parameters["bias"])
        return layer.train(self.training)

    def extra_repr(self) -> str:
        text = nn.Conv1d.extra_repr(self)  # type: ignore[no-untyped-call]
        return f"{text}, {self.spec}, quantizer={self.quantizer!r}"
