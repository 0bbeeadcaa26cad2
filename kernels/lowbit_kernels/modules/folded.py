"""Layers of pre-norm blocks whose LayerNorm costs no pass of its own, for 16-bit inference.

Dimension key: B batch, T frames, M = B * T rows, K input features, N output features; S tiles of
features that share statistics.
"""

from typing import Self

import torch
from torch import Tensor, nn

from lowbit_kernels.formats import QuantizedWeight, QuantSpec, quantize_weight
from lowbit_kernels.matmul import low_bit_linear_normed
from lowbit_kernels.modules.base import QuantizedModule, check_spec


class FoldedLinear(QuantizedModule):
    """``linear(norm(h))`` with the norm's scale in the low-bit weight and its shift in the bias.

    >>> folded = FoldedLinear.from_float(nn.LayerNorm(1024), nn.Linear(1024, 4096), QuantSpec(4))
    >>> h = torch.randn(2, 50, 1024).bfloat16()
    >>> with torch.inference_mode():
    ...     y = folded.bfloat16()(h, row_statistics(h.flatten(0, 1)))  # [2, 50, 4096]

    For inference: it is no ``nn.Linear``, since an adapter would see the input without its norm.
    ``weight`` is the product of weight and scale, which is what is rounded: where scales spread
    among the features of a group, small ones lose digits that a ``QLinear`` after the norm keeps.
    Of random 4-bit weights, 23.6 dB with equal scales, uniform scales of 0.2 to 3 leave 20 dB,
    log-normal ones of deviation 1 leave 15 dB. Where a mean is many deviations, see
    ``low_bit_linear_normed``.
    """

    weight_sum: Tensor
    bias: nn.Parameter
    in_features: int
    out_features: int
    eps: float

    @classmethod
    def from_float(
        cls, norm: nn.LayerNorm, linear: nn.Linear, spec: QuantSpec, *, method: str = "rtn"
    ) -> Self:
        """Fold a norm into the layer after it and quantize that.

        Args:
            norm: over the layer's input features; its ``eps`` is kept.
            linear: the float layer.
            spec: how to quantize; symmetric, ``inputs=None``.
            method: rounding, see ``formats.quantize_weight``.

        Raises:
            ValueError: if the norm's shape is not ``(in_features,)``, the weight is not finite,
                ``method`` is unknown or ``spec`` is no ``QuantSpec``.
            NotImplementedError: for asymmetric weights or quantized inputs.
        """
        check_spec("spec", spec)
        if spec.inputs is not None or not spec.symmetric:
            raise NotImplementedError(
                f"a LayerNorm is folded into symmetric weights with inputs=None, got {spec}"
            )
        if norm.normalized_shape != (linear.in_features,):
            raise ValueError(
                f"norm.normalized_shape must be ({linear.in_features},), the layer's in_features, "
                f"got {norm.normalized_shape}"
            )
        self = cls()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.eps = norm.eps
        weight = linear.weight.detach()
        bias = torch.zeros_like(weight[:, 0]) if linear.bias is None else linear.bias.detach()
        if norm.bias is not None:
            bias = (bias.double() + weight.double() @ norm.bias.detach().double()).to(bias.dtype)
        if norm.weight is not None:
            weight = weight.float() * norm.weight.detach().float()
        self._set_quantized(quantize_weight(weight, spec, method))
        self.bias = nn.Parameter(bias, requires_grad=False)
        # int32 survives .half(), and sums of int8 stay exact
        self.register_buffer("weight_sum", self._sum())
        return self.train(linear.training)

    def _sum(self) -> Tensor:
        return self.quantized_weight().integers().sum(1, dtype=torch.int32)

    def _quantize(self, weight: Tensor, method: str = "rtn") -> QuantizedWeight:
        return quantize_weight(weight, self.spec, method)

    def _shape_weight(self, matrix: Tensor) -> Tensor:
        return matrix

    def _weight_changed(self) -> None:
        self.weight_sum = self._sum()

    def forward(self, h: Tensor, stats: Tensor, *, epilogue: str | None = None) -> Tensor:
        """The layer of the normalized rows.

        Args:
            h: [..., K], fp16 or bf16, of the bias's dtype.
            stats: [S, 2, M] fp32, ``row_statistics`` of h.
            epilogue: as in ``low_bit_linear``.
        """
        weight = self.quantized_weight()
        return low_bit_linear_normed(
            h, stats, weight, self.weight_sum, self.bias, eps=self.eps, epilogue=epilogue
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"eps={self.eps}, {self.spec}"
        )
