"""Data sets: files in, samples out, images in [−1, 1] or latents of unit size."""

from metaflowmaps.data.config import DataConfig
from metaflowmaps.data.image_set import Examples, ImageSet
from metaflowmaps.data.load import describe, load_data

__all__ = ["DataConfig", "Examples", "ImageSet", "describe", "load_data"]
