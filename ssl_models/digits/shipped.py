"""What the package ships: the trained checkpoint and a few synthetic clips.

Dimension key: T samples at 16 kHz.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ShippedClip:
    """A string of digits spoken by espeak-ng: audio is [T] float32 at 16 kHz."""

    name: str
    text: str
    voice: str
    audio: NDArray[np.float32]


def checkpoint_path() -> Path:
    """The folder of the shipped checkpoint, for ``Wav2Vec2ForCTC.from_pretrained``."""
    return Path(str(files(__package__))) / "checkpoint"


def clips_path() -> Path:
    """The folder of the shipped clips and their ``transcripts.json``."""
    return Path(str(files(__package__))) / "clips"


def load_clips() -> list[ShippedClip]:
    """Read the shipped clips. They are synthetic speech, labeled so in ``transcripts.json``."""
    import soundfile

    clips = []
    for entry in json.loads((clips_path() / "transcripts.json").read_text()):
        audio, _ = soundfile.read(clips_path() / entry["file"], dtype="float32")
        clips.append(ShippedClip(entry["file"], entry["text"], entry["voice"], audio))
    return clips
