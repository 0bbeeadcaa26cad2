"""Render the shipped clips from their transcripts: ``python -m ssl_models.digits.render_clips``."""

import json

import numpy as np

from ssl_models.digits.data import SAMPLE_RATE
from ssl_models.digits.shipped import clips_path
from ssl_models.digits.synthesis import synthesize


def main() -> None:
    """Write the FLAC file of every entry of ``transcripts.json``."""
    import soundfile

    silence = np.zeros(SAMPLE_RATE // 5, dtype=np.float32)
    for entry in json.loads((clips_path() / "transcripts.json").read_text()):
        audio = synthesize(
            entry["text"],
            voice=entry["voice"],
            words_per_minute=entry["words_per_minute"],
            pitch=entry["pitch"],
            gap=entry["gap"],
        )
        padded = np.concatenate([silence, audio, silence])
        soundfile.write(clips_path() / entry["file"], padded, SAMPLE_RATE, subtype="PCM_16")


if __name__ == "__main__":
    main()
