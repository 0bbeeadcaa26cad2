"""The x-vector heads of transformers: dilated layers that call their linear layer, and lengths.

Dimension key: B batch, T frames, C_in and C_out features.
"""

from typing import Any

from torch import Tensor

from lowbit_kernels.integrations.class_swap import Swapped


class UnfoldedTDNNLayer(Swapped):
    """A TDNN layer: its linear layer over dilated windows, where the original reads the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C_in] to [B, T_out, C_out]."""
        span = self.dilation * (self.kernel_size - 1) + 1
        windows = hidden_states.unfold(1, span, 1)[..., :: self.dilation]  # [B, T_out, C_in, taps]
        windows = windows.transpose(2, 3).flatten(2)
        return self.activation(self.kernel(windows))  # type: ignore[no-any-return]


class DilatedLengths(Swapped):
    """A head that knows how many frames its dilated layers leave of an utterance."""

    def _get_tdnn_output_lengths(self, input_lengths: Any) -> Any:
        """[B] to [B]; the original forgets the dilation, and so pools frames of padding."""
        for layer in self.tdnn:
            input_lengths = input_lengths - layer.dilation * (layer.kernel_size - 1)
        return input_lengths
