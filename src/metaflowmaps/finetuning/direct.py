r"""The tilted posterior map itself, in one stage.

Given (t, x_t), draws X_i ~ p(x_1 | x_t) of the base with weights e^{r_i} are the tilted posterior, and losses that are
linear in their data target (the diagonal, MeanFlow) stay unbiased when each row is weighted: of N draws one is kept
with probability ∝ e^{r_i}, and the row counts (1/N) Σ e^{r_i − c}.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.draws import equal_log_weights, tilted_weights
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.baseline import Baseline, Level, NoBaseline, RunningBaseline
from metaflowmaps.finetuning.distillation import MapObjective
from metaflowmaps.finetuning.state_laws import StateSource
from metaflowmaps.finetuning.tuning_objective import TuningObjective, TuningSetup, figures_of
from metaflowmaps.finetuning.tuning_problem import gather
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.losses import MeanFlow
from metaflowmaps.random import rand, randn, stream
from metaflowmaps.training.objective import Batch, Given
from metaflowmaps.training.times import context_times
from metaflowmaps.training.train_config import LossConfig
from metaflowmaps.value import log_mean
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
        level, log_base = self.baseline(states, g), equal_log_weights(draws.rewards)
        value, share = log_mean(draws.rewards, log_base), tilted_weights(draws.rewards, log_base)
        weight = torch.exp(value - level)
        self.baseline.update(states, value)
        x_1 = gather(draws.x_1, pick(share, rand((n,), g).to(share)))
        drawn = self._inner(model, step, g, Given(x_1.cpu(), t.cpu(), states.x.cpu(), None))
        figures = figures_of(draws.rewards, share, weight)
        parts = {k: v for k, v in vars(drawn).items() if k not in ("weight", "figures", "cond")}
        return Batch(**parts, cond={k: v.cpu() for k, v in cond.items()}, weight=weight.cpu(), figures=figures)

    def state_dict(self) -> dict[str, Any]:
        """The calls, the source's and the baseline's."""
        held = self.source.state_dict() if isinstance(self.source, StateSource) else {}
        return {**super().state_dict(), "source": held, "baseline": self.baseline.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict gave."""
        super().load_state_dict(state)
        self.baseline.load_state_dict(state["baseline"])
        if isinstance(self.source, StateSource):
            self.source.load_state_dict(state["source"])


def pick(share: Tensor, u: Tensor) -> Tensor:
    """One of N draws a column, by its share (N, B), where u is uniform on [0, 1): (B,) indices, none of share 0."""
    edges = share.cumsum(0)
    last = len(share) - 1 - (share > 0).flip(0).int().argmax(0)  # rounding may carry u past the last edge
    below: Tensor = torch.minimum((edges <= u * edges[-1]).sum(0), last)
    return below
