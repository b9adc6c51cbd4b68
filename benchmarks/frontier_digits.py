"""The frontier on shipped digits: rewards that one sample in ten thousand meets, or fewer, and the law they ask for.

The truth is the map's own law of one-step samples, tilted: eight million of them, of which sets are drawn by their
weights. Methods that follow the drift aim at the drift's law, which is not quite this one: unsteered, 30 steps are 1.2
floors from it and 100 steps 1.4.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward, scored
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig
from metaflowmaps.lab.evaluate.steering_error import within_reach
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.metrics.finite import root
from metaflowmaps.metrics.sliced_w2 import Curves, curves, directions
from metaflowmaps.random import stream

# slant: 5.5 of its deviations on one-step samples; half: the left half of a picture, seen with noise .4
PROBLEMS = {"digits, slant": ("slant", 50.0), "digits, half": ("half", (0.3 / 0.4) ** 2)}
POOL, BATCH, PILOT, SETS = 2**23, 2**13, 2**16, 8
NEGLIGIBLE = 8.0  # log-weights so far below the mean weight are left out of the pool: less than e^−8 of the law


@dataclass(frozen=True)
class PoolDistance:
    """How far samples are from the law, what its own samples are by chance, and their reward."""

    sw2: float
    floor_sw2: float
    reward: float


class PoolJudge:
    """The law of a map's one-step samples under a reward, by weighted samples.

    Args:
        model: the map.
        reward: r(x).
        samples: that are judged at a time.
        pool: one-step samples.
    """

    def __init__(self, model: MetaFlowMap, reward: Any, samples: int, pool: int) -> None:
        self.reward, self.along = reward, directions(math.prod(model.event_shape))
        x, log_weights, most = _pool(model, reward, pool)
        mean = float(torch.logsumexp(log_weights, 0)) - math.log(pool)
        self.log_evidence = mean - most
        self.effective = float(torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0)))
        edges, self._exact = log_weights.softmax(0).cumsum(0), Curves()
        for i in range(SETS):
            uniform = torch.rand(samples, generator=stream(0, "exact", i), dtype=edges.dtype)
            chosen = torch.searchsorted(edges, uniform).clamp_max(len(x) - 1)
            self._exact.add(curves(x[chosen], self.along))

    def distance(self, sets: list[Tensor]) -> PoolDistance:
        """Of sets of samples."""
        mine, rewards = Curves(), []
        for samples in sets:
            near = within_reach(samples.flatten(1))
            mine.add(curves(near, self.along))
            rewards.append(scored(self.reward, near.view_as(samples)).double().mean())
        near_by_chance = root(self._exact.floor())
        return PoolDistance(
            root(mine.squared_distance(self._exact)), near_by_chance, float(torch.stack(rewards).mean())
        )


@torch.no_grad()
def _pool(model: MetaFlowMap, reward: Any, pool: int) -> tuple[Tensor, Tensor, float]:
    """Samples that carry weight, flat, their rewards, and the largest reward met."""
    pilot = scored(reward, model.generate(PILOT, generator=stream(0, "pilot"))).double()
    least = float(torch.logsumexp(pilot, 0)) - math.log(PILOT) - NEGLIGIBLE
    kept, rewards = [], []
    for begin in range(0, pool, BATCH):
        x = model.generate(min(BATCH, pool - begin), generator=stream(0, "pool", begin))
        r = scored(reward, x).double()
        kept.append(x[r > least].flatten(1))
        rewards.append(r[r > least])
    whole = torch.cat(rewards)
    return torch.cat(kept), whole, float(whole.max())


@cache
def _setup() -> Any:
    return open_setup(OpenedModel.open("digits", "cpu"), ImageEvalConfig(judge="none", drift="none"))[0]


def problem(name: str, samples: int) -> tuple[MetaFlowMap, PoolJudge]:
    """The map and the judge of one of the problems."""
    kind, strength = PROBLEMS[name]
    return _setup().model, PoolJudge(_setup().model, image_reward(_setup(), kind, strength), samples, POOL)
