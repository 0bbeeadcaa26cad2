"""The Conformer's convolution module in three low-bit ops, for inference.

Dimension key: B batch, T frames, C channels.
"""

from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from lowbit_kernels.conv1d.depthwise_op import MAX_CHANNELS, depthwise_conv1d_norm
from lowbit_kernels.conv1d.geometry import Padding
from lowbit_kernels.formats import QuantSpec
from lowbit_kernels.modules.base import remembered
from lowbit_kernels.modules.blocks import Int8Rows, UnnormalizedRows, linear, normalize, operand
from lowbit_kernels.modules.conv1d import QConv1d, conv_options, is_depthwise, is_pointwise

Folded = tuple[Tensor, Tensor | None]


def fuses_convolution(
    pointwise1: Any, depthwise: Any, norm: Any, pointwise2: Any, *, hooks: bool = True
) -> bool:
    """Whether ``convolve`` computes what these modules compute one after the other.

    Not where a hook on one of them, which it would not call, wants to see or change a tensor.
    """
    convs, width = (pointwise1, depthwise, pointwise2), getattr(depthwise, "out_channels", 0)
    if not all(type(conv) is QConv1d and conv.spec.inputs in (None, "int8") for conv in convs):
        return False
    if hooks and any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in (*convs, norm)
    ):
        return False
    if not (is_pointwise(pointwise1) and is_pointwise(pointwise2) and is_depthwise(depthwise)):
        return False
    if depthwise.stride != (1,) or depthwise.dilation != (1,) or width > MAX_CHANNELS:
        return False
    if pointwise1.out_channels != 2 * width or norm.weight is None or norm.bias is None:
        return False
    if type(norm) is nn.LayerNorm:
        return bool(norm.normalized_shape == (width,))
    has_statistics = isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None
    return bool(has_statistics and norm.num_features == width)


def fold_batch_norm(depthwise: QConv1d, norm: nn.BatchNorm1d) -> Folded:
    """Scale and bias [C], fp32, of a depthwise convolution with the norm's running statistics."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    factor = norm.weight.detach().float() * (variance.float() + norm.eps).rsqrt()
    bias = depthwise._parameters["bias"]
    shift = -mean.float() if bias is None else bias.detach().float() - mean.float()
    return depthwise.scale * factor, norm.bias.detach().float() + shift * factor


def _folded(depthwise: QConv1d, norm: nn.Module) -> Folded:
    """The same, computed when a tensor that goes into it has changed."""
    bias = depthwise._parameters["bias"]
    if not isinstance(norm, nn.BatchNorm1d):
        return depthwise.scale, None if bias is None else bias.detach().float()
    tensors = [
        t
        for t in (depthwise.scale, bias, *norm.parameters(), norm.running_mean, norm.running_var)
        if t is not None
    ]
    make = partial(fold_batch_norm, depthwise, norm)
    return remembered(depthwise, "_folded_norm", tensors, make)  # type: ignore[no-any-return]


def convolve(
    x: Tensor,
    pointwise1: QConv1d,
    depthwise: QConv1d,
    norm: nn.Module,
    epilogue: str | None,
    pointwise2: QConv1d,
    *,
    padding: Padding,
    layer_norm: nn.LayerNorm | None = None,
    lengths: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Pointwise with GLU; depthwise, norm and activation; pointwise with residual: [B, T, C].

    It has no gradient. With int8 inputs of one scale a token, or a static one, a LayerNorm before
    the first pointwise convolution and the end of the depthwise one quantize for the next product.

    Args:
        x: [B, T, C], of the layers' dtype.
        pointwise1, depthwise, norm, pointwise2: such that ``fuses_convolution``.
        epilogue: the activation after the norm.
        padding: of the depthwise convolution.
        layer_norm: of x, before all.
        lengths: [B], the valid frames; the depthwise convolution sees zeros beyond.
        residual: [B, T, C], added last.
    """
    rows = x if layer_norm is None else normalize(x, layer_norm, operand(pointwise1))
    inner = convolve_rows(
        rows, pointwise1, depthwise, norm, epilogue, pointwise2, dtype=x.dtype, padding=padding,
        lengths=lengths,
    )  # fmt: skip
    return linear(inner, operand(pointwise2), x.dtype, residual=residual)


