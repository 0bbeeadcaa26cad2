"""Training that resumes exactly, on one process or many."""

from ssl_models.training.loop import Summary, train
from ssl_models.training.recipe import Recipe

__all__ = ["Recipe", "Summary", "train"]
