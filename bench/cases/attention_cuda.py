"""Self-attention without storing the scores, against PyTorch's: lengths, positions, gradients.

Positions reach PyTorch's attention as models compute them, a bias [B, H, T, T] for each call.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Cost, Point, Prepared, Provider, Result
from bench.errors import float_error, int8_input_error
from bench.shapes import ATTENTION_CUDA as POINTS
from lowbit_kernels import (
    BucketedBias,
    DenseBias,
    RelativeKey,
    TransformerXL,
    flash_attention,
)
from lowbit_kernels.attention import Position, int8_scores_attention
from lowbit_kernels.attention.position import resolve

Attend = Callable[["Inputs"], Tensor]


# of WavLM: buckets and the largest distance; of Wav2Vec2-BERT: offsets to the left and right
BUCKETS, MAX_DISTANCE = 320, 800
LEFT, RIGHT = 64, 8
WINDOW = 256


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of the output [B, H, T, D], lengths [B], and what else is asked."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    lengths: Tensor | None
    position: Position | None
    window: int | None
    backward: bool

    @property
    def leaves(self) -> list[Tensor]:
        """q, k, v and the position's tensors."""
        values = [] if self.position is None else vars(self.position).values()
        return [self.q, self.k, self.v, *(x for x in values if isinstance(x, Tensor))]

    def on(self, leaves: list[Tensor]) -> "Inputs":
        """The same with other leaves."""
        q, k, v, *tensors = leaves
        if self.position is None:
            return replace(self, q=q, k=k, v=v)
        names = [name for name, x in vars(self.position).items() if isinstance(x, Tensor)]
        position = replace(self.position, **dict(zip(names, tensors, strict=True)))
        return replace(self, q=q, k=k, v=v, position=position)

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
    lengths = None
    if "lengths" in s:
        lengths = torch.linspace(s["T"] // 2, s["T"], s["B"] + 1, device=device)[1:].int()
    inputs = Inputs(
        q, k, v, grad_out, lengths, make_position(point, device, dtype),
        min(WINDOW, s["T"] // 2) if "window" in s else None, bool(s["backward"]),
    )  # fmt: skip
    # what attends from padding is nobody's: PyTorch computes it, and a loss never asks for it
    valid = inputs.valid
    if valid is None:
        return inputs
    return replace(inputs, grad_out=inputs.grad_out * valid[:, None, :, None])


def make_position(point: Point, device: str, dtype: torch.dtype) -> Position | None:
    """Gaussian tables, as small as trained ones."""
    s = point.sizes
    B, H, T, D = (s[name] for name in "BHTD")

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * D**-0.5

    if "dense bias" in s:
        return DenseBias(torch.randn(1, H, T, T, device=device, dtype=dtype))
    if "transformer-xl" in s:
        return TransformerXL(randn(H, 2 * T - 1, D), randn(H, D), randn(H, D))
    if "relative key" in s:
        return RelativeKey(randn(LEFT + 1 + RIGHT, D), LEFT)
    if "bucketed" in s:
        return BucketedBias(randn(BUCKETS, H), MAX_DISTANCE, randn(B, H, T))
    return None


def cost(point: Point, itemsize: int) -> Cost:
    """Of the frames with their padding: two products forward, five more backward.

    Keys of offsets cost a product more each way and one for their gradient, where each is computed
    once; a window leaves its share.
    """
    s = point.sizes
    B, H, T, D, backward = (s[name] for name in ("B", "H", "T", "D", "backward"))
    products, heads = (7, 8) if backward else (2, 4)
    if "transformer-xl" in s or "relative key" in s:
        products, heads = products + (3 if backward else 1), heads + (2 if backward else 1)
    seen = min(T, 2 * WINDOW + 1) if "window" in s else T
    bias = H * T * T if "dense bias" in s else 0
    return Cost(
        flops=products * 2 * B * H * T * seen * D,
        bytes=itemsize * (heads * B * H * T * D + (1 + backward) * bias),
    )


def sdpa(inputs: Inputs) -> Tensor:
    """PyTorch's, with the mask that a model gives it."""
    T, valid = inputs.q.shape[2], inputs.valid
    q, mask = inputs.q, None
    scheme = resolve(q, inputs.position, None)
    if scheme is not None:
        q, scheme = scheme.with_rows(q)
        mask = scheme.scores(T, q.shape[-1] ** -0.5).to(q.dtype)
    if valid is not None:
        mask = valid[:, None, None, :]
    if inputs.window is not None:
        frames = torch.arange(T, device=q.device)
        mask = (frames - frames[:, None]).abs() <= inputs.window
    return F.scaled_dot_product_attention(q, inputs.k, inputs.v, attn_mask=mask)


def full_sdpa(inputs: Inputs) -> Tensor:
    """PyTorch's over all frames: what a window saves."""
    return sdpa(replace(inputs, window=None))


def lowbit(inputs: Inputs) -> Tensor:
    """Ours."""
    return flash_attention(
        inputs.q, inputs.k, inputs.v,
        lengths=inputs.lengths, window=inputs.window, position=inputs.position,
    )  # fmt: skip


def int8_scores(inputs: Inputs) -> Tensor:
    """Ours with int8 queries and keys."""
    return int8_scores_attention(
        inputs.q, inputs.k, inputs.v,
        lengths=inputs.lengths, window=inputs.window, position=inputs.position,
    )  # fmt: skip


def run(attend: Attend, inputs: Inputs) -> Result:
    """The output, or the gradients of q, k, v and of the position's tensors."""
    if not inputs.backward:
        return attend(inputs)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs.leaves]
        out = attend(inputs.on(leaves))
        return torch.autograd.grad(out, leaves, inputs.grad_out)


def exact(attend: Attend, inputs: Inputs) -> Result:
    """PyTorch's in float32, with zeros for padding as ours has."""
    with torch.inference_mode(False):  # else the copies take no gradient
        wide = inputs.on([x.float() for x in inputs.leaves])
        wide = replace(wide, grad_out=inputs.grad_out.float())
    result = run(attend, wide)
    if isinstance(result, Tensor) and inputs.valid is not None:
        return result * inputs.valid[:, None, :, None]
    return result


def prepare(attend: Attend, inputs: Inputs) -> Prepared:
    """Either of them; a gradient is a product of rounded products."""
    bound = (1 + inputs.backward) * float_error(inputs.q.shape[2], inputs.q.dtype)
    if attend is int8_scores:
        # scores of deviation 1 make of their noise as much in the result
        bound += sum(int8_input_error(x.float(), (2, 3)) for x in (inputs.q, inputs.k))
    against = {lowbit: sdpa, int8_scores: sdpa, full_sdpa: full_sdpa}.get(attend)
    expected = None if against is None else lambda: exact(against, inputs)
    return Prepared(lambda: run(attend, inputs), bound, expected)


ATTENTION_CUDA = Case(
    name="attention_cuda",
    title="Attention on a GPU, speed against scaled_dot_product_attention",
    points=POINTS,
    make_inputs=make_inputs,
    providers=(
        Provider("SDPA", lambda inputs: prepare(sdpa, inputs)),
        Provider(
            "SDPA without the window",
            lambda inputs: prepare(full_sdpa, inputs),
            points=tuple(point.name for point in POINTS if "window" in point.sizes),
        ),
        Provider("lowbit", lambda inputs: prepare(lowbit, inputs)),
        Provider(
            "lowbit, int8 scores",
            lambda inputs: prepare(int8_scores, inputs),
            points=tuple(point.name for point in POINTS if not point.sizes["backward"]),
        ),
    ),
    baseline="SDPA",
    cost=cost,
    device="cuda",
    dtype=torch.bfloat16,
)
