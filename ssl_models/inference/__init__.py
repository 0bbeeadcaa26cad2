"""Trained encoders at work: a corpus in bulk, or as an upstream of s3prl."""

from ssl_models.inference.bulk import LowbitEncoder

__all__ = ["LowbitEncoder"]
