"""Training a supernet or a single path: the recipe, the loop, one step, checkpoints, batches, the log."""

from .loop import TrainSummary, train
from .recipe import Recipe

__all__ = ["Recipe", "TrainSummary", "train"]
