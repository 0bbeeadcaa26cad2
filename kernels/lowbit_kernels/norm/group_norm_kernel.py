"""Triton kernels of masked_group_norm: one program owns one group of one utterance.

Dimension key: B batch, C channels, T frames, G groups.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

# a channel of the first conv layer has thousands of frames: 16 a thread keep its loads in flight
BLOCK_T = 2048
NUM_WARPS = 4


@triton.jit
def _load_length(lengths_ptr, b, T):
    if lengths_ptr is None:
        length = T
    else:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), T).to(tl.int32)
    return length


@triton.jit(do_not_specialize=["C", "T", "G"])
def _masked_group_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, lengths_ptr, y_ptr, mean_ptr, rstd_ptr,
    C, T, G, eps,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b, group_size = pid // G, C // G
    first = (pid % G) * group_size
    length = _load_length(lengths_ptr, b, T)
    # a product in 32 bits would overflow for one group of many channels
    count = tl.maximum(length, 1).to(tl.float32) * group_size
    offs_t = tl.arange(0, BLOCK_T)
    x_ptr += (b.to(tl.int64) * C + first) * T
    y_ptr += (b.to(tl.int64) * C + first) * T

    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    row_ptr = x_ptr
    for _ in range(group_size):
        for start in range(0, length, BLOCK_T):
            t = start + offs_t
            total += tl.load(row_ptr + t, mask=t < length, other=0.0).to(tl.float32)
        row_ptr += T
    mean = tl.sum(total) / count
    # centered in a pass of its own: E[x^2] - E[x]^2 cancels when the mean is large
    squares = tl.zeros((BLOCK_T,), dtype=tl.float32)
    row_ptr = x_ptr
    for _ in range(group_size):
        for start in range(0, length, BLOCK_T):
            t = start + offs_t
            x = tl.load(row_ptr + t, mask=t < length, other=0.0).to(tl.float32)
            centered = tl.where(t < length, x - mean, 0.0)
            squares += centered * centered
        row_ptr += T
    # rounded correctly, unlike / and sqrt on a GPU: once a group it costs nothing
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares) / count + eps))
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, rstd)
    for c in range(group_size):
        weight = tl.load(weight_ptr + first + c).to(tl.float32)
        bias = tl.load(bias_ptr + first + c).to(tl.float32)
        for start in range(0, T, BLOCK_T):
            t = start + offs_t
            x = tl.load(x_ptr + t, mask=t < length, other=0.0).to(tl.float32)
            y = tl.where(t < length, (x - mean) * rstd * weight + bias, 0.0)
            tl.store(y_ptr + t, y.to(y_ptr.dtype.element_ty), mask=t < T)
        x_ptr += T
        y_ptr += T


@triton.jit(do_not_specialize=["C", "T", "G"])
def _masked_group_norm_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, lengths_ptr,
    dx_ptr, dweight_ptr, dbias_ptr,
    C, T, G,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b, group_size = pid // G, C // G
    first = (pid % G) * group_size
    length = _load_length(lengths_ptr, b, T)
    # a product in 32 bits would overflow for one group of many channels
    count = tl.maximum(length, 1).to(tl.float32) * group_size
    mean, rstd = tl.load(mean_ptr + pid), tl.load(rstd_ptr + pid)
    offs_t = tl.arange(0, BLOCK_T)
    offset = (b.to(tl.int64) * C + first) * T
    x_ptr += offset
    grad_ptr += offset
    dx_ptr += offset

    mean_grad, mean_projection = mean * 0.0, mean * 0.0
    x_row_ptr, grad_row_ptr = x_ptr, grad_ptr
    for c in range(group_size):
        grads = tl.zeros((BLOCK_T,), dtype=tl.float32)
        projections = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for start in range(0, length, BLOCK_T):
            t = start + offs_t
            x = tl.load(x_row_ptr + t, mask=t < length, other=0.0).to(tl.float32)
            grad = tl.load(grad_row_ptr + t, mask=t < length, other=0.0).to(tl.float32)
            grads += grad
            projections += grad * (x - mean) * rstd
        x_row_ptr += T
        grad_row_ptr += T
        grad_sum, projection_sum = tl.sum(grads), tl.sum(projections)
        # one partial sum an utterance, added up afterwards in a fixed order
        tl.store(dweight_ptr + b.to(tl.int64) * C + first + c, projection_sum)
        tl.store(dbias_ptr + b.to(tl.int64) * C + first + c, grad_sum)
        weight = tl.load(weight_ptr + first + c).to(tl.float32)
        mean_grad += weight * grad_sum / count
        mean_projection += weight * projection_sum / count
    for c in range(group_size):
        weight = tl.load(weight_ptr + first + c).to(tl.float32)
        for start in range(0, T, BLOCK_T):
            t = start + offs_t
            x = tl.load(x_ptr + t, mask=t < length, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + t, mask=t < length, other=0.0).to(tl.float32)
            normalized = (x - mean) * rstd
            dx = rstd * (grad * weight - mean_grad - normalized * mean_projection)
            dx = tl.where(t < length, dx, 0.0)
            tl.store(dx_ptr + t, dx.to(dx_ptr.dtype.element_ty), mask=t < T)
        x_ptr += T
        grad_ptr += T
        dx_ptr += T


def masked_group_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on x [B, C, T]. op.py has checked the inputs."""
    B, C, T = x.shape
    y = torch.empty(B, C, T, device=x.device, dtype=x.dtype)
    if x.numel() == 0:
        mean = torch.zeros(B, num_groups, device=x.device, dtype=torch.float32)
        return y, mean, torch.zeros_like(mean)
    mean = torch.empty(B, num_groups, device=x.device, dtype=torch.float32)
    rstd = torch.empty(B, num_groups, device=x.device, dtype=torch.float32)
    _masked_group_norm_fwd_kernel[(B * num_groups,)](
        x.contiguous(), weight.contiguous(), bias.contiguous(), lengths, y, mean, rstd,
        C, T, num_groups, eps,
        BLOCK_T=BLOCK_T, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y, mean, rstd


def masked_group_norm_backward_triton(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lengths: Tensor | None,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on tensors of the forward. op.py has checked the inputs."""
    B, C, T = x.shape
    dx = torch.empty(B, C, T, device=x.device, dtype=x.dtype)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight), torch.zeros_like(bias)
    dweight = torch.empty(B, C, device=x.device, dtype=torch.float32)
    dbias = torch.empty(B, C, device=x.device, dtype=torch.float32)
    _masked_group_norm_bwd_kernel[(B * num_groups,)](
        grad_y.contiguous(), x.contiguous(), weight.contiguous(), mean, rstd, lengths,
        dx, dweight, dbias,
        C, T, num_groups,
        BLOCK_T=BLOCK_T, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)
