"""QAttention: bidirectional multi-head self-attention with low-bit projections.

Dimension key: B batch, T frames, E embedding, H heads, D = E / H.
"""

from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn

from lowbit_kernels.attention import Position
from lowbit_kernels.formats import QuantSpec
from lowbit_kernels.modules.linear import QLinear
from lowbit_kernels.modules.low_bit_matmuls import attend


class QAttention(nn.Module):
    """Self-attention over right-padded utterances; queries, keys, values and output are low-bit.

    >>> attention = QAttention(768, 12)
    >>> y = attention(torch.randn(2, 50, 768), lengths=torch.tensor([50, 31]))  # [2, 50, 768]

    Args:
        embed_dim: E.
        num_heads: H; divides E.
        bias: whether the four projections have one.
        dropout: probability of dropping an attention weight in training.
        device, dtype: as ``nn.Linear``.
        spec: how the projections are quantized; ``None`` means ``QuantSpec()``.

    Raises:
        ValueError: if ``num_heads`` does not divide ``embed_dim`` or ``dropout`` is not in [0, 1).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spec: QuantSpec | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.num_heads, self.dropout = num_heads, dropout

        def projection() -> QLinear:
            return QLinear(embed_dim, embed_dim, bias, device, dtype, spec=spec)

        self.q_proj, self.k_proj = projection(), projection()
        self.v_proj, self.out_proj = projection(), projection()

    @classmethod
    def from_float(
        cls, attention: nn.MultiheadAttention, spec: QuantSpec, *, method: str = "rtn"
    ) -> Self:
        """Quantize a trained self-attention whose queries, keys and values have one width.

        Raises:
            NotImplementedError: for separate key and value widths, ``bias_k`` or ``add_zero_attn``.
            ValueError: if a weight is not finite or ``method`` is unknown.
        """
        if attention.in_proj_weight is None or attention.bias_k is not None:
            raise NotImplementedError("attention must have one width and no bias_k or bias_v")
        if attention.add_zero_attn:
            raise NotImplementedError("attention must have add_zero_attn=False, got True")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.num_heads, self.dropout = attention.num_heads, attention.dropout
        weights = attention.in_proj_weight.detach().chunk(3)
        bias = attention.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.detach().clone().chunk(3)
        for name, weight, part in zip(("q", "k", "v"), weights, biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight)
            linear.register_parameter("bias", None if part is None else nn.Parameter(part))
            self.add_module(f"{name}_proj", QLinear.from_float(linear, spec, method=method))
        self.out_proj = QLinear.from_float(attention.out_proj, spec, method=method)
        return self.train(attention.training)

    def forward(
        self, x: Tensor, *, lengths: Tensor | None = None, position: Position | None = None
    ) -> Tensor:
        """Attend over x [B, T, E].

        Args:
            x: [B, T, E].
            lengths: [B] valid frames; frames beyond are not attended and come out as the output
                projection's bias.
            position: the position scheme, see ``flash_attention``.

        Returns:
            [B, T, E].
        """
        q, k, v = (
            rearrange(proj(x), "b t (h d) -> b h t d", h=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        out = attend(self, q, k, v, lengths=lengths, position=position, dropout_p=dropout)
        y: Tensor = self.out_proj(rearrange(out, "b h t d -> b t (h d)"))
        return y
