"""What a speech encoder learns: masked prediction, transcripts, or its float model."""

from ssl_models.objectives.ctc import CTC
from ssl_models.objectives.distill import Distillation
from ssl_models.objectives.hubert import MaskedPrediction

__all__ = ["CTC", "Distillation", "MaskedPrediction"]
