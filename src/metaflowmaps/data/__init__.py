"""Data sets of images: files in, samples in [−1, 1] out."""

from metaflowmaps.data.config import DataConfig
from metaflowmaps.data.image_set import ImageSet
from metaflowmaps.data.load import describe, load_data

__all__ = ["DataConfig", "ImageSet", "describe", "load_data"]
