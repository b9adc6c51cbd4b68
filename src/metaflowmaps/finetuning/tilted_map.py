r"""The whole tilted map, so that a tuned model draws in one step and can itself be steered or tuned again.

**distil**: the tuned drift b̂ is a drift like any other; GLASS turns it into the auxiliary drift of its posteriors, and
the map learns that by the usual losses, from the base's weights on. Contexts are made from samples of b̂.

**direct**: one stage. Given (t, x_t), draws X_i ~ p(x_1 | x_t) of the base with weights e^{r_i} are the tilted
posterior, and losses that are linear in their data target (the diagonal, MeanFlow) stay unbiased when each row is
weighted: of N draws one is kept with probability ∝ e^{r_i}, and the row counts (1/N) Σ e^{r_i − c}.
"""

from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.draws import equal_log_weights, tilted_weights
from metaflowmaps.finetuning.baseline import Baseline
from metaflowmaps.finetuning.config import FinetuneConfig
from metaflowmaps.finetuning.objective import Source, figures_of
from metaflowmaps.finetuning.problem import Cond, Problem, gather
from metaflowmaps.finetuning.states import student_samples
from metaflowmaps.flow_map import Anchored, MetaFlowMap
from metaflowmaps.random import rand, randn, stream
from metaflowmaps.training.config import ConditionConfig, LossConfig
from metaflowmaps.training.objective import Batch, Given, Objective
from metaflowmaps.training.teachers import GlassTeacher, Teacher
from metaflowmaps.training.times import context_times
from metaflowmaps.value import log_mean


class Samples:
    """Finished samples as a source of training data, with labels where there are classes."""

    def __init__(self, x_1: Tensor, cond: Cond, classes: int) -> None:
        self.x_1, self.label, self.classes = x_1.cpu(), cond.get("label"), classes

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n of them, at random."""
        return self.x_1[torch.randint(len(self.x_1), (n,), generator=generator)]

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The same with labels; samples of the null class keep theirs."""
        index = torch.randint(len(self.x_1), (n,), generator=generator)
        assert self.label is not None
        return self.x_1[index], self.label.cpu()[index]


class MapObjective(Objective):
    """The usual objective, its calls counted by hooks. Conditions are the problem's."""

    _watched: nn.Module | None

    def __init__(
        self, config: FinetuneConfig, problem: Problem, data: Any, loss: LossConfig, teacher: Teacher | None, batch: int
    ) -> None:
        condition = None
        if problem.classes:  # labels come with their null class drawn already
            condition = ConditionConfig(dropout=0.0, guidance=(max(1.0, problem.guidance),))
        super().__init__(data, loss, config.times, teacher, batch, config.seed + 2, condition)
        self.problem, self._counting, self._watched = problem, False, None

    def _cond(self, model: MetaFlowMap, label: Tensor | None, n: int, g: torch.Generator) -> Cond:
        if label is None or not self.problem.classes:
            return {}
        cond = {"label": label}
        if self.problem.guidance != 1:
            null = label == self.problem.classes
            cond["guidance"] = torch.where(null, torch.ones(()), torch.tensor(float(self.problem.guidance)))
        return cond

    def __call__(self, model: MetaFlowMap, batch: Batch) -> Tensor:
        """Per-row losses, (B,)."""
        if self._watched is not model.network:
            self._watched = model.network
            self.watch(model.network)
        self._counting = True
        losses = super().__call__(model, batch)
        self._counting = False
        return losses

    def watch(self, network: nn.Module) -> None:
        """Count this network's calls while losses are computed."""

        def hook(_m: nn.Module, _a: Any, out: Tensor) -> None:
            if self._counting:
                rows = out.shape[0]
                self.problem.count(forwards=rows, backwards=rows if out.requires_grad else 0)

        network.register_forward_hook(hook)

    def _guided(self, model: MetaFlowMap, flow: Anchored, batch: Batch, z: Tensor, target: Tensor) -> Tensor:
        return target  # draws and drifts of the base are guided already

    def state_dict(self) -> dict[str, Any]:
        return {"calls": dict(self.problem.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.problem.calls = dict(state["calls"])


def distillation(config: FinetuneConfig, problem: Problem, student: MetaFlowMap) -> MapObjective:
    """The objective that makes a map of a tuned drift."""
    x_1, cond = student_samples(problem, student, config.distil_pool, config.distil_pool_steps, config.seed, "distil")
    data = Samples(x_1, cond, problem.classes)
    teacher = GlassTeacher(problem.path, student.drift, None)
    objective = MapObjective(config, problem, data, config.map_loss, teacher, config.distil_batch_size)
    objective.watch(student.network)
    return objective


class DirectObjective(MapObjective):
    """The tilted posterior map in one stage, from weighted draws."""

    def __init__(self, config: FinetuneConfig, problem: Problem, source: Source, baseline: Baseline) -> None:
        super().__init__(config, problem, None, config.map_loss, None, config.batch_size)
        self.source, self.baseline, self.num_draws = source, baseline, config.num_draws

    @torch.no_grad()
    def batch(self, model: MetaFlowMap, step: int) -> Batch:
        """Contexts of a step, one tilted draw at each, and its weight. Called once a step: the baseline learns."""
        g, n = stream(self.seed, "direct", step), self.batch_size
        end, cond = self.source(model, step, n, g)
        t = context_times(self.times, n, g).to(end)
        place = self.problem.place(
            t, self.problem.path.interpolate(randn(tuple(end.shape), g, end.dtype, end.device), end, t), cond
        )
        made = self.problem.draws(place, self.num_draws, False, g)
        level, log_base = self.baseline(place, g), equal_log_weights(made.rewards)
        value, share = log_mean(made.rewards, log_base), tilted_weights(made.rewards, log_base)
        weight = torch.exp(value - level)
        self.baseline.update(place, value)
        x_1 = gather(made.x_1, pick(share, rand((n,), g).to(share)))
        drawn = self._inner(model, step, g, Given(x_1.cpu(), t.cpu(), place.x.cpu(), None))
        figures = figures_of(made.rewards, share, weight)
        parts = {k: v for k, v in vars(drawn).items() if k not in ("weight", "figures", "cond")}
        return Batch(**parts, cond={k: v.cpu() for k, v in cond.items()}, weight=weight.cpu(), figures=figures)

    def state_dict(self) -> dict[str, Any]:
        held = self.source.state_dict() if hasattr(self.source, "state_dict") else {}
        return {**super().state_dict(), "source": held, "baseline": self.baseline.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.baseline.load_state_dict(state["baseline"])
        if hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(state["source"])


def pick(share: Tensor, u: Tensor) -> Tensor:
    """One of N draws a column, by its share (N, B), where u is uniform on [0, 1): (B,) indices, none of share 0."""
    edges = share.cumsum(0)
    last = len(share) - 1 - (share > 0).flip(0).int().argmax(0)  # rounding may carry u past the last edge
    below: Tensor = torch.minimum((edges <= u * edges[-1]).sum(0), last)
    return below
