"""The rotary embedding of wav2vec2-conformer, without the cache that keeps it from one graph."""

from torch import Tensor, nn

from lowbit_kernels.integrations.class_swap import Swapped


class UncachedRotaryEmbedding(Swapped):
    """Computes the embedding at each call.

    The cache holds one length: torch.compile makes a new graph for each, and a tensor that
    inference made breaks the training that follows.
    """

    cached_sequence_length: int | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, C] to [2, T, 1, 1, D], cosines and sines."""
        self.cached_sequence_length = None
        embedding: Tensor = super().forward(hidden_states)  # type: ignore[misc]
        return embedding


def matches_rotary_embedding(module: nn.Module) -> bool:
    """Whether a module is the rotary embedding of transformers' wav2vec2-conformer."""
    name = "Wav2Vec2ConformerRotaryPositionalEmbedding"
    return type(module).__name__ == name and type(module).__module__.startswith("transformers.")
