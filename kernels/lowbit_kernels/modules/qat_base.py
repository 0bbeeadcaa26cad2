"""What QATLinear and QATConv1d share: quantizers of weight and input, and packing.

Dimension key: N output features, K the reduction (see ``formats/packing.py``), S scale groups.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lowbit_kernels.checks import autocast
from lowbit_kernels.fake_quant import Levels, Quantizer, initial_scale, weight_scale
from lowbit_kernels.fake_quant.quantizer import INPUT_LEVELS, METHODS
from lowbit_kernels.fake_quant.reference import (
    MIN_LEARNED_SCALE,
    as_matrices,
    quantize_reference,
)
from lowbit_kernels.formats import (
    QuantizedWeight,
    QuantSpec,
    empty_depthwise_weight,
    empty_weight,
    quantize_depthwise_weight,
    quantize_weight,
)
from lowbit_kernels.formats.packing import pack, to_codes
from lowbit_kernels.formats.weight import MAX_GROUP_SCALE
from lowbit_kernels.matmul.reference import input_scale_rows
from lowbit_kernels.modules.base import QuantizedModule, check_spec, round_input
from lowbit_kernels.modules.conv1d import folded_weight


class QATModule(nn.Module):
    """Mixin of the training twins; comes before ``nn.Linear`` or ``nn.Conv1d`` in the bases."""

    spec: QuantSpec
    quantizer: str
    weight_step: nn.Parameter | None  # [N], or [1] with group_size="tensor"
    group_scale: Tensor | None  # [N, S] uint8
    input_step: nn.Parameter | None  # []

    # of the float layer
    _attributes: tuple[str, ...]

    @classmethod
    def from_float(cls, layer: nn.Module, spec: QuantSpec, quantizer: str = "lsq") -> Self:
        """The training twin of a layer. Weight and bias are shared, not copied.

        A weight that is computed in every forward, by weight norm of either style or another
        parametrization, stays so: what it is computed from trains.

        Raises:
            ValueError: naming the argument, the rule and the value; also for a weight that is not
                finite.
            NotImplementedError: for specs that no training twin exists for.
        """
        check_qat(spec, quantizer)
        kind = cls
        if is_parametrized(layer):  # the layer's own class computes the weight, as a property
            kind = type(f"Parametrized{cls.__name__}", (cls,), dict(vars(type(layer))))
        self = kind.__new__(kind)
        nn.Module.__init__(self)
        for name in cls._attributes:
            setattr(self, name, getattr(layer, name))
        self._parameters.update(layer._parameters)
        self._modules.update(layer._modules)
        if hasattr(layer, "weight_g"):  # of torch.nn.utils.weight_norm, whose hook sets the weight
            self.weight = folded_weight(layer)
            for hook in layer._forward_pre_hooks.values():
                if getattr(hook, "name", "") == "weight":
                    self.register_forward_pre_hook(hook)
        self._init_quantizer(spec, quantizer)
        return self.train(layer.training)

    @property
    def _is_depthwise(self) -> bool:
        """Whether the format stores the weight [K, N], with one scale a channel."""
        return False

    def _matrix(self, weight: Tensor) -> Tensor:
        """The format's view [N, K] of a weight in the layer's own shape."""
        raise NotImplementedError(f"{type(self).__name__} must say how its weight is a matrix")

    def to_quantized(self) -> QuantizedModule:
        """The layer with its weight packed: the integers it was trained with. Shares the bias.

        Raises:
            ValueError: where the scale of the inputs is learned, and no batch has set it.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it is packed as")

    def _init_quantizer(self, spec: QuantSpec, quantizer: str) -> None:
        self.spec, self.quantizer = spec, quantizer
        weight = self._matrix(folded_weight(self))
        (N, K), device = weight.shape, weight.device
        if weight.is_meta:
            empty = empty_depthwise_weight if self._is_depthwise else empty_weight
            start = empty(N, K, spec, device=device)
        else:
            make = quantize_depthwise_weight if self._is_depthwise else quantize_weight
            start = make(weight, spec, "search")
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
        return 1 if self.group_scale is None else MAX_GROUP_SCALE[self.spec.bits]

    def weight_quantizer(self, weight: Tensor | None = None) -> Quantizer:
        """How the weight, as a matrix, is fake-quantized now; ``weight`` saves computing it."""
        spec, center = self.spec, None
        levels, size = Levels.of_weight(spec.bits), 0 if self.group_scale is None else spec.group
        if self.weight_step is not None:
            scale, method = self.weight_step / self._top, self.quantizer
        else:
            shared, method = spec.group_size == "tensor", "ste"
            matrix = self._matrix(folded_weight(self) if weight is None else weight.detach())
            scale = weight_scale(matrix, levels, self.group_scale, size, shared=shared)
            if self.quantizer == "elastic":
                center = (matrix.mean() if shared else matrix.mean(1)).float()
        return Quantizer(levels, scale, method, self.group_scale, size, center)

    def _quantize_input(self, x: Tensor, kind: str, *, keeps_zeros: bool = False) -> Tensor:
        """x [..., K] fake-quantized, by a scale a ``kind`` as in ``spec.input_scale``."""
        if self.spec.inputs is None:
            return x
        (x,) = autocast(x)
        levels = INPUT_LEVELS[self.spec.inputs]
        if kind == "token":
            quantizer = Quantizer(levels)
        elif kind == "utterance":
            rows = input_scale_rows(x.detach(), "utterance", None)
            quantizer = Quantizer(levels, rows.view(x.shape[:-1]))
        else:
            assert self.input_step is not None, "static scales are learned"
            if not self._input_is_set and x.numel():
                with torch.no_grad():
                    self.input_step.copy_(initial_scale(x, levels))
                self._input_is_set = True
            quantizer = Quantizer(levels, self.input_step, self.quantizer)
        return round_input(x, quantizer, keeps_zeros=keeps_zeros)

    @torch.no_grad()
    def _packed_weight(self) -> QuantizedWeight:
        """The integers and scales that the weight is trained with."""
        input_scale, bits, weight = None, self.spec.bits, folded_weight(self)
        if self.input_step is not None:
            if not self._input_is_set:
                raise ValueError("input_step must be set by a first batch, got none so far")
            input_scale = self.input_step.float().clamp_min(MIN_LEARNED_SCALE)
        rows, quantizer = as_matrices(self._matrix(weight), self.weight_quantizer(weight))
        level, _, scale, _ = quantize_reference(rows, quantizer)
        level, (N, K) = level.to(torch.int8), rows.shape
        return QuantizedWeight(
            qweight=level.t().contiguous()
            if self._is_depthwise
            else pack(to_codes(level, bits), bits),
            scale=scale.float().expand(N, 1).flatten().contiguous(),
            group_scale=None if self.group_scale is None else self.group_scale.clone(),
            zero_point=None,
            K=K,
            spec=self.spec,
            input_scale=input_scale,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        stored = state_dict.get(prefix + "input_step")
        if stored is not None and not stored.is_meta:
            self._input_is_set = bool(stored != 0)


def check_qat(spec: QuantSpec, quantizer: str) -> None:
    """Whether a training twin exists.

    Raises:
        ValueError: for a wrong spec or quantizer.
        NotImplementedError: listing what is served.
    """
    check_spec("spec", spec, (None, *INPUT_LEVELS))
    if quantizer not in METHODS:
        raise ValueError(f"quantizer must be one of {METHODS}, got {quantizer!r}")
    if spec.input_offset:
        raise ValueError("spec.input_offset must be False for a layer that trains, got True")
    if not spec.symmetric:
        raise NotImplementedError("training serves symmetric=True, got symmetric=False")
    # "ste" scales by the largest magnitude, where few levels round nearly all to zero
    if spec.inputs is not None and spec.input_scale == "static" and quantizer == "ste":
        raise NotImplementedError(
            "input_scale='static' is learned by quantizer 'lsq' or 'elastic', got 'ste'"
        )