def convolve_rows(
    rows: Tensor | Int8Rows | UnnormalizedRows,
    pointwise1: QConv1d,
    depthwise: QConv1d,
    norm: nn.Module,
    epilogue: str | None,
    pointwise2: QConv1d,
    *,
    dtype: torch.dtype,
    padding: Padding,
    lengths: Tensor | None = None,
) -> Tensor | Int8Rows:
    """``convolve`` up to what the second pointwise convolution takes; ``dtype`` is the layers'."""
    first, second = operand(pointwise1), operand(pointwise2)
    x = linear(rows, first, dtype, epilogue="glu")
    scale, bias = _folded(depthwise, norm)
    affine = None
    if isinstance(norm, nn.LayerNorm):
        affine = norm.weight, norm.bias, norm.eps
    is_static = second.static is not None
    y, y_scale = depthwise_conv1d_norm(
        x, depthwise.quantized_weight(), bias, padding=padding, scale=scale, norm=affine,
        epilogue=epilogue, lengths=lengths, int8_rows=second.takes_int8 and not is_static,
        out_scale=second.weight.input_scale if is_static else None,
    )  # fmt: skip
    return Int8Rows(y, None if is_static else y_scale) if second.takes_int8 else y


class ConvolutionModule(nn.Module):
    """A Conformer's or Squeezeformer's convolution module, quantized, for inference.

    >>> C = 144
    >>> module = ConvolutionModule.from_float(
    ...     nn.LayerNorm(C), nn.Conv1d(C, 2 * C, 1), nn.Conv1d(C, C, 31, padding=15, groups=C),
    ...     nn.BatchNorm1d(C), "silu", nn.Conv1d(C, C, 1), QuantSpec(bits=4))
    >>> x = torch.randn(2, 50, C)
    >>> with torch.inference_mode():
    ...     y = module(x, lengths=torch.tensor([50, 31]), residual=x)  # [2, 50, 144]

    Three ops: pointwise convolution and GLU; padding mask, depthwise convolution, norm and
    activation; pointwise convolution and residual. A frame within its utterance is what it is in
    the utterance alone.
    """

    layer_norm: nn.LayerNorm | None
    pointwise_conv1: QConv1d
    depthwise_conv: QConv1d
    norm: nn.Module
    pointwise_conv2: QConv1d
    epilogue: str | None
    padding: Padding

    @classmethod
    def from_float(
        cls,
        layer_norm: nn.LayerNorm | None,
        pointwise_conv1: nn.Conv1d,
        depthwise_conv: nn.Conv1d,
        norm: nn.BatchNorm1d | nn.LayerNorm,
        epilogue: str | None,
        pointwise_conv2: nn.Conv1d,
        spec: QuantSpec,
        *,
        causal: bool = False,
        method: str = "rtn",
    ) -> Self:
        """Quantize the three convolutions of a trained module; norms and biases are shared.

        Args:
            layer_norm: of the input; None: there is none.
            pointwise_conv1: C to 2 C channels, before the GLU.
            depthwise_conv: C channels, stride 1.
            norm: BatchNorm with running statistics, or LayerNorm over C.
            epilogue: the activation after it, as ``low_bit_conv1d`` names them.
            pointwise_conv2: C to any number of channels.
            spec: how to quantize.
            causal: pad on the left alone, instead of by the depthwise convolution's own padding.
            method: rounding, see ``formats.quantize_weight``.

        Raises:
            ValueError: if the parts do not fit together, naming them.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.layer_norm, self.norm, self.epilogue = layer_norm, norm, epilogue
        self.pointwise_conv1 = QConv1d.from_float(pointwise_conv1, spec, method=method)
        self.depthwise_conv = QConv1d.from_float(depthwise_conv, spec, method=method)
        self.pointwise_conv2 = QConv1d.from_float(pointwise_conv2, spec, method=method)
        parts = self.pointwise_conv1, self.depthwise_conv, norm, self.pointwise_conv2
        if not fuses_convolution(*parts, hooks=False):
            raise ValueError(
                "the parts must be pointwise (C to 2 C), depthwise with stride 1 (C <= "
                f"{MAX_CHANNELS}), norm of C with weight and bias, and pointwise, got {parts}"
            )
        left = depthwise_conv.kernel_size[0] - 1
        self.padding = (left, 0) if causal else conv_options(depthwise_conv)["padding"]
        return self.eval()

    def forward(
        self, x: Tensor, *, lengths: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """[B, T, C] to [B, T, C]; ``lengths`` [B] counts valid frames.

        Raises:
            RuntimeError: in training mode, whose norm this does not compute.
        """
        if self.training:
            raise RuntimeError("a ConvolutionModule is for inference: call eval()")
        return convolve(
            x, self.pointwise_conv1, self.depthwise_conv, self.norm, self.epilogue,
            self.pointwise_conv2, padding=self.padding, layer_norm=self.layer_norm,
            lengths=lengths, residual=residual,
        )  # fmt: skip
