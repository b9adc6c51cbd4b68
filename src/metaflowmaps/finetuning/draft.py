r"""DRaFT: −r of the student's one-step draws, differentiated through the student itself.

Nothing holds it to p_1: it climbs to where the reward is highest.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import expand_time
from metaflowmaps.finetuning.tuning_objective import Regression, StateRows, TuningObjective, TuningSetup
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import rand, randn, stream


@dataclass(frozen=True)
class DRaFT(TuningObjective):
    """−r(X_{0,1}(ε; t, x)) of the student's own map; a share of the rows has t = 0, which is generation."""

    name: ClassVar[str] = "draft"
    title: ClassVar[str] = "DRaFT"
    tunes_drift: ClassVar[bool] = False
    tunes_map: ClassVar[bool] = True

    at_zero: Annotated[float, Field(ge=0, le=1)] = 0.5

    def evaluations(self) -> int:
        """The student with its gradient, and the base's drift at its context."""
        return 3 + 1

    def start(self, setup: TuningSetup) -> "DraftAscent":
        """The ascent at work."""
        return DraftAscent(self, setup)


@dataclass(frozen=True, kw_only=True)
class DraftBatch(StateRows):
    """Contexts and noise for one-step draws."""

    x_t: Tensor
    eps: Tensor


class DraftAscent(Regression):
    """DRaFT at work."""

    def __init__(self, options: DRaFT, setup: TuningSetup) -> None:
        super().__init__(setup)
        self.at_zero = options.at_zero

    @torch.no_grad()
    def batch(self, model: MetaFlowMap, step: int) -> DraftBatch:
        """Contexts of a step."""
        g = stream(self.seed, "finetune", step)
        states = self.states(model, step, g)
        eps = randn(tuple(states.x.shape), g, states.x.dtype, states.x.device)
        zero = (rand((len(eps),), g) < self.at_zero).to(eps.device)
        t = torch.where(zero, torch.zeros_like(states.t), states.t)
        noise = randn(tuple(eps.shape), g, eps.dtype, eps.device)
        x = torch.where(expand_time(t, eps) == 0, noise, states.x)
        return DraftBatch(t=t, x_t=x, eps=eps, cond=states.cond)

    def __call__(self, model: MetaFlowMap, batch: DraftBatch) -> Tensor:
        """−r of each row's draw, (B,)."""
        n = len(batch)
        self.problem.count(forwards=n, backwards=n, reward_calls=n, reward_backwards=n)
        x_1 = model.push(batch.eps, batch.t, batch.x_t, 1, batch.cond)
        return -self.problem.reward(x_1, batch.cond)
