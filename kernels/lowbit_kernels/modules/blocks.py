"""What an encoder layer is made of, in as few ops as its parts allow, for inference.

An input that a linear layer would round to int8 comes as int8 from the op before it: with a scale a
row from a norm, with a static scale from another linear layer or from attention, too. Of a 16-bit
input the matmul before a norm finds the rows' statistics, and the one behind it applies the norm.

Dimension key: any leading dimensions; K input features, N output features; S tiles of features that
share statistics, M rows.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.formats.weight import TENSORS
from lowbit_kernels.matmul import (
    csrc,
    low_bit_linear,
    low_bit_linear_int8,
    low_bit_linear_normed,
    low_bit_linear_with_stats,
    norm_columns,
)
from lowbit_kernels.modules.base import remembered
from lowbit_kernels.modules.conv1d import QConv1d
from lowbit_kernels.modules.linear import QLinear
from lowbit_kernels.norm import norm_of_norm, norm_quantize


class Int8Rows(NamedTuple):
    """[..., K] int8 and the scale of each row, [..., 1] fp32; None: the weight's static one."""

    q: Tensor
    scale: Tensor | None


class UnnormalizedRows(NamedTuple):
    """[..., K], ``row_statistics`` of it [S, 2, M], and the LayerNorm that a matmul applies."""

    x: Tensor
    stats: Tensor
    norm: nn.LayerNorm


class Operand(NamedTuple):
    """The weight and bias of a matmul; ``static`` is the weight with its input's scale in its own.

    Attributes:
        owner: the module that keeps what is computed of the weight.
        weight: [N, K].
        bias: [N] or None.
        static: [N, K], for int8 rows without a scale. None: the input's scale is not static.
    """

    owner: nn.Module
    weight: QuantizedWeight
    bias: Tensor | None
    static: QuantizedWeight | None = None

    @property
    def takes_int8(self) -> bool:
        """Whether the input may come from a norm as int8 rows."""
        spec = self.weight.spec
        return spec.inputs == "int8" and spec.input_scale != "utterance"

    def folds(self, x: Tensor) -> bool:
        """Whether a LayerNorm around this matmul can be part of it; x has its dtype and rows."""
        spec, few = self.weight.spec, x.is_cuda and x.shape[:-1].numel() <= csrc.MAX_ROWS
        return (
            spec.inputs is None
            and spec.symmetric
            and x.dtype in (torch.float16, torch.bfloat16)
            # few rows have a kernel of their own, without norms
            and not (few and csrc.is_available())
            and not (spec.deterministic and not x.is_cuda)
            # what is computed of a weight could not be kept
            and not self.weight.qweight.is_inference()
        )


class Reader(NamedTuple):
    """A norm, and the matmul that takes its result and nobody else does."""

    norm: nn.LayerNorm
    to: Operand


def operand(layer: QLinear | QConv1d, factor: float = 1.0) -> Operand:
    """The weight and bias of a linear layer or pointwise convolution.

    Args:
        layer: the layer.
        factor: what its output is multiplied by, a power of two.
    """
    weight, bias = layer.quantized_weight(), layer._parameters["bias"]
    is_static = weight.input_scale is not None and weight.spec.inputs == "int8"
    if factor == 1 and not is_static:
        return Operand(layer, weight, bias)

    def make() -> Operand:
        scaled = dataclasses.replace(weight, scale=weight.scale * factor)
        scaled_bias = None if bias is None else bias.detach() * factor
        if not is_static or weight.input_scale is None:
            return Operand(layer, scaled, scaled_bias)
        static = dataclasses.replace(scaled, scale=scaled.scale * weight.input_scale)
        return Operand(layer, scaled, scaled_bias, static)

    tensors = [t for t in (weight.scale, weight.input_scale, bias) if t is not None]
    return remembered(layer, "_operand", tensors, make)  # type: ignore[no-any-return]


def joined(owner: Any, layers: Sequence[QLinear]) -> Operand:
    """The weights of layers with one input as one, whose rows the layers' own tensors are views of.

    They become so at the first call, and again after they were moved or replaced.

    Args:
        owner: the module that keeps the joined tensors.
        layers: such that ``can_join``.
    """
    stored = owner.__dict__.get("_joined")
    if stored is None or stored[0] != _addresses(layers):
        # not in inference mode, whose tensors could not be part of a training step later on
        with torch.inference_mode(False), torch.no_grad():
            made = _join(layers)
        stored = owner.__dict__["_joined"] = _addresses(layers), made
    weights: Operand = stored[1]
    return weights


def is_fusible(layer: Any) -> bool:
    """Whether a layer is a low-bit linear one whose input the ops round."""
    return type(layer) is QLinear and not layer.spec.has_low_inputs


def can_join(layers: Sequence[Any]) -> bool:
    """Whether layers are low-bit linear ones that one matmul can serve."""
    if not all(is_fusible(layer) for layer in layers):
        return False
    weights = {(layer.spec, layer.K, layer.qweight.device) for layer in layers}
    biases = {layer.bias.dtype for layer in layers if layer.bias is not None}
    return len(weights) == 1 and len(biases) <= 1 and _have_one_input_scale(layers)


def _have_one_input_scale(layers: Sequence[QLinear]) -> bool:
    """Whether static scales are equal; training learns one a layer."""
    scales = [layer.input_scale for layer in layers if layer.input_scale is not None]

    def compare() -> bool:
        return len({float(scale) for scale in scales}) == 1

    return not scales or bool(remembered(layers[0], "_one_scale", scales, compare))


