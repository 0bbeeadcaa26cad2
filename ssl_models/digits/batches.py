"""Training batches, each a pure function of the seed and of the step.

Dimension key: B strings of a batch, T samples at 16 kHz, L letters of a transcript.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ssl_models.digits.augment import augment, change_speed, normalize
from ssl_models.digits.data import (
    MAX_DIGITS,
    SAMPLE_RATE,
    Audio,
    Clip,
    join,
    random_gains,
    transcript,
)

# every string of a batch has the same length: a GroupNorm over time must not see padding
_LENGTHS_SECONDS = (0.8, 1.2, 1.6, 2.0, 2.4)
_MIN_GAP = int(0.02 * SAMPLE_RATE)


class StringBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batch ``step`` of a run: (audio [B, T] normalized, labels [B, L] padded by -100).

    Args:
        recorded: clips of real speakers.
        synthetic: clips of synthetic voices, may be empty.
        letters: the id of each letter; ``"|"`` stands between words.
        seed: of the run.
        seconds: audio in a batch; B is this over the length of a string.
        synthetic_share: of the strings, where there are synthetic clips.
    """

    def __init__(
        self,
        recorded: Sequence[Clip],
        synthetic: Sequence[Clip],
        letters: Mapping[str, int],
        *,
        seed: int,
        seconds: float = 32.0,
        synthetic_share: float = 0.3,
    ) -> None:
        self.recorded, self.synthetic = _by_speaker(recorded), _by_speaker(synthetic)
        self.letters, self.seed, self.seconds = letters, seed, seconds
        self.synthetic_share = synthetic_share if synthetic else 0.0

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, step])
        length = float(rng.choice(_LENGTHS_SECONDS))
        B, T = round(self.seconds / length), int(length * SAMPLE_RATE)
        strings = [self._string(T, rng) for _ in range(B)]
        audio = normalize(augment(np.stack([audio for audio, _ in strings]), rng))
        return torch.from_numpy(audio), self._labels([text for _, text in strings])

    def _string(self, T: int, rng: np.random.Generator) -> tuple[Audio, str]:
        """Join as many digits of one speaker, at most 4, as fit into T samples."""
        synthetic = rng.random() < self.synthetic_share
        speakers = self.synthetic if synthetic else self.recorded
        own = speakers[rng.integers(len(speakers))]
        # one voice a string: a vocal tract 0.8 to 1.25 times as short, and slight unsteadiness
        voice = np.exp(rng.uniform(np.log(0.8), np.log(1.25)))
        wanted = 1 + int(rng.choice(MAX_DIGITS, p=(0.1, 0.15, 0.25, 0.5)))
        digits: list[int] = []
        audios: list[Audio] = []
        free = T - _MIN_GAP
        while len(digits) < wanted:
            clip = own[rng.integers(len(own))]
            audio = change_speed(clip.audio, voice * np.exp(rng.normal(0, 0.03)))
            if len(audio) + _MIN_GAP > free:
                if digits:
                    break
                continue  # a string has at least one digit: draw a shorter one
            digits.append(clip.digit)
            audios.append(audio)
            free -= len(audio) + _MIN_GAP
        shares = np.floor(rng.dirichlet(np.ones(len(digits) + 1)) * free).astype(int)
        gaps = [_MIN_GAP + int(share) for share in shares]
        gaps[-1] += free - int(shares.sum())
        gains = random_gains(len(digits), 6.0, rng)
        return join([a * g for a, g in zip(audios, gains, strict=True)], gaps), transcript(digits)

    def _labels(self, texts: Sequence[str]) -> Tensor:
        rows = [[self.letters[letter] for letter in text.replace(" ", "|")] for text in texts]
        return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=-100)


def _by_speaker(clips: Sequence[Clip]) -> list[list[Clip]]:
    speakers = sorted({clip.speaker for clip in clips})
    return [[clip for clip in clips if clip.speaker == speaker] for speaker in speakers]
