r"""Sliced Wasserstein-2, and its own sampling floor.

``SW2² = mean over directions of W2²`` of the projections; in one dimension W2² between two samples of the same size is
the mean squared difference of the sorted values, so a sample set is its **curves**: projections, sorted, (D, n).

Two finite samples of one law are not at distance 0: the expected figure between two exact sets is the **floor**.
With M sets a side, the mean of SW2² over *all* M² pairs needs only the mean curve and the mean squared norm,

    mean_ij ‖X_i − A_j‖² = mean ‖X_i‖² + mean ‖A_j‖² − 2 ⟨X̄, Ā⟩
    mean_{i≠j} ‖A_i − A_j‖² = 2 M/(M−1) (mean ‖A_i‖² − ‖Ā‖²)

which has the expectation of independent pairs and about half their variance. :class:`Curves` accumulates these.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from metaflowmaps._shapes import check_plain
from metaflowmaps.errors import InputError
from metaflowmaps.random import stream

NUM_DIRECTIONS = 64


def directions(dim: int, count: int = NUM_DIRECTIONS) -> Tensor:
    """Fixed unit directions (count, dim): equal angles in the plane, seeded normals above, one axis on the line.

    Args:
        dim: d.
        count: D.

    Returns:
        Unit vectors, (D, d).
    """
    if dim == 1:
        return torch.ones(1, 1)
    if dim == 2:
        angle = torch.arange(count) * (math.pi / count)
        return torch.stack([angle.cos(), angle.sin()], 1)
    normals = torch.randn(count, dim, generator=stream(0, "sliced-w2", dim, count))
    return normals / normals.square().sum(1, keepdim=True).sqrt()


def curves(x: Tensor, along: Tensor) -> np.ndarray:
    """Projections of x (n, *event) on directions (D, dim), each sorted: (D, n) float32.

    Args:
        x: samples.
        along: directions (D, dim).

    Returns:
        Sorted projections, (D, n) float32.
    """
    projected = (along @ x.detach().flatten(1).to("cpu", torch.float32).T).numpy()
    # numpy sorts with SIMD and releases the lock: one slice of the directions a thread
    workers = min(torch.get_num_threads(), projected.shape[0])
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda part: part.sort(axis=1), np.array_split(projected, workers)))
    return projected


class Curves:
    """Running mean of sample sets' curves and squared norms; enough for all-pairs means of SW2²."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: np.ndarray | None = None
        self.square = 0.0

    def add(self, sorted_projections: np.ndarray) -> None:
        """One more sample set."""
        self.count += 1
        square = float(np.square(sorted_projections, dtype=np.float64).mean())
        self.square += (square - self.square) / self.count
        if self.mean is None:
            self.mean = sorted_projections.astype(np.float64)
        else:
            self.mean += (sorted_projections - self.mean) / self.count

    def squared_distance(self, other: "Curves") -> float:
        """Mean of SW2² over all pairs of a set here and a set there."""
        assert self.mean is not None
        assert other.mean is not None
        return self.square + other.square - 2 * float((self.mean * other.mean).mean())

    def floor(self) -> float:
        """Mean of SW2² over all pairs of two different sets here."""
        if self.count < 2 or self.mean is None:
            raise InputError("a sampling floor needs at least two sets")
        variance = self.square - float((self.mean * self.mean).mean())
        return 2 * self.count / (self.count - 1) * variance


def sliced_w2(x: Tensor, y: Tensor, along: Tensor | None = None) -> float:
    """SW2 between two samples (n, *event); of unequal sizes, by their quantile functions.

    Args:
        x: (n, *event).
        y: (m, *event).
        along: directions (D, dim); None: the fixed ones.

    Returns:
        SW2, not its square.
    """
    for samples in (x, y):
        check_plain(samples, "samples")
    if x.shape[1:] != y.shape[1:]:
        raise InputError(f"samples must share an event shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    along = directions(x[0].numel()) if along is None else along
    a, b = curves(x, along), curves(y, along)
    if a.shape[1] == b.shape[1]:
        return float(np.sqrt(np.mean((a - b) ** 2, dtype=np.float64)))
    # both quantile functions are steps: integrate over the union of their jumps
    n, m = a.shape[1], b.shape[1]
    edges = np.union1d(np.arange(n + 1) / n, np.arange(m + 1) / m)
    middle = (edges[1:] + edges[:-1]) / 2
    at_a = np.minimum((middle * n).astype(int), n - 1)
    at_b = np.minimum((middle * m).astype(int), m - 1)
    return float(np.sqrt((np.square(a[:, at_a] - b[:, at_b]) * np.diff(edges)).sum(1).mean()))
