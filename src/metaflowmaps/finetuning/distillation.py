r"""The second stage: the whole tilted map, so that a tuned model draws in one step and can be steered or tuned again.

The tuned drift b̂ is a drift like any other; GLASS turns it into the auxiliary drift of its posteriors, and the map
learns that by the usual losses, from the base's weights on. Contexts are made from samples of b̂.
"""

from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.finetuning.state_laws import samples_stream, student_samples
from metaflowmaps.finetuning.tuning_objective import TuningSetup
from metaflowmaps.finetuning.tuning_problem import Cond
from metaflowmaps.flow_map import Anchored, MetaFlowMap
from metaflowmaps.training.objective import Batch, Objective
from metaflowmaps.training.teachers import GlassTeacher, Teacher
from metaflowmaps.training.train_config import ConditionConfig


class TunedSamples:
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

    def __init__(self, setup: TuningSetup, data: Any = None, teacher: Teacher | None = None) -> None:
        problem, condition = setup.problem, None
        if problem.classes:  # labels come with their null class drawn already
            condition = ConditionConfig(dropout=0.0, guidance=(max(1.0, problem.guidance),))
        super().__init__(data, setup.loss, setup.times, teacher, setup.batch_size, setup.seed + 2, condition)
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
        """The calls on the bill."""
        return {"calls": dict(self.problem.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict gave."""
        self.problem.calls = dict(state["calls"])


def distillation(setup: TuningSetup, student: MetaFlowMap, pool: int, steps: int) -> MapObjective:
    """The objective that makes a map of a tuned drift.

    Args:
        setup: of the run; its batch size and loss are the map's.
        student: the model with the tuned drift.
        pool: samples of it that contexts are made from.
        steps: of its ODE, each.
    """
    problem = setup.problem
    x_1, cond = student_samples(problem, student, pool, steps, samples_stream(setup.seed, "distil"))
    teacher = GlassTeacher(problem.path, student.drift, None)
    objective = MapObjective(setup, TunedSamples(x_1, cond, problem.classes), teacher)
    objective.watch(student.network)
    return objective
