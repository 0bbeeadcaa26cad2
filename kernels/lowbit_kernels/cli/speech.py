"""A speech model with its processor: audio in, frames, logits or text out.

Dimension key: B windows of a batch, S samples, T frames, D features or tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit_kernels.cli.audio import Samples
from lowbit_kernels.cli.errors import CommandError, first_line, require

Kind = Literal["ctc", "seq2seq", "encoder"]

# what transformers reads them from
_FILES = {
    "AutoFeatureExtractor": ("preprocessor_config.json", "processor_config.json"),
    "AutoTokenizer": ("tokenizer_config.json", "tokenizer.json", "vocab.json"),
}

# mel front ends normalize over frames, which needs several of them
_LEAST_MEL_SECONDS = 0.1


@dataclass
class Speech:
    """A loaded model and how to feed it.

    Args:
        name: what the user called it.
        model: a transformers speech model, in eval mode.
        source: where its processor's files are.
    """

    name: str
    model: Any
    source: str | Path

    @cached_property
    def extractor(self) -> Any:
        """The feature extractor.

        Raises:
            CommandError: if the model comes without one.
        """
        return self._processor_part("AutoFeatureExtractor", "feature extractor")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            CommandError: if the model comes without one.
        """
        return self._processor_part("AutoTokenizer", "tokenizer")

    def _processor_part(self, auto: str, what: str) -> Any:
        transformers = require("transformers", "hf")
        try:
            return getattr(transformers, auto).from_pretrained(self.source)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            folder, problem = Path(self.source), first_line(error)
            if folder.is_dir() and not any((folder / name).is_file() for name in _FILES[auto]):
                problem = (
                    f"{_FILES[auto][0]} is missing; save that of the float model there, by "
                    f"AutoProcessor.from_pretrained(MODEL).save_pretrained({str(folder)!r})"
                )
            raise CommandError(
                f"{self.name}: no usable {what} beside the model: {problem}"
            ) from None

    @property
    def kind(self) -> Kind:
        """What the model's outputs are."""
        name = type(self.model).__name__
        if name.endswith("ForCTC"):
            return "ctc"
        return "seq2seq" if name.endswith("ForConditionalGeneration") else "encoder"

    @property
    def device(self) -> torch.device:
        """Where the model's tensors lie."""
        device: torch.device = self.model.device
        return device

    @property
    def rate(self) -> int:
        """Samples a second that the model takes."""
        return int(self.extractor.sampling_rate)

    @cached_property
    def frame(self) -> int:
        """Samples from one frame to the next.

        Raises:
            CommandError: for a model whose front end is not known.
        """
        config = self.model.config
        strides = getattr(config, "conv_stride", None)
        if strides and not config.is_encoder_decoder:
            steps = getattr(config, "num_adapter_layers", 0) * getattr(config, "add_adapter", False)
            return int(math.prod(strides) * getattr(config, "adapter_stride", 1) ** steps)
        if isinstance(ratio := getattr(config, "inputs_to_logits_ratio", None), int):
            return ratio
        hop = getattr(self.extractor, "hop_length", None)
        encoder = getattr(config, "encoder_config", config)
        if hop and config.model_type.startswith("parakeet"):
            return int(hop * encoder.subsampling_factor)
        if hop and config.model_type == "whisper":
            return 2 * int(hop)
        raise CommandError(
            f"{self.name}: a {config.model_type} model is not served; the wav2vec2 family, "
            "Wav2Vec2-BERT, Parakeet and Whisper are"
        )

    @cached_property
    def least_samples(self) -> int:
        """The fewest samples that give a frame."""
        config = self.model.config
        if not getattr(config, "conv_stride", None):
            return int(_LEAST_MEL_SECONDS * self.rate)
        count = int(getattr(config, "squeeze_factor", 1))
        for kernel, stride in zip(
            reversed(config.conv_kernel), reversed(config.conv_stride), strict=True
        ):
            count = (count - 1) * stride + kernel
        return count

    @property
    def longest_window(self) -> float:
        """The most seconds that the model takes at once."""
        return float(getattr(self.extractor, "chunk_length", math.inf))

    def padded_samples(self, longest: int) -> int:
        """How long each utterance of a batch becomes, in samples."""
        fixed = self.longest_window
        return int(fixed * self.rate) if math.isfinite(fixed) else longest

    def prepare(self, batch: Sequence[Samples]) -> dict[str, Tensor]:
        """Normalize and pad B utterances, [S] each, and mark what is not padding.

        Every utterance is normalized over its own samples, if the feature extractor says so.
        """
        inputs = self.extractor(
            list(batch),
            sampling_rate=self.rate,
            padding="max_length" if math.isfinite(self.longest_window) else True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        dtype = next(self.model.parameters()).dtype
        return {
            key: value.to(self.device, dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }

    def frame_counts(self, inputs: dict[str, Tensor]) -> list[int]:
        """Valid frames of each utterance of ``prepare``'s inputs."""
        lengths = inputs["attention_mask"].sum(-1)
        if self.model.config.model_type == "whisper":
            counts = (lengths + 1) // 2
        elif hasattr(self.model, "_get_subsampling_output_length"):
            counts = self.model._get_subsampling_output_length(lengths)
        else:
            counts = self.model._get_feat_extract_output_lengths(lengths)
        return [int(count) for count in counts]

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B, T, D] over the tokens of a CTC model."""
        logits: Tensor = self.model(**inputs).logits
        return logits

    def frames(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B, T, D], the encoder's last hidden state."""
        hidden: Tensor = self.encoder(**inputs).last_hidden_state
        return hidden

    @property
    def encoder(self) -> Any:
        """The model without its head or decoder."""
        model = self.model
        if model.config.is_encoder_decoder:
            return model.get_encoder()
        if self.kind == "ctc" and hasattr(model, "encoder"):
            return model.encoder
        return model.base_model

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a CTC model's best token of every frame."""
        text: str = self.tokenizer.decode(list(ids))
        return text.strip()
