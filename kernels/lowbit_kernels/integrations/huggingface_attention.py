"""``attn_implementation="lowbit"``: this library's attention behind transformers' interface.

``"lowbit_int8"`` is the same with int8 scores (``int8_scores_attention``), for inference.

Bidirectional self-attention runs fused, with key lengths taken from the padding mask and
``position_bias`` added in the kernel. Causal attention, cross-attention and every other mask (a
decoder, a sliding window) run on PyTorch's scaled_dot_product_attention.

Dimension key: B batch, H heads, T frames, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from lowbit_kernels.attention import DenseBias
from lowbit_kernels.integrations.chosen_attention import INT8_NAME, NAME, attend


def lowbit_mask(**kwargs: Any) -> Tensor | None:
    """The mask that ``lowbit_attention`` takes, from transformers' description of it.

    Returns:
        [B, T] bool as the caller gave it where a padding mask is all there is; else what
        ``scaled_dot_product_attention`` takes.
    """
    config: Any = kwargs.get("config")
    # in a decoder, keys of the same length may belong to another sequence than the queries
    may_cross = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
    plain = kwargs.get("mask_function") is bidirectional_mask_function and not may_cross
    mask: Tensor | None = kwargs.get("attention_mask")
    if plain and mask is not None and mask.dim() == 2 and not torch.compiler.is_compiling():
        # a tensor of this forward's own, which takes to all layers what is derived once
        mask = mask.detach()
        mask._lowbit_lengths = lengths_of(mask)  # type: ignore[attr-defined]
    if plain and (mask is None or mask.dim() == 2):
        return mask
    return sdpa_mask(**kwargs)  # type: ignore[no-any-return]


def lowbit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks.

    Args:
        module: the attention module; causal unless its ``is_causal`` is false.
        query: [B, H, T, D].
        key: [B, H, T, D]; another shape means cross-attention or shared heads.
        value: like key.
        attention_mask: [B, T] bool, the valid frames first; or a float bias broadcastable to
            [B, H, T, T]; or whatever else, for ``scaled_dot_product_attention``.
        scaling: multiplies the scores; None means 1 / sqrt(D).
        dropout: probability to drop an attention weight.
        position_bias: added to the scaled scores, broadcastable to [B, H, T, T].
        **kwargs: ``is_causal`` overrides the module's.

    Returns:
        [B, T, H, D], and None in place of the attention weights.

    Raises:
        ValueError: if valid frames follow padding.
        NotImplementedError: for ``position_bias`` in causal or cross-attention.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    is_padding_mask = attention_mask is not None and attention_mask.dim() == 2
    is_bias = attention_mask is not None and attention_mask.is_floating_point()
    fused = query.shape == key.shape == value.shape and (
        is_padding_mask or is_bias or (attention_mask is None and not causal)
    )
    if not fused:
        if position_bias is not None:
            raise NotImplementedError(
                "position_bias is served in bidirectional self-attention only; use "
                "attn_implementation='sdpa'"
            )
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    lengths, bias = None, position_bias
    if attention_mask is not None and is_padding_mask:
        lengths = lengths_of(attention_mask)
    elif attention_mask is not None:
        bias = attention_mask if bias is None else bias + attention_mask
    position = None if bias is None else DenseBias(bias)
    attended = attend(
        module, query, key, value, lengths=lengths, position=position, scale=scaling,
        dropout_p=dropout,
    )  # fmt: skip
    return attended.transpose(1, 2), None


def lengths_of(mask: Tensor) -> Tensor:
    """Valid frames [B] of a mask [B, T]; refuses left padding and gaps."""
    known: Tensor | None = getattr(mask, "_lowbit_lengths", None)
    if known is not None:
        return known
    if not torch.compiler.is_compiling():
        message = "attention_mask must be true up to each length and false after it"
        right_padded = (mask[:, :-1] | ~mask[:, 1:]).all()
        if mask.device.type == "cpu":
            if not right_padded:
                raise ValueError(f"{message}, got a valid frame after padding")
        else:  # reading the answer would wait for the device
            torch._assert_async(right_padded, message)
    return mask.sum(-1)


# both under one name: attention without its mask function would attend to padding
for name in (NAME, INT8_NAME):
    AttentionInterface.register(name, lowbit_attention)
    AttentionMaskInterface.register(name, lowbit_mask)
