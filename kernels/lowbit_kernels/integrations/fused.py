"""Modules of transformers that hand an activation to the low-bit layer before it.

Dimension key: B batch, T frames, C features.
"""

from torch import Tensor, nn

from lowbit_kernels.integrations.activations import epilogue_of
from lowbit_kernels.integrations.class_swap import Swapped, is_stock
from lowbit_kernels.modules import QATConv1d, QATLinear, QConv1d, QLinear


class FusedFeedForward(Swapped):
    """Linear, activation, dropout, linear, dropout."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        first = self.intermediate_dense
        # an adapter around it comes before the activation
        if not isinstance(first, QLinear | QATLinear):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        inner = first(hidden_states, epilogue=epilogue_of(self.intermediate_act_fn))
        output = self.output_dense(self.intermediate_dropout(inner))
        return self.output_dropout(output)  # type: ignore[no-any-return]


class FusedConvLayer(Swapped):
    """A layer of the front end without a norm: convolution, activation."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C_in, T_in] to [B, C, T]."""
        if not isinstance(self.conv, QConv1d | QATConv1d):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        return self.conv(hidden_states, epilogue=epilogue_of(self.activation))  # type: ignore[no-any-return]


class FusedPositionalEmbedding(Swapped):
    """Convolution, cut, activation. The activation is elementwise, so the cut may come after it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        if not isinstance(self.conv, QConv1d | QATConv1d):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        x = self.conv(hidden_states.transpose(1, 2), epilogue=epilogue_of(self.activation))
        return self.padding(x).transpose(1, 2)  # type: ignore[no-any-return]


def matches_feed_forward(module: nn.Module) -> bool:
    """Whether a module is a feed-forward block of the wav2vec2 family."""
    return (
        is_stock(module, "*FeedForward")
        and {"intermediate_dense", "output_dense", "intermediate_dropout", "output_dropout"}
        <= module._modules.keys()
        and epilogue_of(getattr(module, "intermediate_act_fn", None)) is not None
    )


def matches_conv_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of a front end with nothing before the activation."""
    named = is_stock(module, "*NoLayerNormConvLayer")
    return named and epilogue_of(module._modules.get("activation")) is not None


# SEW's takes [B, C, T], data2vec's is a stack with norms
_POSITIONAL = tuple(
    f"{family}PositionalConvEmbedding"
    for family in ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "Wav2Vec2Conformer")
)


def matches_positional_embedding(module: nn.Module) -> bool:
    """Whether a module is a positional convolution with nothing but a cut before the activation."""
    return (
        is_stock(module, *_POSITIONAL)
        and module._modules.keys() == {"conv", "padding", "activation"}
        and epilogue_of(module._modules["activation"]) is not None
    )
