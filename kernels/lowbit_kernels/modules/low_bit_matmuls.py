"""LowBitMatmuls: the matrix products of an attention module in low bits, with learned scales.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.attention import flash_attention, low_bit_attention
from lowbit_kernels.attention.reference import attention_mask
from lowbit_kernels.fake_quant import Levels, initial_scale

# of the child of an attention module
NAME = "low_bit_matmuls"


class LowBitMatmuls(nn.Module):
    """Attention with low-bit q, k, v and probabilities: the "A" of BiT-LA (arXiv 2301.00652).

    A child of an attention module, which ``attend`` finds. It rounds in training and in inference
    alike. Scales that were not loaded start from the first batch as BiT's do: 2 mean|x| /
    sqrt(high) for q, k and v, and 4 mean(p) / sqrt(high) for probabilities, whose mean over what is
    seen needs no softmax.

    Args:
        bits: 1, 2, 4 or 8, of all four operands.
        quantizer: ``"lsq"`` or ``"elastic"``, see ``low_bit_attention``.
        device: of the scales.
        shifted: None, or the H * D features that get a learned shift each before q, k and v are
            rounded (BiT's, from 0). Behind a projection with a bias it is one more bias.
    """

    q_step: nn.Parameter
    k_step: nn.Parameter
    v_step: nn.Parameter
    prob_step: nn.Parameter
    shift: nn.Parameter | None  # [3, H * D], of q, k and v

    def __init__(
        self,
        bits: int,
        quantizer: str = "lsq",
        device: torch.device | str | None = None,
        shifted: int | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.quantizer, self._is_set = bits, quantizer, False
        for name in ("q_step", "k_step", "v_step", "prob_step"):
            zero = torch.zeros((), dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(zero))
        zeros = None if shifted is None else torch.zeros(3, shifted, device=device)
        self.register_parameter("shift", None if zeros is None else nn.Parameter(zeros))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """``flash_attention``'s call, q, k and v [B, H, T, D]."""
        if self.shift is not None:
            shifts = self.shift.to(q.dtype).view(3, q.shape[1], 1, q.shape[3])
            q, k, v = (x + shift for x, shift in zip((q, k, v), shifts, strict=True))
        if not self._is_set and q.numel():
            if torch.compiler.is_compiling():
                raise RuntimeError("a first batch must set the scales before torch.compile")
            if self.prob_step == 0:  # else they were loaded
                self._start(q, k, v, options.get("lengths"), options.get("window"))
            self._is_set = True
        steps = self.q_step, self.k_step, self.v_step
        return low_bit_attention(
            q, k, v, self.prob_step, bits=self.bits, input_steps=steps, method=self.quantizer,
            **options,
        )  # fmt: skip

    @torch.no_grad()
    def _start(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window: int | None
    ) -> None:
        B, _, T, _ = q.shape
        levels = Levels.of_input(self.bits)
        valid = torch.ones(B, T, dtype=torch.bool, device=q.device)
        if lengths is not None:
            valid = torch.arange(T, device=q.device) < lengths[:, None]
        for step, x in ((self.q_step, q), (self.k_step, k), (self.v_step, v)):
            step.copy_(initial_scale(x.transpose(1, 2)[valid], levels))
        # each row that sees a key adds up to 1
        seen = attention_mask(T, lengths, window, q.device).expand(B, 1, T, T)
        mean = seen.any(-1).sum() / seen.sum()
        high = Levels.of_input(self.bits, signed=False).high
        self.prob_step.copy_(mean * (4 / math.sqrt(high)))

    def extra_repr(self) -> str:
        shift = "" if self.shift is None else ", with shifts"
        return f"bits={self.bits}, quantizer={self.quantizer!r}{shift}"


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """``flash_attention`` of an attention module, in low bits where it was prepared for that.

    Args:
        module: may have ``LowBitMatmuls``.
        q: [B, H, T, D].
        k: like q.
        v: like q.
        **options: ``flash_attention``'s.

    Returns:
        [B, H, T, D], as ``flash_attention``.
    """
    out: Tensor = module._modules.get(NAME, flash_attention)(q, k, v, **options)
    return out
