"""CTC: an encoder and a linear layer learn transcripts, letter by letter.

Dimension key: B utterances, S samples, T frames, C features, V letters, L letters of a transcript.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLANK = 0
LETTERS = " 'abcdefghijklmnopqrstuvwxyz"


class CTC(nn.Module):
    """The loss of transcripts, and their reading.

    Args:
        hidden_size: C of the encoder.
        letters: what transcripts are written in; the blank comes before them.

    Raises:
        ValueError: for letters that occur twice.
    """

    def __init__(self, hidden_size: int, letters: str = LETTERS) -> None:
        super().__init__()
        if not letters or len(set(letters)) != len(letters):
            raise ValueError(f"letters must differ, at least one, got {letters!r}")
        self.letters = letters
        self.head = nn.Linear(hidden_size, len(letters) + 1)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean over utterances of the loss a letter.

        Args:
            model: gives frames [B, T, C] and valid frames [B] or None, as ``SpeechEncoder``.
            batch: has ``waveforms`` [B, S], ``lengths`` [B] and ``texts``, B strings.

        Raises:
            ValueError: for a text with letters that are not in ``letters``.
        """
        labels = [self.encode(text) for text in batch.texts]
        logits, frames = self.logits(model, batch.waveforms, batch.lengths)
        counts = torch.tensor([len(each) for each in labels])
        flat = torch.tensor([number for each in labels for number in each], dtype=torch.int64)
        # summed without a GPU's nondeterministic kernel for padded labels; longer than frames: 0
        log_probs = logits.float().log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(
            log_probs, flat.to(logits.device), frames.cpu(), counts,
            blank=BLANK, zero_infinity=True,
        )  # fmt: skip

    def logits(
        self, model: nn.Module, waveforms: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, T, V + 1] and valid frames [B] of waveforms [B, S] and valid samples [B]."""
        x, frames = model(waveforms, lengths)
        if frames is None:
            frames = torch.full((x.shape[0],), x.shape[1], device=x.device)
        return self.head(x), frames

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's letters, capitals made small."""
        text = text.lower()
        unknown = sorted(set(text) - set(self.letters))
        if unknown:
            raise ValueError(f"text must be in the letters {self.letters!r}, got {unknown[0]!r}")
        return [self.letters.index(letter) + 1 for letter in text]

    @torch.inference_mode()
    def read(self, model: nn.Module, batch: Any) -> list[str]:
        """Greedy transcripts of a batch."""
        return self.decode(*self.logits(model, batch.waveforms, batch.lengths))

    def decode(self, logits: Tensor, frames: Tensor) -> list[str]:
        """Best letters of logits [B, T, V + 1] in valid frames [B], repeats merged, no blanks."""
        texts = []
        for row, count in zip(logits.argmax(-1), frames.tolist(), strict=True):
            numbers = torch.unique_consecutive(row[:count]).tolist()
            texts.append("".join(self.letters[n - 1] for n in numbers if n != BLANK))
        return texts


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Substitutions, deletions and insertions over the words that were said.

    Raises:
        ValueError: for no words, or lists that do not match.
    """
    import jiwer

    if len(references) != len(hypotheses) or not any(text.split() for text in references):
        raise ValueError(
            "references must have words, and as many texts as hypotheses, "
            f"got {len(references)} and {len(hypotheses)} texts"
        )
    return float(jiwer.wer(list(references), list(hypotheses)))
