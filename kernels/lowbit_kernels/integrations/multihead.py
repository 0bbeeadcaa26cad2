"""nn.MultiheadAttention with its raw weights turned into two linear layers.

Dimension key: B batch, T query frames, S key frames, E embedding, H heads, D = E / H.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearMultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` that calls ``in_proj`` and ``out_proj``, which can be quantized.

    Takes the same arguments and gives the same results; not its subclass, because libraries read
    the raw weights of instances. Code that reads ``in_proj_weight`` all the same finds it.

    Args:
        attention: the ``nn.MultiheadAttention``, whose weights it shares.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.embed_dim = self.kdim = self.vdim = attention.embed_dim
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        # what nn.TransformerEncoderLayer asks before it would read raw weights
        self._qkv_same_embed_dim = False
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def to_attention(self) -> nn.MultiheadAttention:
        """An ``nn.MultiheadAttention`` with the same float weights."""
        attention = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            self.in_proj.bias is not None,
            batch_first=self.batch_first,
            device="meta",
        )
        attention.in_proj_weight = _parameter(self.in_proj.weight)
        attention.in_proj_bias = self.in_proj.bias
        attention.out_proj.weight = _parameter(self.out_proj.weight)
        attention.out_proj.bias = self.out_proj.bias
        return attention.train(self.training)

    @property
    def in_proj_weight(self) -> Tensor:
        """The weight of ``in_proj``."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The bias of ``in_proj``."""
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``; ``is_causal`` is a hint beside ``attn_mask``."""
        is_batched = query.dim() == 3
        q, k, v = (self._batch_first(x, is_batched) for x in self._project(query, key, value))
        mask = self._mask(q, key_padding_mask, attn_mask, is_batched)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(out.transpose(1, 2).flatten(2))  # [B, T, E]
        if not is_batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)  # type: ignore[no-any-return]
        return tuple(self.in_proj(x).chunk(3, -1)[i] for i, x in enumerate((query, key, value)))

    def _batch_first(self, x: Tensor, is_batched: bool) -> Tensor:
        """Any of nn.MultiheadAttention's layouts to [B, H, T, D]."""
        if not is_batched:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(
        self, q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_batched: bool
    ) -> Tensor | None:
        """Both masks as one additive mask, broadcastable to [B, H, T, S]."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            if mask.dim() == 3:  # [B * H, T, S]
                mask = mask.view(q.shape[0], self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)
            padding = (padding if is_batched else padding[None])[:, None, None]  # [B, 1, 1, S]
            mask = padding if mask is None else mask + padding
        return mask


def matches_multihead(module: nn.Module) -> bool:
    """Whether a module is an nn.MultiheadAttention of one width without additional keys."""
    return (
        type(module) is nn.MultiheadAttention
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )


def restore_multihead(module: nn.Module) -> nn.Module:
    """The ``nn.MultiheadAttention`` again; other modules come back as they are."""
    return module.to_attention() if isinstance(module, LinearMultiheadAttention) else module


def _linear(weight: Any, bias: Any) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear


def _parameter(weight: Tensor) -> nn.Parameter:
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.as_subclass(Tensor))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores; true means masked in nn.MultiheadAttention's."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
