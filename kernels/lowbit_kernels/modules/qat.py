"""QATLinear: the training twin of QLinear, whose float weight is fake-quantized in every forward.

Dimension key: N output features, K input features, S scale groups a row.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from lowbit_kernels.checks import autocast
from lowbit_kernels.fake_quant import (
    Levels,
    Quantizer,
    fake_quantize,
    initial_scale,
    training_linear,
    weight_scale,
)
from lowbit_kernels.fake_quant.quantizer import METHODS
from lowbit_kernels.fake_quant.reference import (
    MIN_LEARNED_SCALE,
    as_matrices,
    quantize_reference,
)
from lowbit_kernels.formats import QuantizedWeight, QuantSpec, empty_weight, quantize_weight
from lowbit_kernels.formats.packing import pack, to_codes
from lowbit_kernels.formats.weight import MAX_GROUP_SCALE
from lowbit_kernels.matmul.reference import input_scale_rows
from lowbit_kernels.modules.linear import QLinear

_INPUT_BITS = {"int8": 8, "int4": 4, "int2": 2, "int1": 1}


class QATLinear(nn.Linear):
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
    learned. Train under autocast, not with 16-bit parameters, and without weight decay on steps.

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

    weight_step: nn.Parameter | None  # [N], or [1] with group_size="tensor"
    group_scale: Tensor | None  # [N, S] uint8
    input_step: nn.Parameter | None  # []

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
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_quantizer(spec, quantizer)

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: QuantSpec, quantizer: str = "lsq") -> Self:
        """The training twin of a layer. Weight and bias are shared, not copied.

        Raises:
            ValueError: naming the argument, the rule and the value; also for a weight that is not
                finite.
            NotImplementedError: for specs that no training twin exists for.
        """
        check_qat(spec, quantizer)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._init_quantizer(spec, quantizer)
        return self.train(linear.training)

    def _init_quantizer(self, spec: QuantSpec, quantizer: str) -> None:
        self.spec, self.quantizer = spec, quantizer
        (N, K), device = self.weight.shape, self.weight.device
        if self.weight.is_meta:
            start = empty_weight(N, K, spec, device=device)
        else:
            start = quantize_weight(self.weight.detach(), spec, "search")
        self.register_buffer("group_scale", start.group_scale)
        step = None
        if quantizer == "lsq" or (quantizer == "elastic" and spec.bits > 1):
            scale = start.scale[:1].clone() if spec.group_size == "tensor" else start.scale
            # a row of zeros starts as one of nn.Linear's own initial size
            usual = 1 / (Levels.of_weight(spec.bits).high * math.sqrt(K))
            step = nn.Parameter(torch.where(scale > 0, scale * self._top, usual))
        self.register_parameter("weight_step", step)
        learned = spec.inputs is not None and spec.input_scale == "static"
        zero = torch.zeros((), dtype=torch.float32, device=device)
        self.register_parameter("input_step", nn.Parameter(zero) if learned else None)
        self._input_is_set = False

    @property
    def _top(self) -> int:
        """The largest group scale: a row's ``scale`` is ``weight_step`` divided by it."""
        return MAX_GROUP_SCALE[self.spec.bits] if self.spec.group else 1

    def weight_quantizer(self) -> Quantizer:
        """How the weight is fake-quantized now."""
        spec, center = self.spec, None
        levels = Levels.of_weight(spec.bits)
        if self.weight_step is not None:
            scale, method = self.weight_step / self._top, self.quantizer
        else:
            shared, method = spec.group_size == "tensor", "ste"
            scale = weight_scale(self.weight, levels, self.group_scale, spec.group, shared=shared)
            if self.quantizer == "elastic":
                weight = self.weight.detach()
                center = (weight.mean() if shared else weight.mean(1)).float()
        return Quantizer(levels, scale, method, self.group_scale, spec.group, center)

    def _quantize_input(self, x: Tensor) -> Tensor:
        spec = self.spec
        if spec.inputs is None:
            return x
        (x,) = autocast(x)
        levels = Levels.of_input(_INPUT_BITS[spec.inputs])
        if spec.input_scale == "token":
            return fake_quantize(x, Quantizer(levels))
        if spec.input_scale == "utterance":
            rows = input_scale_rows(x.detach(), "utterance", None)
            return fake_quantize(x, Quantizer(levels, rows.view(x.shape[:-1])))
        assert self.input_step is not None, "static scales are learned"
        if not self._input_is_set and x.numel():
            with torch.no_grad():
                self.input_step.copy_(initial_scale(x, levels))
            self._input_is_set = True
        return fake_quantize(x, Quantizer(levels, self.input_step, self.quantizer))

    def forward(
        self, x: Tensor, *, epilogue: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """``nn.Linear``'s call; ``epilogue`` and ``residual`` as in ``training_linear``."""
        return training_linear(
            self._quantize_input(x),
            self.weight,
            self.bias,
            quantizer=self.weight_quantizer(),
            epilogue=epilogue,
            residual=residual,
        )

    @torch.no_grad()
    def to_quantized(self) -> QLinear:
        """The layer with its weight packed: the integers it was trained with. Shares the bias.

        Raises:
            ValueError: where the scale of the inputs is learned, and no batch has set it.
            NotImplementedError: for inputs of fewer than 8 bits, which no packed layer computes.
        """
        layer = QLinear(
            self.in_features, self.out_features, bias=False, device="meta", spec=self.spec
        )
        input_scale = None
        if self.input_step is not None:
            if not self._input_is_set:
                raise ValueError("input_step must be set by a first batch, got none so far")
            input_scale = self.input_step.float().clamp_min(MIN_LEARNED_SCALE)
        bits = self.spec.bits
        rows, quantizer = as_matrices(self.weight, self.weight_quantizer())
        level, _, scale, _ = quantize_reference(rows, quantizer)
        layer._set_quantized(
            QuantizedWeight(
                qweight=pack(to_codes(level.to(torch.int8), bits), bits),
                scale=scale.float().expand(self.out_features, 1).flatten().contiguous(),
                group_scale=None if self.group_scale is None else self.group_scale.clone(),
                zero_point=None,
                K=self.in_features,
                spec=self.spec,
                input_scale=input_scale,
            )
        )
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        stored = state_dict.get(prefix + "input_step")
        if stored is not None and not stored.is_meta:
            self._input_is_set = bool(stored != 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec}, quantizer={self.quantizer!r}"


def check_qat(spec: QuantSpec, quantizer: str) -> None:
    """Whether a training twin exists.

    Raises:
        ValueError: for a wrong spec or quantizer.
        NotImplementedError: listing what is served.
    """
    if not isinstance(spec, QuantSpec):
        raise ValueError(f"spec must be a QuantSpec, got {spec!r}")
    if quantizer not in METHODS:
        raise ValueError(f"quantizer must be one of {METHODS}, got {quantizer!r}")
    if spec.input_offset:
        raise ValueError("spec.input_offset must be False for a linear layer, got True")
    if not spec.symmetric:
        raise NotImplementedError("training serves symmetric=True, got symmetric=False")
    if spec.inputs is None:
        return
    if spec.inputs not in _INPUT_BITS:
        raise NotImplementedError(
            f"training serves inputs None and {tuple(_INPUT_BITS)}, got {spec.inputs!r}"
        )
    if spec.inputs != "int8" and spec.input_scale != "static":
        raise NotImplementedError(
            "training serves inputs below 8 bits with input_scale='static', which is learned, "
            f"got {spec.inputs!r} and {spec.input_scale!r}"
        )
    if spec.input_scale == "static" and quantizer == "ste":
        raise NotImplementedError(
            "input_scale='static' is learned by quantizer 'lsq' or 'elastic', got 'ste'"
        )
