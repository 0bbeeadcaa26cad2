"""Tiny random models of every family, with inputs for them.

Dimension key: B batch, S samples, T frames, F mel features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioForCTC,
    HubertConfig,
    HubertForCTC,
    ParakeetCTCConfig,
    ParakeetForCTC,
    PreTrainedModel,
    SEWConfig,
    SEWForCTC,
    UniSpeechConfig,
    UniSpeechForCTC,
    UniSpeechSatConfig,
    UniSpeechSatForCTC,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.utils import import_utils

# until 5.15, transformers logs while its forward is traced, which Dynamo refuses unless told to
torch._dynamo.config.ignore_logging_functions.add(import_utils.logger.debug)

VOCABULARY = 24
LAYERS = 2
# frames of padding are as long as the front end's field, so that no valid frame touches the edge
SAMPLES, SHORT_SAMPLES = 2000, 1390
MEL_FRAMES, SHORT_MEL_FRAMES = 64, 40

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    # large enough for every layer to leave its mark on the output
    "initializer_range": 0.15,
    "layerdrop": 0.0,
    "attention_dropout": 0.0,
    "mask_time_prob": 0.0,
    "ctc_loss_reduction": "mean",
    "ctc_zero_infinity": True,
}
WAVEFORM = COMMON | {
    "conv_dim": (32, 48, 48),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 4, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        name: of the family, and of its variant.
        build_float: makes the model; two calls under one seed make the same one.
        lora_targets: layers that LoRA trains.
        input_name: of the first argument.
    """

    name: str
    build_float: Callable[[], PreTrainedModel]
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    input_name: str = "input_values"

    @property
    def is_ctc(self) -> bool:
        """Whether the model transcribes by CTC."""
        return "whisper" not in self.name

    def build(self, seed: int = 1) -> PreTrainedModel:
        """The float model, in eval mode, without dropout; its weights' rows differ in size."""
        torch.manual_seed(seed)
        model = self.build_float().eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                if isinstance(module, nn.BatchNorm1d):  # as trained ones, not the identity
                    module.running_mean.normal_()
                    module.bias.normal_()
                if type(module) in (nn.Linear, nn.Conv1d) and module.weight.dim() > 1:
                    rows = (0.6 * torch.randn(module.weight.shape[0])).exp()
                    rows /= rows.square().mean().sqrt()
                    module.weight.mul_(rows.view(-1, *[1] * (module.weight.dim() - 1)))
        return model

    def full_inputs(self) -> dict[str, Tensor]:
        """A batch of two utterances of one length."""
        torch.manual_seed(3)
        batch = self.inputs() | {self.input_name: torch.randn_like(self.inputs()[self.input_name])}
        return {name: value for name, value in batch.items() if name != "attention_mask"}

    def inputs(self, cut: int = 0) -> dict[str, Tensor]:
        """A padded batch of two utterances, the second ``cut`` samples or mel frames shorter."""
        torch.manual_seed(2)
        if self.input_name == "input_values":
            full, short, shape = SAMPLES, SHORT_SAMPLES, (2, SAMPLES)
        else:
            features = {"whisper": 16, "wav2vec2-bert": 32, "parakeet": 16}
            F = next(v for k, v in features.items() if self.name.startswith(k))
            full, short = MEL_FRAMES, SHORT_MEL_FRAMES
            shape = (2, F, full) if "whisper" in self.name else (2, full, F)
        x = torch.randn(shape)
        short -= cut
        if (
            "whisper" in self.name
        ):  # always 30 s, silence included; the decoder starts with one token
            return {self.input_name: x, "decoder_input_ids": torch.tensor([[1, 4, 7], [1, 9, 2]])}
        x[1, short:] = 0
        mask = torch.ones(2, full, dtype=torch.long)
        mask[1, short:] = 0
        return {self.input_name: x, "attention_mask": mask}

    def single_inputs(self, cut: int = 0) -> list[dict[str, Tensor]]:
        """The utterances of ``inputs``, each alone."""
        batch = self.inputs(cut)
        lengths = batch["attention_mask"].sum(1).tolist()
        return [
            {name: value[i : i + 1, :length] for name, value in batch.items()}
            for i, length in enumerate(lengths)
        ]

    def labels(self) -> Tensor:
        """Targets for ``inputs``."""
        return torch.tensor([[3, 5, 7, 4], [6, 8, 3, 9]])


