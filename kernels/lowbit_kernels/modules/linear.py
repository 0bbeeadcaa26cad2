"""QLinear: nn.Linear with a low-bit weight."""

from typing import Self

import torch
from torch import Tensor, nn

from lowbit_kernels.formats import QuantizedWeight, QuantSpec, empty_weight, quantize_weight
from lowbit_kernels.matmul import low_bit_linear
from lowbit_kernels.modules.base import QuantizedModule, check_spec


class QLinear(QuantizedModule, nn.Linear):
    """``y = x @ W.T + b`` with W stored in 1, 2, 4 or 8 bits. Takes ``nn.Linear``'s arguments.

    >>> qlinear = QLinear.from_float(nn.Linear(1024, 4096), QuantSpec(bits=4))
    >>> y = qlinear(torch.randn(2, 50, 1024))  # [2, 50, 4096]

    The weight is frozen; gradients flow to the input and to the bias. ``weight`` is a property that
    dequantizes; assigning to it requantizes.

    Args:
        in_features: K, any size.
        out_features: N, any size.
        bias: whether the layer has one; it stays a float parameter.
        device: of the tensors.
        dtype: of the bias, and of ``weight``.
        spec: how the weight and the input are quantized; ``None`` means ``QuantSpec()``.

    Raises:
        ValueError: if a size is not positive or ``spec`` is no ``QuantSpec``.
        NotImplementedError: for ``spec.inputs`` that this version does not compute with.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spec: QuantSpec | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        spec = QuantSpec() if spec is None else check_spec("spec", spec)
        if device is not None and torch.device(device).type == "meta":
            self._init(in_features, out_features, spec)
            self._set_quantized(empty_weight(out_features, in_features, spec, device=device))
            empty = torch.empty(out_features, device=device, dtype=dtype)
            self.register_parameter("bias", nn.Parameter(empty) if bias else None)
            return
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._init(in_features, out_features, spec)
        self._set_quantized(quantize_weight(linear.weight, spec))
        self.register_parameter("bias", linear.bias)

    def _init(self, in_features: int, out_features: int, spec: QuantSpec) -> None:
        if spec.input_offset:
            raise ValueError("spec.input_offset must be False for a linear layer, got True")
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.spec = in_features, out_features, spec

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: QuantSpec, *, method: str = "rtn") -> Self:
        """Quantize a trained layer. The bias is shared, not copied.

        Args:
            linear: the float layer.
            spec: how to quantize.
            method: rounding, see ``formats.quantize_weight``.

        Raises:
            ValueError: if the weight is not finite, ``method`` is unknown or ``spec`` is no
                ``QuantSpec``.
            NotImplementedError: for ``spec.inputs`` that this version does not compute with.
        """
        self = cls.__new__(cls)
        self._init(linear.in_features, linear.out_features, check_spec("spec", spec))
        self._set_quantized(quantize_weight(linear.weight.detach(), spec, method))
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        return self

    @classmethod
    def empty_like(cls, linear: nn.Linear, spec: QuantSpec) -> Self:
        """A layer of the same shape, device and bias dtype, to load a state dict into."""
        device = next((t.device for t in linear.state_dict().values()), None)
        bias = linear._parameters["bias"]
        self = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            device="meta",
            dtype=None if bias is None else bias.dtype,
            spec=spec,
        )
        return self.to_empty(device=device).train(linear.training)

    def to_float(self) -> nn.Linear:
        """A plain ``nn.Linear`` with the dequantized weight."""
        weight = self.weight.as_subclass(Tensor)
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta")
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _quantize(self, weight: Tensor, method: str = "rtn") -> QuantizedWeight:
        return quantize_weight(weight, self.spec, method)

    def _shape_weight(self, matrix: Tensor) -> Tensor:
        return matrix

    def forward(self, x: Tensor, *, epilogue: str | None = None) -> Tensor:
        """``nn.Linear``'s call; ``epilogue`` fuses the activation that follows."""
        x, weight = self._operands(x)
        return low_bit_linear(x, weight, self.bias, epilogue=epilogue)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.spec}"
        )
