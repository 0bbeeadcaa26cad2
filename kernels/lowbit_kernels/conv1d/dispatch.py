"""Which kernel, and which tiles, serve a convolution: pure functions of numbers.

Dimension key: M rows of the output, N output channels and K weights a channel, both of one group.
"""

import functools

import torch

from lowbit_kernels.conv1d.geometry import Geometry
from lowbit_kernels.formats import QuantSpec
from lowbit_kernels.matmul.dispatch import (
    Choice,
    Gpu,
    choose_backend,
    choose_config,
    measured,
    planned_rows,
)
from lowbit_kernels.matmul.tuned import Layer

# rows that a deterministic convolution takes its tiles for: so many that no sum is split, since a
# split sum's memory grows with the frames
DETERMINISTIC_FRAMES = 4096


def choose_kernel(
    M: int,
    geometry: Geometry,
    is_depthwise: bool,
    inputs: str | None,
    dtype: torch.dtype,
    capability: tuple[int, int],
    deterministic: bool = False,
    is_plain: bool = True,
) -> str:
    """The kernel that serves a convolution: a pure function; ``deterministic`` ignores M.

    Args:
        M: rows of the output.
        geometry, is_depthwise, inputs, dtype, capability, deterministic: of the call.
        is_plain: whether neither an activation nor a residual follows.

    Returns:
        ``"depthwise"``; ``"dequant_cudnn"``: the weight is dequantized to memory and torch
        convolves; ``"dequant_cublas"``: the same by matrix products over views (``runs.py``);
        ``"matmul"``: the linear layer's kernel over an overlapping view of x.

    Raises:
        NotImplementedError: on a GPU older than the kernels serve; for a deterministic product of
            fp32, which is cuDNN's.
    """
    # the depthwise kernel serves fp32 itself
    backend = choose_backend(
        M, inputs, dtype, capability, deterministic and not is_depthwise, is_plain
    )
    if is_depthwise:
        return "depthwise"
    if geometry.groups > 1 and (inputs is not None or dtype != torch.float32):
        return "matmul"  # torch's grouped convolutions are slow at every size
    if backend == "dequant_cublas":
        has_runs = dtype != torch.float32 and geometry.dilation == 1
        return "dequant_cublas" if has_runs else "dequant_cudnn"
    return "matmul"


@functools.lru_cache(maxsize=4096)
def choose_conv1d(
    M: int,
    N: int,
    K: int,
    geometry: Geometry,
    is_depthwise: bool,
    spec: QuantSpec,
    dtype: torch.dtype,
    gpu: Gpu,
    is_plain: bool,
    only_matmul: bool = False,
) -> Choice:
    """Kernel and tiles of a forward pass: measured ones if the device has a table, else defaults.

    Args:
        M: rows of the output.
        N, K: output channels and weights a channel, of one group.
        geometry, is_depthwise, spec: of the layer.
        dtype: of the input before it is quantized.
        gpu: the device.
        is_plain: whether neither an activation nor a residual follows.
        only_matmul: whether no other kernel may serve.

    Returns:
        What ``choose_kernel`` names, and the tiles of ``"matmul"``.

    Raises:
        NotImplementedError: as ``choose_kernel``.
    """
    inputs, fixed, groups = spec.inputs, spec.deterministic, geometry.groups
    kernel = "matmul"
    if not only_matmul:
        kernel = choose_kernel(
            M, geometry, is_depthwise, inputs, dtype, gpu.capability, fixed, is_plain
        )
    if kernel == "depthwise":
        return Choice(kernel)
    rows = planned_rows(M, fixed, DETERMINISTIC_FRAMES)
    has_runs = inputs is None and not fixed and groups == geometry.dilation == 1
    barred = () if has_runs and not only_matmul else ("dequant_cublas",)
    layer = Layer("conv1d", N, K, spec.bits, spec.group, inputs, is_plain, groups)
    found = measured(rows, layer, dtype, gpu, barred)
    if found is not None and not (fixed and found.config is not None and found.config.splits > 1):
        return found
    if kernel != "matmul":
        return Choice(kernel)
    itemsize = 2 if inputs is None else 1
    return Choice(kernel, choose_config(rows, N, K, spec.bits, itemsize, gpu, groups))