def of(config: type, model: type, base: dict[str, Any], **options: Any) -> Callable[[], Any]:
    return lambda: model(config(**base | options))


def _parakeet() -> PreTrainedModel:
    encoder = {
        "hidden_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "subsampling_conv_channels": 8,
        "subsampling_factor": 4,
        "num_mel_bins": 16,
        "conv_kernel_size": 5,
        "initializer_range": 0.15,
        "layerdrop": 0.0,
        "dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return ParakeetForCTC(
        ParakeetCTCConfig(
            vocab_size=VOCABULARY,
            pad_token_id=0,
            encoder_config=encoder | {"model_type": "parakeet_encoder"},
            initializer_range=0.15,
        )
    )


def _whisper() -> PreTrainedModel:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=16,
            d_model=48,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_source_positions=MEL_FRAMES // 2,
            max_target_positions=16,
            init_std=0.15,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        )
    )


BERT = COMMON | {"feature_projection_input_dim": 32, "conv_depthwise_kernel_size": 5}
_LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
_CONFORMER = {"lora_targets": ("linear_q", "linear_v")}
ADAPTER = {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 40}

FAMILIES = [
    Family("wav2vec2-group", of(Wav2Vec2Config, Wav2Vec2ForCTC, WAVEFORM)),
    Family("wav2vec2-layer", of(Wav2Vec2Config, Wav2Vec2ForCTC, WAVEFORM, **_LAYER_NORM)),
    Family("hubert", of(HubertConfig, HubertForCTC, WAVEFORM)),
    Family(
        "hubert-batch-norm",
        of(HubertConfig, HubertForCTC, WAVEFORM, conv_pos_batch_norm=True),
    ),
    Family(
        "data2vec",
        of(
            Data2VecAudioConfig,
            Data2VecAudioForCTC,
            WAVEFORM,
            num_conv_pos_embeddings=2,
            conv_pos_kernel_size=7,
        ),
    ),
    Family("wavlm", of(WavLMConfig, WavLMForCTC, WAVEFORM, num_buckets=16)),
    Family("wavlm-stable", of(WavLMConfig, WavLMForCTC, WAVEFORM, num_buckets=16, **_LAYER_NORM)),
    Family("unispeech", of(UniSpeechConfig, UniSpeechForCTC, WAVEFORM)),
    Family("unispeech-sat", of(UniSpeechSatConfig, UniSpeechSatForCTC, WAVEFORM)),
    Family("sew", of(SEWConfig, SEWForCTC, WAVEFORM)),
    Family(
        "conformer-relative",
        of(
            Wav2Vec2ConformerConfig,
            Wav2Vec2ConformerForCTC,
            WAVEFORM,
            position_embeddings_type="relative",
            conv_depthwise_kernel_size=5,
        ),
        **_CONFORMER,
    ),
    Family(
        "conformer-rotary",
        of(
            Wav2Vec2ConformerConfig,
            Wav2Vec2ConformerForCTC,
            WAVEFORM,
            position_embeddings_type="rotary",
            conv_depthwise_kernel_size=5,
        ),
        **_CONFORMER,
    ),
    Family(
        "wav2vec2-bert",
        of(Wav2Vec2BertConfig, Wav2Vec2BertForCTC, BERT),
        lora_targets=("linear_q", "linear_v"),
        input_name="input_features",
    ),
    Family("parakeet", _parakeet, input_name="input_features"),
    Family("wav2vec2-adapter", of(Wav2Vec2Config, Wav2Vec2ForCTC, WAVEFORM | ADAPTER)),
    Family(
        "wav2vec2-bert-adapter",
        of(Wav2Vec2BertConfig, Wav2Vec2BertForCTC, BERT | ADAPTER),
        lora_targets=("linear_q", "linear_v"),
        input_name="input_features",
    ),
    Family("whisper", _whisper, input_name="input_features"),
]
