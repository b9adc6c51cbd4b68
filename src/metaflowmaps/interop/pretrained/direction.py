r"""Does time run the right way? Loaded the wrong way round a drift gives noise, without an error.

A drift that is what it claims carries noise to data, and is then the best predictor of ``x_1 − ε`` at noisy versions of
its *own* samples. So: draw a few x_1 by the ODE, noise them anew, and divide the loss of flow matching by that of the
best straight line,

    R = E‖b_t(x_t) − (x_1 − ε)‖² / E‖l_t(x_t) − (x_1 − ε)‖²,      x_t = (1−t) ε + t x_1,

l being the drift of N(mean, variance) with the samples' own mean and variance. A drift of structured data has R < 1: it
knows more of its data than two moments. The same drift run backwards, ``−b_{1−t}(x)``, makes samples of nothing and has
R >= 1. Gaussian data look alike both ways, and an untrained network knows as little one way as the other: neither is
decided.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps.random import randn

# trained drifts of images have .3 against 100 and more, exact ones of mixtures .65 against .93; untrained networks may
# have .6 too, since what they drive apart is no Gaussian, but the same within a tenth both ways
KNOWS, MARGIN = 0.9, 1.25
Drift = Callable[[Any, Tensor], Tensor]


class Direction(NamedTuple):
    """``verdict``: forward, backward or undecided; R as given and R of the reversed drift."""

    verdict: str
    given: float
    reversed: float

    def turned(self) -> "Direction":
        """What the probe would say of the reversed drift."""
        verdict = {"forward": "backward", "backward": "forward"}.get(self.verdict, self.verdict)
        return Direction(verdict, self.reversed, self.given)


@torch.no_grad()
def time_direction(
    drift: Drift, event_shape: tuple[int, ...], num: int = 4, steps: int = 6, like: Tensor | None = None, seed: int = 0
) -> Direction:
    """Compare ``drift(t, x)`` on the linear path with ``−drift(1 − t, x)``: 2·num·(2·steps + 3) evaluations.

    Args:
        drift: ``drift(t, x)``, (B,) and (B, *event) -> (B, *event).
        event_shape: of one sample.
        num: samples that are made and explained.
        steps: of the ODE that makes them.
        like: a tensor of the dtype and on the device to compute in.
        seed: of the noise.

    Returns:
        The verdict, and R for the drift as given and reversed.
    """
    like = torch.zeros(()) if like is None else like
    given = _knowledge(drift, (num, *event_shape), steps, like, seed)
    other = _knowledge(lambda t, x: -drift(1 - t, x), (num, *event_shape), steps, like, seed)
    verdict = "undecided"
    if given < KNOWS and other > MARGIN * given:
        verdict = "forward"
    elif other < KNOWS and given > MARGIN * other:
        verdict = "backward"
    return Direction(verdict, given, other)


def _knowledge(drift: Drift, shape: tuple[int, ...], steps: int, like: Tensor, seed: int) -> float:
    """R at the drift's own samples: the geometric mean over three times."""
    g = torch.Generator().manual_seed(seed)
    x = randn(shape, g, like.dtype, like.device)
    for i in range(steps):  # the midpoint rule
        t = i / steps
        middle = x + drift(t, x) / (2 * steps)
        x = x + drift(t + 0.5 / steps, middle) / steps
    mean, logs = x.mean(0) if shape[0] >= 32 else x.mean(), []  # a few samples say little of each coordinate's own mean
    variance = (x - mean).square().mean()
    for t in (0.3, 0.5, 0.7):
        eps = randn(shape, g, like.dtype, like.device)
        x_t = (1 - t) * eps + t * x
        line = mean + (t * variance - (1 - t)) / ((1 - t) ** 2 + t**2 * variance) * (x_t - t * mean)
        loss, reference = ((f - (x - eps)).square().mean() for f in (drift(t, x_t), line))
        logs.append((loss / reference).log())
    ratio = torch.stack(logs).mean().exp()
    return float(ratio) if bool(ratio.isfinite()) else float("inf")
