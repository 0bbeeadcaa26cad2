"""Encode a corpus with Ray Data: ``python examples/ray_data.py MODEL AUDIO_FOLDER OUT_FOLDER``.

One copy of the model a worker. OUT_FOLDER gets Parquet files of ``path``, ``frames`` ([T, C]
flattened) with their ``shape``, and ``error`` for the files that could not be read.
"""

import argparse
from pathlib import Path

import numpy as np
import ray

from ssl_models.data import read_manifest
from ssl_models.inference import LowbitEncoder


def flatten(rows):
    """Parquet has no tensors of different shapes in a column."""
    frames = rows.pop("frames")
    flat = np.empty(len(frames), dtype=object)
    flat[:] = [each.ravel() for each in frames]
    return rows | {"frames": flat, "shape": np.array([each.shape for each in frames])}


def encode(model: Path, audio: Path, out: Path, workers: int, gpus: float) -> None:
    """Encode all audio files of a folder, or of a manifest."""
    paths = [str(each.path.resolve()) for each in read_manifest(audio).utterances]
    (
        ray.data.from_items([{"path": path} for path in paths])
        .map_batches(
            LowbitEncoder,
            fn_constructor_args=(str(model.resolve()),),
            batch_size=32,
            num_gpus=gpus or None,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        .map_batches(flatten)
        .write_parquet(str(out.resolve()))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("audio", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0.0, help="of a worker, such as 1 or 0.5")
    given = parser.parse_args()
    encode(given.model, given.audio, given.out, given.workers, given.gpus)


if __name__ == "__main__":
    main()
