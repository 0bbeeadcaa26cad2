"""Self-attention without storing the scores, against PyTorch's: key lengths, a bias, gradients.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Cost, Point, Prepared, Provider, Result
from bench.errors import float_error
from bench.shapes import ATTENTION_CUDA as POINTS
from lowbit_kernels import DenseBias, flash_attention

Attend = Callable[["Inputs"], Tensor]


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of the output [B, H, T, D], lengths [B], bias [1, H, T, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    lengths: Tensor | None
    bias: Tensor | None
    backward: bool

    @property
    def valid(self) -> Tensor | None:
        """[B, T], true for the frames of each utterance."""
        if self.lengths is None:
            return None
        return torch.arange(self.q.shape[2], device=self.q.device) < self.lengths[:, None]


def make_inputs(point: Point, device: str, dtype: torch.dtype) -> Inputs:
    """Gaussian heads; utterances of half the frames and more."""
    torch.manual_seed(0)
    s = point.sizes
    shape = (4, s["B"], s["H"], s["T"], s["D"])
    q, k, v, grad_out = torch.randn(shape, device=device, dtype=dtype)
    lengths, bias = None, None
    if "lengths" in s:
        lengths = torch.linspace(s["T"] // 2, s["T"], s["B"] + 1, device=device)[1:].int()
    if "dense bias" in s:
        bias = torch.randn(1, s["H"], s["T"], s["T"], device=device, dtype=dtype)
    inputs = Inputs(q, k, v, grad_out, lengths, bias, bool(s["backward"]))
    # what attends from padding is nobody's: PyTorch computes it, and a loss never asks for it
    valid = inputs.valid
    if valid is None:
        return inputs
    return replace(inputs, grad_out=inputs.grad_out * valid[:, None, :, None])


def cost(point: Point, itemsize: int) -> Cost:
    """Of the frames with their padding: two products forward, five more backward."""
    B, H, T, D, backward = (point.sizes[name] for name in ("B", "H", "T", "D", "backward"))
    products, heads = (7, 8) if backward else (2, 4)
    bias = H * T * T if "dense bias" in point.sizes else 0
    return Cost(
        flops=products * 2 * B * H * T * T * D,
        bytes=itemsize * (heads * B * H * T * D + (1 + backward) * bias),
    )


def sdpa(inputs: Inputs) -> Tensor:
    """PyTorch's, with the mask that a model gives it."""
    mask, valid = inputs.bias, inputs.valid
    if valid is not None:
        mask = valid[:, None, None, :]
    return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, attn_mask=mask)


def lowbit(inputs: Inputs) -> Tensor:
    """Ours."""
    position = None if inputs.bias is None else DenseBias(inputs.bias)
    return flash_attention(
        inputs.q, inputs.k, inputs.v, lengths=inputs.lengths, position=position
    )  # fmt: skip


def run(attend: Attend, inputs: Inputs) -> Result:
    """The output, or the gradients of q, k and v."""
    if not inputs.backward:
        return attend(inputs)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        out = attend(replace(inputs, q=leaves[0], k=leaves[1], v=leaves[2]))
        return torch.autograd.grad(out, leaves, inputs.grad_out)


def exact(inputs: Inputs) -> Result:
    """PyTorch's in float32, with zeros for padding as ours has."""
    names = ("q", "k", "v", "grad_out", *(["bias"] if inputs.bias is not None else []))
    with torch.inference_mode(False):  # else the copies take no gradient
        wide = {name: getattr(inputs, name).float() for name in names}
    result = run(sdpa, replace(inputs, **wide))
    if isinstance(result, Tensor) and inputs.valid is not None:
        return result * inputs.valid[:, None, :, None]
    return result


def prepare(attend: Attend, inputs: Inputs) -> Prepared:
    """Either of them; a gradient is a product of rounded products."""
    bound = (1 + inputs.backward) * float_error(inputs.q.shape[2], inputs.q.dtype)
    expected = (lambda: exact(inputs)) if attend is lowbit else None
    return Prepared(lambda: run(attend, inputs), bound, expected)


ATTENTION_CUDA = Case(
    name="attention_cuda",
    title="Attention on a GPU, speed against scaled_dot_product_attention",
    points=POINTS,
    make_inputs=make_inputs,
    providers=(
        Provider("SDPA", lambda inputs: prepare(sdpa, inputs)),
        Provider("lowbit", lambda inputs: prepare(lowbit, inputs)),
    ),
    baseline="SDPA",
    cost=cost,
    device="cuda",
    dtype=torch.bfloat16,
)
