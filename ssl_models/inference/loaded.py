"""A trained encoder and how its audio is prepared.

Dimension key: B utterances, S samples at 16 kHz, T frames, C features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lowbit_kernels import load_quantized
from ssl_models.encoder import SpeechEncoder
from ssl_models.objectives import CTC
from ssl_models.training.tasks import ENCODER_FILE, HEAD_FILE, load_encoder

# as transformers' feature extractors add it
_EPSILON = 1e-7


class LoadedEncoder(nn.Module):
    """Utterances of any length to frames.

    Args:
        model: a ``SpeechEncoder``, or a model of transformers that takes waveforms.
        normalize: give each utterance zero mean and unit variance.
        head: reads letters from frames, after fine-tuning.
    """

    def __init__(self, model: nn.Module, normalize: bool, head: CTC | None = None) -> None:
        super().__init__()
        self.model, self.normalize, self.head = model, normalize, head

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load what ``save_quantized``, ``save_pretrained`` or ``lowbit train`` has written.

        Audio is normalized as the feature extractor beside a transformers model says, and always
        for a ``SpeechEncoder``, which is trained so. The head of a transformers model is left out.

        Raises:
            CheckpointError: for a folder without such a model.
            ValueError: for a model that takes no waveforms, or has no feature extractor; or a head
                of another size or vocabulary.
        """
        is_float = (folder / ENCODER_FILE).is_file()
        model: Any = load_encoder(folder).eval() if is_float else load_quantized(folder)
        if isinstance(model, SpeechEncoder):
            return cls(model, normalize=True, head=_load_head(model, folder / HEAD_FILE))
        if getattr(model, "main_input_name", None) != "input_values":
            raise ValueError(
                "model must be a SpeechEncoder or one of transformers that takes waveforms, "
                f"got a {type(model).__name__} in {folder}"
            )
        from transformers import AutoFeatureExtractor

        try:
            extractor = AutoFeatureExtractor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model must have its preprocessor_config.json beside it, got none in {folder}"
            ) from error
        return cls(model.base_model, normalize=bool(extractor.do_normalize))

    @property
    def dtype(self) -> torch.dtype:
        """Of the frames."""
        return next(self.model.parameters()).dtype

    @property
    def hidden_size(self) -> int:
        """C."""
        config: Any = self.model.config
        return int(getattr(config, "output_hidden_size", config.hidden_size))

    def frame_counts(self, samples: Tensor) -> Tensor:
        """Frames [B] of utterances of so many samples [B]; below 1 where there are too few."""
        model: Any = self.model
        is_ours = isinstance(model, SpeechEncoder)
        count = (
            model.feature_extractor.frames if is_ours else model._get_feat_extract_output_lengths
        )
        frames: Tensor = count(samples)
        return frames

    def forward(self, utterances: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Encode utterances as one batch; each gives what it gives alone.

        Args:
            utterances: B of them, [S] each.

        Returns:
            [B, T, C], and the valid frames [B].

        Raises:
            ValueError: for no utterance, or one that is too short for a frame.
        """
        if not utterances:
            raise ValueError("utterances must be at least one, got none")
        like = next(self.model.parameters())
        samples = torch.tensor([len(each) for each in utterances], device=like.device)
        counts = self.frame_counts(samples)
        if counts.min() < 1:
            raise ValueError(
                f"utterances must be long enough for a frame, got {int(samples.min())} samples"
            )
        rows = [self._prepared(each.to(like.device, torch.float32)) for each in utterances]
        waveforms = pad_sequence(rows, batch_first=True).to(like.dtype)
        if isinstance(self.model, SpeechEncoder):
            frames, _ = self.model(waveforms, samples)
        else:
            places = torch.arange(waveforms.shape[1], device=like.device)
            mask = (places < samples[:, None]).long()
            frames = self.model(waveforms, attention_mask=mask).last_hidden_state
        return frames, counts

    def _prepared(self, audio: Tensor) -> Tensor:
        if not self.normalize:
            return audio
        return (audio - audio.mean()) / (audio.var(correction=0) + _EPSILON).sqrt()


def _load_head(model: SpeechEncoder, path: Path) -> CTC | None:
    if not path.is_file():
        return None
    head = CTC(model.config.hidden_size)
    try:
        head.load_state_dict(load_file(path))
    except RuntimeError as error:
        wanted = f"{model.config.hidden_size} features and the letters {head.letters!r}"
        raise ValueError(f"{path} must be a head of {wanted}: {error}") from None
    return head.eval()
