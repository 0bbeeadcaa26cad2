"""The adapters and the finisher that conversion runs on models of known libraries."""

import sys

from torch import nn

from lowbit_kernels.conversion.registry import ADAPTERS, FINISHERS, Adapter
from lowbit_kernels.formats import QuantConfig
from lowbit_kernels.integrations.class_swap import swap_adapter
from lowbit_kernels.integrations.front_end import (
    mask_front_end,
    matches_front_end,
    restore_front_end,
)
from lowbit_kernels.integrations.wavlm import FusedWavLMAttention, matches_wavlm_attention


def register() -> None:
    """Add what this package knows to conversion's lists; called once."""
    ADAPTERS.append(Adapter(matches_front_end, mask_front_end, restore_front_end))
    ADAPTERS.append(swap_adapter(matches_wavlm_attention, FusedWavLMAttention))
    FINISHERS.append(_tell_transformers)


def _tell_transformers(model: nn.Module, config: QuantConfig | None) -> None:
    """Attach the quantization to a transformers model, so that it saves and loads quantized."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from lowbit_kernels.integrations.huggingface import attach, detach, is_pretrained

    if not is_pretrained(model):
        return
    if config is None:
        detach(model)
    else:
        attach(model, config)
