"""A way to fine-tune from outside the package: flow matching on samples of the base, each weighted by e^r.

With x_t = α ε + β x_1 and x_1 from the base's own law, ``E[e^r v | x_t] / E[e^r | x_t]`` with v = α̇ ε + β̇ x_1 is the
tilted drift: no posterior draws, no gradients. It is noisier than MFM-FT, whose draws are many for one state.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from metaflowmaps.finetuning import Regression, TargetBatch, TuningObjective
from metaflowmaps.random import randn, stream


@dataclass(frozen=True)
class RewardWeighted(TuningObjective):
    """Reward-weighted flow matching; takes states of the base alone (``states.base=1, states.tilted=0``)."""

    name: ClassVar[str] = "reward-weighted"
    title: ClassVar[str] = "reward-weighted flow matching"

    ceiling: float = 50.0  # of e^{r − log E[e^r]}

    def differentiates(self, declared):
        return False

    def evaluations(self):
        return 3 + 1

    def start(self, setup):
        return _Weighted(setup, self.ceiling)


class _Weighted(Regression):
    def __init__(self, setup, ceiling):
        super().__init__(setup)
        self.level, self.ceiling = setup.log_evidence(), ceiling

    @torch.no_grad()
    def batch(self, model, step):
        g = stream(self.seed, "reward-weighted", step)
        x_1, cond = self.source(model, step, self.batch_size, g)
        noise = randn(tuple(x_1.shape), g, x_1.dtype, x_1.device)
        states = self.problem.noised(self.problem.times(len(x_1), g).to(x_1), x_1, noise, cond)
        target = states.as_flow(self.problem.path.velocity(noise, x_1, states.t))
        weight = (self.problem.rewards(x_1, cond) - self.level).exp().clamp_max(self.ceiling)
        return TargetBatch(t=states.t, a=states.a, z=states.z, target=target, weight=weight, cond=cond)
