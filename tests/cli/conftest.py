"""A tiny wav2vec2 model with random weights, audio files, and a way to call ``lowbit``."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lowbit_kernels.cli import main

# skips this folder where it is missing
soundfile = pytest.importorskip("soundfile")

RATE = 16_000
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
SMALL = {
    "vocab_size": len(LETTERS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 8, 4),
    "conv_stride": (5, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


@dataclass(frozen=True)
class Called:
    """What one call of ``lowbit`` gave."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def lowbit(capfd):
    """Call the command line in this process."""

    def call(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Called(stopped.value.code, out, err)

    return call


def save_model(folder, class_name="Wav2Vec2ForCTC", **changes):
    """Save a random model of transformers and the processor that belongs to it."""
    import transformers

    kind = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**(SMALL | changes))).eval()
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(LETTERS)}))
    transformers.Wav2Vec2Processor(
        feature_extractor=transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False),
        tokenizer=transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def float_model(tmp_path_factory):
    """A base-type model: GroupNorm in the front end, no attention mask asked for."""
    return save_model(tmp_path_factory.mktemp("models") / "float")


@pytest.fixture(scope="session")
def small_model(float_model):
    """The same, quantized by the command line."""
    out = float_model.parent / "small"
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", str(float_model), str(out)])
    assert not stopped.value.code
    return out


def make_noise(seconds, seed=0, channels=1, rate=RATE):
    count = int(seconds * rate)
    generator = np.random.default_rng(seed)
    loudness = 0.1 + 0.05 * np.sin(np.arange(count) * 2 * np.pi * 3 / rate)
    samples = generator.standard_normal((count, channels)) * loudness[:, None]
    return samples.astype(np.float32).squeeze(1) if channels == 1 else samples.astype(np.float32)


@pytest.fixture(scope="session")
def noise():
    """``noise(seconds, seed, channels, rate)`` is [S] or [S, C], its loudness up and down."""
    return make_noise


@pytest.fixture(scope="session")
def make_model():
    """``make_model(folder, class_name, **config)`` saves a tiny model with its processor."""
    return save_model


@pytest.fixture
def clips(tmp_path):
    """Three clips of different length."""
    paths = []
    for number, seconds in enumerate((0.5, 1.1, 0.8)):
        path = tmp_path / f"clip{number}.wav"
        soundfile.write(path, make_noise(seconds, number), RATE, subtype="FLOAT")
        paths.append(path)
    return paths
