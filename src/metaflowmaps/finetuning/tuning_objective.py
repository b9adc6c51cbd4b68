r"""What a way to fine-tune is.

The **choice** is a :class:`TuningObjective`: a frozen dataclass whose fields are its options and whose class attributes
are its traits. ``start(setup)`` gives what the training loop runs: an object with ``batch(model, step)``, which makes
frozen inputs, and ``objective(model, batch) -> (B,)`` losses. What it learns on its way (baselines, replay) goes
through ``state_dict``, so that runs resume to the bit: a :class:`Resumable` names it. :class:`Regression` is that
object for all that regress the student's drift on targets, ``w ‖F̂ − F‖²``; a new one needs ``batch`` alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, event_sum
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.state_laws import StateSource
from metaflowmaps.finetuning.tuning_problem import BaseStates, Resumable, Tilt, TuningProblem, student_flow
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import randn
from metaflowmaps.training.loop import TrainingObjective
from metaflowmaps.training.train_config import LossConfig, TimesConfig
from metaflowmaps.value import ess
from metaflowmaps.work.choices import Choice


@dataclass(frozen=True)
class TuningSetup:
    """What a run gives to its objective."""

    problem: TuningProblem
    source: StateSource | None
    batch_size: int
    seed: int
    loss: LossConfig = field(default_factory=LossConfig)  # of a map; what tunes a drift does not look at it
    times: TimesConfig = field(default_factory=TimesConfig)
    steps: int = 1  # of the stage; for what is scheduled over it

    def log_evidence(self) -> float:
        """Where a baseline starts: log E[e^r], as far as the source of states knows it."""
        return self.source.log_evidence() if isinstance(self.source, StateSource) else 0.0


class TuningObjective(Choice):
    """A way to put e^r into the weights. Members are frozen dataclasses."""

    kind: ClassVar[str] = "fine-tuning method"
    tunes_drift: ClassVar[bool] = True  # the student's drift becomes that of p_1 e^r
    tunes_map: ClassVar[bool] = False  # its one-step draws do, without another stage
    needs_states: ClassVar[bool] = True  # of the run's law of states
    map_loss: ClassVar[LossConfig] = LossConfig(diagonal_share=0.25)  # of the map, whichever stage learns it
    without_gradient: ClassVar[str] = "use method=mfm-ft (--method mfm-ft)"  # for a reward that has none

    def differentiates(self, declared: bool) -> bool:
        """Whether ∇r is taken, of a reward that declares itself differentiable or not."""
        return True

    @property
    def unbounded(self) -> bool:
        """Whether rows weigh e^r itself, with no baseline to keep it in range."""
        return False

    def check_reward(self, declared: bool, said: str = "the reward") -> None:
        """Refuse a reward that declares itself not differentiable, where its gradient is taken."""
        if self.differentiates(declared) and not declared:
            raise InputError(
                f"{said} declares itself not differentiable, and {self.name} takes its gradient: "
                f"{self.without_gradient}"
            )

    def check_loss(self, loss: LossConfig) -> None:
        """Refuse a loss of the map that this method cannot use."""

    def evaluations(self) -> int:
        """Forward passes that a row of a step costs, a backward pass counted as two."""
        raise NotImplementedError

    def pool_evaluations(self, steps: int) -> int:
        """Forward passes that a run of so many steps costs beside its rows."""
        return 0

    def start(self, setup: TuningSetup) -> TrainingObjective:
        """The objective at work, for the training loop."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class StateRows:
    """Rows of a batch: tensors (B, …) and their conditions."""

    t: Tensor
    cond: Cond = None

    def __len__(self) -> int:
        return len(self.t)

    def rows(self, start: int, end: int) -> Self:
        """Rows [start, end)."""
        return self._each(lambda v: v[start:end])

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""
        return self._each(lambda v: v.to(device))

    def about(self, rows: Tensor) -> str:
        """What these rows have in common, for a message."""
        t = self.t.cpu()[rows]
        return f"context times in [{float(t.min()):.3f}, {float(t.max()):.3f}]"

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: change(v) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed, cond={name: change(v) for name, v in (self.cond or {}).items()})


@dataclass(frozen=True, kw_only=True)
class TargetBatch(StateRows):
    """Inner states (a, z) with their regression targets in F, and weights; everything frozen."""

    a: Tensor
    z: Tensor
    target: Tensor
    weight: Tensor
    figures: dict[str, float] = field(default_factory=dict)

    def about(self, rows: Tensor) -> str:
        """What these rows have in common, for a message."""
        t, weight = self.t.cpu()[rows], self.weight.cpu()[rows]
        return f"times in [{float(t.min()):.3f}, {float(t.max()):.3f}] and weights up to {float(weight.max()):.3g}"


class Regression(Resumable):
    """w ‖F̂ − F‖² on targets that a subclass makes; counts the student's own calls."""

    learned: ClassVar[tuple[str, ...]] = ("problem", "source")

    def __init__(self, setup: TuningSetup) -> None:
        self.problem, self.source = setup.problem, setup.source
        self.batch_size, self.seed = setup.batch_size, setup.seed

    def batch(self, model: MetaFlowMap, step: int) -> Any:
        """The inputs of a step, a function of (seed, step) and of what was learned before; asked for once a step."""
        raise NotImplementedError

    def __call__(self, model: MetaFlowMap, batch: Any) -> Tensor:
        """Per-row losses, (B,)."""
        n = len(batch)
        self.problem.count(forwards=n, backwards=n)
        f = student_flow(model, batch.a, batch.z, batch.cond)
        losses: Tensor = batch.weight * event_sum((f - batch.target).square())
        return losses

    def states(self, model: MetaFlowMap, step: int, generator: torch.Generator) -> BaseStates:
        """The states of a step: batch_size of them, at inner times uniform below ``last``."""
        assert self.source is not None
        n = self.batch_size
        x_1, cond = self.source(model, step, n, generator)
        noise = randn(tuple(x_1.shape), generator, x_1.dtype, x_1.device)
        return self.problem.noised(self.problem.times(n, generator).to(x_1), x_1, noise, cond)


def figures_of(rewards: Tensor, weight: Tensor) -> dict[str, float]:
    """What a batch reports of its draws' rewards (N, B), and of its rows' weights (B,)."""
    w = weight.double()
    squares = float(w.square().sum())
    return {
        "ess_of_draws": float(ess(Tilt.of(rewards).share).mean()) / len(rewards),
        "ess_of_rows": float(w.sum()) ** 2 / squares / len(w) if squares > 0 else 0.0,
        "weight": float(weight.mean()),
        "reward_of_draws": mean_of_finite(rewards),
    }


def mean_of_finite(values: Tensor) -> float:
    """Their mean; 0 where a hard constraint leaves none."""
    kept = values[values.isfinite()]
    return float(kept.mean()) if len(kept) else 0.0
