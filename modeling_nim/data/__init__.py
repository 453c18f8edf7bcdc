"""Data: where images come from, how they are decoded, augmented and handed to a training step."""

from .base import DataRecipe, ImageSource
from .decode import BadImageError
from .evaluation import evaluation_batch
from .sources import load_source


__all__ = ["BadImageError", "DataRecipe", "ImageSource", "evaluation_batch", "load_source"]
