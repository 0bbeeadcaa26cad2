"""Speech from a manifest or a folder, in batches that depend on a seed and a number alone."""

from ssl_models.data.batches import AudioBatch, AudioBatches
from ssl_models.data.manifest import Manifest, Utterance, read_manifest

__all__ = ["AudioBatch", "AudioBatches", "Manifest", "Utterance", "read_manifest"]
