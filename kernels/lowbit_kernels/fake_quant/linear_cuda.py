"""A training linear layer on CUDA: one pass of fake quantization, cuBLAS, and fused gradients.

Dimension key: M rows of the input, N output features, K input features.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.fake_quant.dispatch import choose_weight_gradient_config
from lowbit_kernels.fake_quant.elementwise_kernel import (
    fake_quantize_backward_triton,
    fake_quantize_triton,
)
from lowbit_kernels.fake_quant.quantizer import Quantizer
from lowbit_kernels.fake_quant.weight_gradient_kernel import weight_gradient_triton
from lowbit_kernels.matmul.epilogue_kernel import epilogue_backward_triton, finish_triton


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def round_weight_cuda(weight: Tensor, quantizer: Quantizer | None, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that multiplies, of a contiguous one; maybe itself without a quantizer."""
    if quantizer is None:
        return weight.to(dtype)
    return fake_quantize_triton(weight, quantizer, dtype)


def training_linear_cuda(
    x: Tensor,
    rounded: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
) -> tuple[Tensor, Tensor]:
    """Outputs [M, N_out] and pre-activations [M, N]; the same tensor where nothing follows."""
    z = F.linear(_rows(x), rounded, bias)
    if epilogue is None and residual is None:
        return z, z
    rows = None if residual is None else _rows(residual)
    return finish_triton(z[None], None, None, None, rows, epilogue, z.dtype), z


def weight_gradient_cuda(
    dz: Tensor, x: Tensor, weight: Tensor, quantizer: Quantizer | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a weight [N, K] and of its quantizer's scale, if there is one to learn.

    fp32 is cuBLAS's (torch's TF32 setting applies), and so are scales a group, whose sums a tile
    cannot hold: the quantizer's gradient is a pass of its own there.

    Args:
        dz: [M, N].
        x: [M, K].
        weight: [N, K], contiguous.
        quantizer: ``"lsq"`` or ``"elastic"``; None where the gradient passes straight through.
    """
    (M, N), K = dz.shape, x.shape[1]
    per_group = quantizer is not None and quantizer.scale is not None and (
        quantizer.scale.shape[1] > 1
    )  # fmt: skip
    if dz.dtype == torch.float32 or per_group:
        grad = dz.t() @ x
        if quantizer is None:
            return grad.to(weight.dtype), None
        return fake_quantize_backward_triton(grad[None], weight, quantizer)
    config = choose_weight_gradient_config(M, N, K, _num_sms(dz.device))
    return weight_gradient_triton(_rows(dz), _rows(x), weight, quantizer, config)


def preactivation_gradient_cuda(
    grad_y: Tensor, preactivation: Tensor | None, epilogue: str | None, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """dz [M, N] and the bias gradient ([N], or [0] where not needed)."""
    z = None if preactivation is None else _rows(preactivation)
    return epilogue_backward_triton(_rows(grad_y), z, epilogue, needs_bias)
