"""A low-bit linear layer on CUDA: the chosen backend's kernels, one after the other.

Dimension key: M rows of the input, N output features, K input features.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit_kernels.cpu.resident import resident_int8, resident_made
from lowbit_kernels.formats import QuantizedWeight
from lowbit_kernels.matmul import csrc
from lowbit_kernels.matmul.backward_kernel import linear_dx_triton
from lowbit_kernels.matmul.decode_kernel import dequantize_triton
from lowbit_kernels.matmul.dispatch import (
    LinearConfig,
    choose_config,
    choose_dx_backend,
    choose_linear,
    planned_rows,
)
from lowbit_kernels.matmul.epilogue_kernel import epilogue_backward_triton, finish_triton
from lowbit_kernels.matmul.gpu import gpu_of, taking_norm
from lowbit_kernels.matmul.kernel import linear_triton
from lowbit_kernels.matmul.quantize_kernel import quantize_rows_triton
from lowbit_kernels.matmul.reference import STATS_WIDTH, InputNorm, input_scale_rows


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as [B, T, K] with last stride 1, without a copy where strides allow it."""
    if x.dim() != 3:
        x = x.reshape(1, -1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _matrix(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x.reshape(-1, x.shape[-1]))[0]


def linear_cuda(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    *,
    want_preactivation: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Outputs [..., N_out] and, if wanted, pre-activations [..., N]. See ``low_bit_linear``."""
    rows, spec, dtype = as_rows(x), weight.spec, x.dtype
    M = rows.shape[0] * rows.shape[1]
    can_csrc = M <= csrc.MAX_ROWS and not want_preactivation and csrc.is_available()
    choice = choose_linear(
        M, weight.qweight.shape[0], weight.K, spec.bits, spec.group, spec.inputs, dtype,
        epilogue is None and residual is None, spec.deterministic, gpu_of(x.device),
        can_csrc and csrc.serves_csrc(M, spec, dtype, epilogue),
    )  # fmt: skip
    residual = _matrix(residual)
    if choice.config is None:
        y, z = linear_dequant_cublas(
            rows, weight, bias, residual, epilogue, want_preactivation=want_preactivation
        )
    elif isinstance(choice.config, csrc.CsrcConfig):
        y, z = csrc.linear_csrc(rows, weight, bias, residual, epilogue, choice.config)
    else:
        x_scale = None
        if spec.inputs is not None:
            if spec.input_scale != "token":
                x_scale = input_scale_rows(x, spec.input_scale, weight.input_scale, spec.inputs)
            rows, x_scale = quantize_rows_triton(rows, x_scale, spec.inputs)
        if choice.backend == "resident_int8":
            weight = _resident(weight)
        y, z = linear_triton(
            rows, weight, bias, residual, epilogue, choice.config,
            x_scale=x_scale, dtype=dtype, want_preactivation=want_preactivation,
        )  # fmt: skip
    return _of_shape(y, x), None if z is None else _of_shape(z, x)


def _of_shape(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] as [..., N], for x [..., K]; no view, as those refuse to be written into."""
    if x.dim() == 2:
        return y
    out: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
    return out


def linear_int8_cuda(
    q: Tensor,
    q_scale: Tensor | None,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    dtype: torch.dtype,
    out_scale: Tensor | None,
) -> Tensor:
    """Outputs [..., N_out] of int8 inputs. See ``low_bit_linear_int8``."""
    rows, spec = as_rows(q), weight.spec
    choice = choose_linear(
        rows.shape[0] * rows.shape[1], weight.N, weight.K, spec.bits, spec.group, "int8",
        dtype, epilogue is None and residual is None, spec.deterministic, gpu_of(q.device),
    )  # fmt: skip
    assert isinstance(choice.config, LinearConfig), "the others serve floating-point inputs only"
    y, _ = linear_triton(
        rows, _resident(weight) if choice.backend == "resident_int8" else weight,
        bias, _matrix(residual), epilogue, choice.config,
        x_scale=None if q_scale is None else q_scale.reshape(-1), dtype=dtype, out_scale=out_scale,
    )  # fmt: skip
    return _of_shape(y, q)


def linear_folded_cuda(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    *,
    norm: InputNorm | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """Outputs [..., N_out] of a folded LayerNorm's two sides. See ``folded_op.py``.

    Always the fused kernel: cuBLAS would round the product before the mean is taken off it.
    """
    rows, spec, gpu = as_rows(x), weight.spec, gpu_of(x.device)
    M = rows.shape[0] * rows.shape[1]
    config = choose_linear(
        M, weight.N, weight.K, spec.bits, spec.group, None, x.dtype, False, spec.deterministic, gpu
    ).config
    if not isinstance(config, LinearConfig) or config.block_n < STATS_WIDTH:
        planned = planned_rows(M, spec.deterministic)
        config = choose_config(planned, weight.N, weight.K, spec.bits, x.itemsize, gpu)
    config = config if norm is None else taking_norm(config, gpu)
    y, _ = linear_triton(
        rows, weight, bias, _matrix(residual), epilogue, config, norm=norm, stats=stats
    )
    return _of_shape(y, x)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _resident(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight expanded to 8 bits, once: the same integers, so the same result.

    While a CUDA graph is captured nothing is computed, so a copy that is not there yet would stay
    empty: the packed weight serves then.
    """
    if _is_capturing():
        made = resident_made(weight, "rows")
        if made is None:
            return weight
    else:
        made = resident_int8(weight, "rows")
    spec = replace(weight.spec, bits=8, group_size=None)
    return QuantizedWeight(
        made.tensors[0], weight.scale, None, None, weight.K, spec, weight.input_scale
    )


def linear_dequant_cublas(
    x_btk: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    epilogue: str | None,
    *,
    want_preactivation: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Like ``kernel.linear_triton`` for floating-point x: dequantize, then torch's matmul.

    The dequantized weight lives until the product is done; the allocator gives the same memory to
    the next layer, and a captured graph keeps one piece for all of them.
    """
    z = F.linear(x_btk, dequantize_triton(weight, x_btk.dtype), bias)
    z = torch.ops.aten._unsafe_view(z, (-1, z.shape[-1]))
    saved = z if want_preactivation else None
    if epilogue is None and residual is None and saved is None:
        return z, None
    y = finish_triton(z[None], None, None, None, residual, epilogue, z.dtype)
    return y, saved


def linear_backward_cuda(
    grad_y: Tensor,
    preactivation: Tensor | None,
    weight: QuantizedWeight,
    epilogue: str | None,
    needs_bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x [..., K] and of the bias ([N], or [0] where not needed)."""
    dy, z = _matrix(grad_y), _matrix(preactivation)
    assert dy is not None
    dz, dbias = epilogue_backward_triton(dy, z, epilogue, needs_bias_grad)
    capability, fixed = gpu_of(grad_y.device).capability, weight.spec.deterministic
    if choose_dx_backend(dz.shape[0], dz.dtype, capability, fixed) == "dequant_cublas":
        dx = dz @ dequantize_triton(weight, dz.dtype)
    else:
        dx = linear_dx_triton(dz, weight)
    return dx.view(*grad_y.shape[:-1], weight.K), dbias