def _addresses(layers: Sequence[QLinear]) -> list[int]:
    held = (tensors for layer in layers for tensors in (layer._buffers, layer._parameters))
    return [t.data_ptr() for tensors in held for t in tensors.values() if t is not None]


def _join(layers: Sequence[QLinear]) -> Operand:
    first, sizes = layers[0], [layer.out_features for layer in layers]
    tensors: dict[str, Any] = {}
    for name in TENSORS:
        if first._buffers[name] is not None:
            tensors[name] = torch.cat([getattr(layer, name) for layer in layers])
            for layer, rows in zip(layers, torch.split(tensors[name], sizes), strict=True):
                layer._buffers[name] = rows
    bias, given = None, [layer._parameters["bias"] for layer in layers]
    if any(part is not None for part in given):
        like = next(part for part in given if part is not None)
        bias = torch.cat([
            like.new_zeros(size) if part is None else part.data
            for part, size in zip(given, sizes, strict=True)
        ])  # fmt: skip
        for part, rows in zip(given, torch.split(bias, sizes), strict=True):
            if part is not None:
                part.data = rows
    return Operand(first, dataclasses.replace(first.quantized_weight(), **tensors), bias)


def normalize(
    x: Tensor, norm: nn.LayerNorm, to: Operand, stats: Tensor | None = None
) -> Tensor | Int8Rows | UnnormalizedRows:
    """A LayerNorm of x [..., K] for a linear layer, which applies it if there are statistics."""
    if stats is not None:
        return UnnormalizedRows(x, stats, norm)
    if not to.takes_int8:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    static = to.weight.input_scale
    return Int8Rows(*norm_quantize(x, norm.weight, norm.bias, eps=norm.eps, scale=static)[:2])


def normalize_and_keep(
    x: Tensor, norm: nn.LayerNorm, to: Operand | None
) -> tuple[Tensor, Int8Rows | None]:
    """A LayerNorm of x [..., K], and the same as int8 rows if the next linear layer takes them."""
    if to is None or not to.takes_int8:
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps), None
    static = to.weight.input_scale
    q, scale, _, y = norm_quantize(
        x, norm.weight, norm.bias, eps=norm.eps, scale=static, return_normalized=True
    )
    return y, Int8Rows(q, scale)


def normalize_twice(
    x: Tensor, first: nn.LayerNorm, second: nn.LayerNorm, to: Operand
) -> tuple[Tensor, Tensor | Int8Rows]:
    """A LayerNorm of x [..., K], and a second one of the result for a linear layer."""
    if not to.takes_int8:
        return norm_of_norm(x, first, second, int8=False)  # type: ignore[return-value]
    y, q, scale = norm_of_norm(x, first, second, int8=True, scale=to.weight.input_scale)
    return y, Int8Rows(q, scale)


def linear(
    x: Tensor | Int8Rows | UnnormalizedRows,
    to: Operand,
    dtype: torch.dtype,
    *,
    epilogue: str | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """A linear layer [..., N] of x [..., K]; of ``dtype``, or int8 by ``out_scale``."""
    if isinstance(x, UnnormalizedRows):
        return _linear_normed(x, to, epilogue, residual)
    if not isinstance(x, Int8Rows) and out_scale is None:
        return low_bit_linear(x, to.weight, to.bias, epilogue=epilogue, residual=residual)
    assert isinstance(x, Int8Rows), "a result is rounded where the input was"
    weight = to.weight if x.scale is not None else to.static
    assert weight is not None, "rows without a scale are made by the weight's own"
    return low_bit_linear_int8(
        x.q, x.scale, weight, to.bias, epilogue=epilogue, residual=residual, dtype=dtype,
        out_scale=out_scale,
    )  # fmt: skip


def _linear_normed(
    rows: UnnormalizedRows, to: Operand, epilogue: str | None, residual: Tensor | None
) -> Tensor:
    x, stats, norm = rows
    weight, affine = to.weight, (norm.weight, norm.bias)
    tensors = [t for t in (weight.qweight, weight.group_scale, *affine) if t is not None]
    columns = remembered(to.owner, "_columns", tensors, partial(norm_columns, weight, *affine))
    return low_bit_linear_normed(
        x, stats, *affine, columns, weight, to.bias, eps=norm.eps, epilogue=epilogue,
        residual=residual,
    )  # fmt: skip


def add_linear(
    x: Tensor | Int8Rows, to: Operand, residual: Tensor, reader: Reader | None
) -> tuple[Tensor, Tensor | None]:
    """A linear layer of x [..., K] added to the residual [..., N].

    And ``row_statistics`` of the sum, if its ``reader`` can take them in place of a norm's result.
    """
    if reader is None or isinstance(x, Int8Rows) or not to.folds(x):
        return linear(x, to, residual.dtype, residual=residual), None
    norm, after = reader
    affine = norm.weight, norm.bias
    fits = all(t is not None and t.dtype == x.dtype and not t.is_inference() for t in affine)
    if not fits or not after.folds(x):
        return linear(x, to, residual.dtype, residual=residual), None
    return low_bit_linear_with_stats(x, to.weight, to.bias, residual=residual)


def hidden(
    x: Tensor | Int8Rows | UnnormalizedRows,
    first: Operand,
    second: Operand,
    epilogue: str | None,
    dtype: torch.dtype,
) -> Tensor | Int8Rows:
    """Of a feed-forward block: linear layer and activation of x [..., K], for the second layer."""
    if second.static is None or not isinstance(x, Int8Rows):
        return linear(x, first, dtype, epilogue=epilogue)
    scale = second.weight.input_scale
    return Int8Rows(linear(x, first, dtype, epilogue=epilogue, out_scale=scale), None)
