"""The embedded checkpoint: a small wav2vec2 model that reads spoken digits."""

from ssl_models.digits.shipped import ShippedClip, checkpoint_path, clips_path, load_clips

__all__ = ["ShippedClip", "checkpoint_path", "clips_path", "load_clips"]
