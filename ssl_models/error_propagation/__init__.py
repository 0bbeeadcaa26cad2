"""How quantization error travels through an encoder."""

from ssl_models.error_propagation.propagate import ErrorPropagation, KindError, error_propagation

__all__ = ["ErrorPropagation", "KindError", "error_propagation"]
