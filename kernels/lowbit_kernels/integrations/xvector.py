"""The dilated layers of transformers' x-vector heads, made to call their linear layer.

Dimension key: B batch, T frames, C_in and C_out features.
"""

from typing import Any

from torch import Tensor, nn

from lowbit_kernels.integrations.class_swap import Swapped


class UnfoldedTDNNLayer(Swapped):
    """A TDNN layer: its linear layer over dilated windows, where the original reads the weight."""

    kernel: nn.Module
    kernel_size: int
    dilation: int
    activation: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C_in] to [B, T_out, C_out]."""
        span = self.dilation * (self.kernel_size - 1) + 1
        windows = hidden_states.unfold(1, span, 1)[..., :: self.dilation]  # [B, T_out, C_in, taps]
        out: Tensor = self.activation(self.kernel(windows.transpose(2, 3).flatten(2)))
        return out


def matches_tdnn_layer(module: nn.Module) -> bool:
    """Whether a module is a TDNN layer of transformers."""
    kind = type(module)
    return kind.__name__ == "TDNNLayer" and kind.__module__.startswith("transformers.")
