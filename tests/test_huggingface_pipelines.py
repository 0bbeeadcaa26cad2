"""Quantized models in transformers' pipelines and in its Trainer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from lowbit_kernels import quantize
from lowbit_kernels.integrations.processor import prepare_processor
from tests.families.models import FAMILIES, VOCABULARY

BY_NAME = {family.name: family for family in FAMILIES}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def _processor(path: Path) -> Any:
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrs"]
    assert len(letters) == VOCABULARY
    (path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(path / "vocab.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    return transformers.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


CTC_OF_WAVEFORMS = [f.name for f in FAMILIES if f.input_name == "input_values"]


@pytest.mark.parametrize("name", CTC_OF_WAVEFORMS)
def test_pipeline_transcribes(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    model = family.build()
    quantize(model)
    model.save_pretrained(tmp_path)
    processor = prepare_processor(_processor(tmp_path))
    processor.save_pretrained(tmp_path)
    recognize = transformers.pipeline("automatic-speech-recognition", model=str(tmp_path))
    assert recognize.feature_extractor.return_attention_mask
    clips = [
        np.random.default_rng(i).standard_normal(n).astype(np.float32)
        for i, n in enumerate((2000, 1390))
    ]
    single = [recognize(clip)["text"] for clip in clips]
    assert all(single)
    values = processor(clips[0], sampling_rate=16_000, return_tensors="pt")
    best = logits(model, dict(values)).argmax(-1)
    assert single[0] == processor.batch_decode(best)[0]
    batched = [out["text"] for out in recognize(clips, batch_size=2)]
    assert batched[0] == single[0]
    # the pipeline decodes the frames of padding too
    assert batched[1].startswith(single[1])


def test_processor_hands_out_masks(tmp_path: Path) -> None:
    processor = _processor(tmp_path)
    assert "attention_mask" not in processor([np.zeros(9)], sampling_rate=16_000)
    assert prepare_processor(processor) is processor
    processor.save_pretrained(tmp_path)
    loaded = transformers.Wav2Vec2Processor.from_pretrained(tmp_path)
    assert "attention_mask" in loaded([np.zeros(9)], sampling_rate=16_000)
    whisper = transformers.WhisperFeatureExtractor()
    assert not prepare_processor(whisper).return_attention_mask


def test_trainer_trains_an_adapter(tmp_path: Path) -> None:
    family = BY_NAME["wav2vec2-group"]
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    model = family.build()
    quantize(model)
    lora = peft.LoraConfig(r=4, target_modules=list(family.lora_targets))
    tuned = peft.get_peft_model(model, lora)
    inputs = family.inputs()
    rows = [
        {name: value[i] for name, value in (inputs | {"labels": family.labels()}).items()}
        for i in (0, 1)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, learning_rate=2e-2, report_to=[], logging_steps=1,
        per_device_train_batch_size=2, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=tuned, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
