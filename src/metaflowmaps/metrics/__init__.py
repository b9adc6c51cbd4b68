"""Metrics: arrays in, numbers out."""

from metaflowmaps.metrics.calibration import RankTest, rank_statistics, rank_test, spread_ratio
from metaflowmaps.metrics.diversity import mean_pairwise_distance, vendi_score
from metaflowmaps.metrics.frechet import frechet_distance
from metaflowmaps.metrics.image_by_image import class_distance, psnr
from metaflowmaps.metrics.kernels import energy_distance, mmd_squared
from metaflowmaps.metrics.sliced_w2 import sliced_w2
from metaflowmaps.metrics.two_sample import two_sample_test

__all__ = [
    "RankTest",
    "class_distance",
    "energy_distance",
    "frechet_distance",
    "mean_pairwise_distance",
    "mmd_squared",
    "psnr",
    "rank_statistics",
    "rank_test",
    "sliced_w2",
    "spread_ratio",
    "two_sample_test",
    "vendi_score",
]
