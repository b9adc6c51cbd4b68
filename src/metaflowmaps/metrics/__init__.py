"""Metrics: arrays in, numbers out."""

from metaflowmaps.metrics.kernels import energy_distance, mmd_squared
from metaflowmaps.metrics.sliced_w2 import sliced_w2
from metaflowmaps.metrics.two_sample import two_sample_test

__all__ = ["energy_distance", "mmd_squared", "sliced_w2", "two_sample_test"]
