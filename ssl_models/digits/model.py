"""The wav2vec2 model of the digits checkpoint and its processor."""

import json
import tempfile
from pathlib import Path
from typing import Any

from ssl_models.digits.data import SAMPLE_RATE, WORDS

LETTERS = sorted(set("".join(WORDS)))
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "<unk>", "|", *LETTERS])}


def build_config(**changes: Any) -> Any:
    """The configuration: base type (GroupNorm in the front end), pre-norm, 50 frames a second.

    Args:
        changes: arguments of ``transformers.Wav2Vec2Config`` to replace.
    """
    from transformers import Wav2Vec2Config

    options: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "pad_token_id": VOCABULARY["<pad>"],
        "bos_token_id": None,
        "eos_token_id": None,
        "conv_dim": (32, 64, 128, 192),
        "conv_kernel": (10, 8, 4, 4),
        "conv_stride": (5, 4, 4, 4),
        "num_feat_extract_layers": 4,
        "feat_extract_norm": "group",
        "do_stable_layer_norm": True,
        "hidden_size": 192,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 768,
        "num_conv_pos_embeddings": 64,
        "num_conv_pos_embedding_groups": 16,
        "hidden_dropout": 0.1,
        "final_dropout": 0.1,
        # drawing these masks takes a tenth of a step and gains less than more steps do
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "layerdrop": 0.0,
        "mask_time_prob": 0.1,
        "mask_time_length": 4,
        "mask_feature_prob": 0.1,
        "mask_feature_length": 16,
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
    }
    return Wav2Vec2Config(**(options | changes))


def build_processor() -> Any:
    """Feature extractor at 16 kHz that returns attention masks, and a tokenizer of letters."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    extractor = Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=SAMPLE_RATE,
        padding_value=0.0,
        do_normalize=True,
        return_attention_mask=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(VOCABULARY))
        tokenizer = Wav2Vec2CTCTokenizer(
            str(path), bos_token=None, eos_token=None, pad_token="<pad>", unk_token="<unk>"
        )
    return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)
