r"""The tilted posterior map itself, in one stage.

Given (t, x_t), draws X_i ~ p(x_1 | x_t) of the base with weights e^{r_i} are the tilted posterior, and losses that are
linear in their data target (the diagonal, MeanFlow) stay unbiased when each row is weighted: of N draws one is kept
with probability ∝ e^{r_i}, and the row counts (1/N) Σ e^{r_i − c}.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.baseline import Baseline, Level, NoBaseline, RunningBaseline
from metaflowmaps.finetuning.distillation import MapObjective
from metaflowmaps.finetuning.tuning_objective import TuningObjective, TuningSetup, figures_of
from metaflowmaps.finetuning.tuning_problem import Tilt, gather
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.losses import MeanFlow
from metaflowmaps.random import rand, randn, stream
from metaflowmaps.training.objective import Batch, Given
from metaflowmaps.training.times import context_times
from metaflowmaps.training.train_config import LossConfig
from metaflowmaps.work.choices import Pick


@dataclass(frozen=True)
class Direct(TuningObjective):
    """The map's own losses on draws of the base, weighted by e^r."""

    name: ClassVar[str] = "direct"
    title: ClassVar[str] = "tilted map in one stage"
    tunes_map: ClassVar[bool] = True
    map_loss: ClassVar[LossConfig] = LossConfig(diagonal="data", consistency=MeanFlow(), diagonal_share=0.5)

    num_draws: int = 4
    baseline: Annotated[Baseline, Pick(Baseline)] = field(default_factory=RunningBaseline)

    def __post_init__(self) -> None:
        check_count(self.num_draws, "num_draws")

    def differentiates(self, declared: bool) -> bool:
        """Whether ∇r is taken: never."""
        return False

    @property
    def unbounded(self) -> bool:
        """Whether rows weigh e^r itself."""
        return isinstance(self.baseline, NoBaseline)

    def check_loss(self, loss: LossConfig) -> None:
        """Refuse a loss with a teacher."""
        if loss.taught:
            raise InputError(
                "method=direct has no teacher: its loss takes diagonal=data, and no velocity of a teacher's"
            )

    def evaluations(self) -> int:
        """The map's two differentiated calls, the base's drift and N draws."""
        return 2 * 3 + 1 + self.num_draws

    def start(self, setup: TuningSetup) -> "WeightedMapObjective":
        """The losses at work, the baseline at log E[e^r]."""
        return WeightedMapObjective(self, setup, self.baseline.start(setup.problem, setup.log_evidence(), setup.seed))


class WeightedMapObjective(MapObjective):
    """The losses of the tilted map at work, on weighted draws."""

    learned: ClassVar[tuple[str, ...]] = (*MapObjective.learned, "source", "baseline")

    def __init__(self, options: Direct, setup: TuningSetup, baseline: Level) -> None:
        super().__init__(setup)
        self.source, self.baseline, self.num_draws = setup.source, baseline, options.num_draws

    @torch.no_grad()
    def batch(self, model: MetaFlowMap, step: int) -> Batch:
        """Contexts of a step, one tilted draw at each, and its weight. Called once a step: the baseline learns."""
        g, n = stream(self.seed, "direct", step), self.batch_size
        assert self.source is not None
        end, cond = self.source(model, step, n, g)
        t = context_times(self.times, n, g).to(end)
        noise = randn(tuple(end.shape), g, end.dtype, end.device)
        states = self.problem.at(t, self.problem.path.interpolate(noise, end, t), cond)
        draws = self.problem.draws(states, self.num_draws, False, g)
        value, share = Tilt.of(draws.rewards)
        weight = torch.exp(value - self.baseline(states, g))
        self.baseline.update(states, value)
        x_1 = gather(draws.x_1, pick(share, rand((n,), g).to(share)))
        drawn = self._inner(model, step, g, Given(x_1.cpu(), t.cpu(), states.x.cpu(), None))
        on_cpu = {name: value.cpu() for name, value in (cond or {}).items()}
        return replace(drawn, cond=on_cpu, weight=weight.cpu(), figures=figures_of(draws.rewards, weight))


def pick(share: Tensor, u: Tensor) -> Tensor:
    """One of N draws a column, by its share (N, B), where u is uniform on [0, 1): (B,) indices, none of share 0."""
    edges = share.cumsum(0)
    last = len(share) - 1 - (share > 0).flip(0).int().argmax(0)  # rounding may carry u past the last edge
    below: Tensor = torch.minimum((edges <= u * edges[-1]).sum(0), last)
    return below
