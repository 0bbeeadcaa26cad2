"""Modules of transformers that hand an activation to the low-bit layer before it.

Dimension key: B batch, T frames, C features.
"""

from typing import Any

from torch import Tensor, nn

from lowbit_kernels.integrations.activations import epilogue_of
from lowbit_kernels.integrations.class_swap import Swapped
from lowbit_kernels.modules import QATLinear, QConv1d, QLinear


class FusedFeedForward(Swapped):
    """Linear, activation, dropout, linear, dropout."""

    intermediate_dense: nn.Module
    intermediate_act_fn: Any
    intermediate_dropout: nn.Module
    output_dense: nn.Module
    output_dropout: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        first = self.intermediate_dense
        if type(first) not in (
            QLinear,
            QATLinear,
        ):  # an adapter around it comes before the activation
            plain: Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return plain
        inner = first(hidden_states, epilogue=epilogue_of(self.intermediate_act_fn))
        out: Tensor = self.output_dropout(self.output_dense(self.intermediate_dropout(inner)))
        return out


class FusedPositionalEmbedding(Swapped):
    """Convolution, cut, activation. The activation is elementwise, so the cut may come after it."""

    conv: nn.Module
    padding: nn.Module
    activation: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        if type(self.conv) is not QConv1d:
            plain: Tensor = super().forward(hidden_states)  # type: ignore[misc]
            return plain
        x = self.conv(hidden_states.transpose(1, 2), epilogue=epilogue_of(self.activation))
        out: Tensor = self.padding(x).transpose(1, 2)
        return out


def matches_feed_forward(module: nn.Module) -> bool:
    """Whether a module is a feed-forward block of the wav2vec2 family."""
    return (
        type(module).__module__.startswith("transformers.models.")
        and type(module).__name__.endswith("FeedForward")
        and {"intermediate_dense", "output_dense", "intermediate_dropout", "output_dropout"}
        <= module._modules.keys()
        and epilogue_of(getattr(module, "intermediate_act_fn", None)) is not None
    )


# SEW's takes [B, C, T], data2vec's is a stack with norms
_POSITIONAL = tuple(
    f"{family}PositionalConvEmbedding"
    for family in ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "Wav2Vec2Conformer")
)


def matches_positional_embedding(module: nn.Module) -> bool:
    """Whether a module is a positional convolution with nothing but a cut before the activation."""
    return (
        type(module).__module__.startswith("transformers.models.")
        and type(module).__name__ in _POSITIONAL
        and module._modules.keys() == {"conv", "padding", "activation"}
        and epilogue_of(module._modules["activation"]) is not None
    )
