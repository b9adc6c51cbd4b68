r"""The second stage: the whole tilted map, so that a tuned model draws in one step and can be steered or tuned again.

The tuned drift b̂ is a drift like any other; GLASS turns it into the auxiliary drift of its posteriors, and the map
learns that by the usual losses, from the base's weights on. Contexts are made from samples of b̂.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond
from metaflowmaps.finetuning.state_laws import samples_stream, student_samples
from metaflowmaps.finetuning.tuning_objective import TuningSetup
from metaflowmaps.finetuning.tuning_problem import Resumable
from metaflowmaps.flow_map import Anchored, MetaFlowMap
from metaflowmaps.random import Source
from metaflowmaps.training.objective import Batch, Objective
from metaflowmaps.training.teachers import GlassTeacher, Teacher
from metaflowmaps.training.train_config import ConditionConfig


class TunedSamples:
    """Finished samples as a source of training data, with labels where there are classes."""

    def __init__(self, x_1: Tensor, cond: Cond) -> None:
        self.x_1, label = x_1.cpu(), (cond or {}).get("label")
        self.label = torch.zeros(len(x_1), dtype=torch.long) if label is None else label.cpu()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n of them, at random."""
        return self.sample_labelled(n, generator)[0]

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The same with labels; samples of the null class keep theirs."""
        index = torch.randint(len(self.x_1), (n,), generator=generator)
        return self.x_1[index], self.label[index]


class MapObjective(Objective, Resumable):
    """The usual objective, its calls counted by hooks. Conditions are the problem's."""

    learned: ClassVar[tuple[str, ...]] = ("problem",)

    def __init__(self, setup: TuningSetup, data: Any = None, teacher: Teacher | None = None) -> None:
        self.problem = setup.problem
        # labels come with their null class drawn already
        guidance = (max(1.0, self.problem.guidance),)
        condition = ConditionConfig(dropout=0.0, guidance=guidance) if self.problem.classes else None
        super().__init__(data, setup.loss, setup.times, teacher, setup.batch_size, setup.seed + 2, condition)
        self._counting = False
        self._watched: list[nn.Module] = []

    def _cond(self, model: MetaFlowMap, label: Tensor | None, n: int, g: Source) -> dict[str, Tensor]:
        return {} if label is None or not self.problem.classes else self.problem.guided(label)

    def __call__(self, model: MetaFlowMap, batch: Batch) -> Tensor:
        """Per-row losses, (B,)."""
        self.watch(model.network)
        self._counting = True
        losses = super().__call__(model, batch)
        self._counting = False
        return losses

    def watch(self, network: nn.Module) -> None:
        """Count this network's calls while losses are computed."""
        if network in self._watched:
            return
        self._watched.append(network)

        def hook(_m: nn.Module, _a: Any, out: Tensor) -> None:
            if self._counting:
                rows = out.shape[0]
                self.problem.count(forwards=rows, backwards=rows if out.requires_grad else 0)

        network.register_forward_hook(hook)

    def _guided(self, model: MetaFlowMap, flow: Anchored, batch: Batch, z: Tensor, target: Tensor) -> Tensor:
        return target  # draws and drifts of the base are guided already


def distillation(setup: TuningSetup, student: MetaFlowMap, pool: int, steps: int) -> MapObjective:
    """The objective that makes a map of a tuned drift.

    Args:
        setup: of the run; its batch size and loss are the map's.
        student: the model with the tuned drift.
        pool: samples of it that contexts are made from.
        steps: of its ODE, each.
    """
    problem = setup.problem
    samples = student_samples(problem, student, pool, steps, samples_stream(setup.seed, "distil"))
    objective = MapObjective(setup, TunedSamples(*samples), GlassTeacher(problem.path, student.drift, None))
    objective.watch(student.network)
    return objective
