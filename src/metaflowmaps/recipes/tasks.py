"""Tasks whose steered law is known in closed form: a mixture, a path's worth of exact answers, and rewards."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from metaflowmaps.data import Mixture
from metaflowmaps.errors import unknown
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.random import stream
from metaflowmaps.recipes.gmm import LAW as GMM_LAW
from metaflowmaps.recipes.mixture16 import DIM
from metaflowmaps.recipes.mixture16 import LAW as LAW_16D
from metaflowmaps.rewards.analytic import LinearGaussian


class SteeringTask(NamedTuple):
    """A law and rewards on it; the first reward is the task's own."""

    name: str
    source: Mixture
    rewards: dict[str, LinearGaussian]

    @property
    def law(self) -> GaussianMixture:
        return self.source.law()

    def reward(self, name: str) -> LinearGaussian:
        """The reward of that name; "" is the task's own."""
        if name and name not in self.rewards:
            raise unknown("reward", name, self.rewards)
        return self.rewards[name or next(iter(self.rewards))]


def gmm_inverse() -> SteeringTask:
    """The paper's inverse problem: three modes, one noisy projection y = (1.2, −0.8)·x + 0.2 n observed as −1."""
    rewards = {name: LinearGaussian(torch.tensor([1.2, -0.8]), -1.0, std) for name, std in _WIDTHS.items()}
    return SteeringTask("gmm-inverse", GMM_LAW, rewards)


def mixture_16d() -> SteeringTask:
    """Eight full covariances in 16 dimensions, two projections observed, with three widths of noise."""
    projections = torch.randn(2, DIM, generator=stream(0, "mixture-16d-reward"), dtype=torch.float64)
    projections = projections / projections.norm(dim=1, keepdim=True)
    target = torch.tensor([-0.5, 0.5])
    rewards = {
        name: LinearGaussian(projections, target, std)
        for name, std in {"medium": 0.3, "broad": 1.0, "sharp": 0.1}.items()
    }
    return SteeringTask("mixture-16d", LAW_16D, rewards)


_WIDTHS = {"paper": 0.2, "broad": 2.0}
TASKS: dict[str, Callable[[], SteeringTask]] = {"gmm-inverse": gmm_inverse, "mixture-16d": mixture_16d}


def steering_task(name: str) -> SteeringTask:
    """The task of that name."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]()
