"""How small wav2vec2-base is on disk: 4 bits, groups of 64, the convolutions included."""

import tempfile
from pathlib import Path

from safetensors.torch import save_file

from bench.case import Row, ValueCase
from bench.cases.encoder_cpu import float32_model
from lowbit_kernels import QuantConfig, quantize, save_quantized

GOAL = 0.16


def measure() -> list[Row]:
    """Bytes of the float32 and of the low-bit checkpoint, all files counted, and their ratio."""
    model = float32_model()
    with tempfile.TemporaryDirectory() as folder:
        file, directory = Path(folder) / "float32.safetensors", Path(folder) / "lowbit"
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
        quantize(model, QuantConfig.small())
        save_quantized(model, directory)
        before = file.stat().st_size
        after = sum(path.stat().st_size for path in directory.iterdir())
    return [
        {"name": "wav2vec2-base, float32", "value": before, "unit": "bytes"},
        {"name": "wav2vec2-base, 4 bits, groups of 64", "value": after, "unit": "bytes"},
        {"name": "ratio", "value": after / before, "unit": "", "goal": GOAL},
    ]


CHECKPOINT_BYTES = ValueCase("checkpoint_bytes", "Checkpoint size", measure)
