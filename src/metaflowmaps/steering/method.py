"""What a steering method is: a frozen dataclass whose fields are its options and whose attributes are its traits.

Most methods are **guided**: they say how the shift D* − D is estimated, and a process does the rest. The others say
themselves how a state moves: ``start``, ``step``, ``finish``. Everything a method evaluates goes through the problem,
which counts it.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.steering.problem import Info, SteeringProblem
from metaflowmaps.steering.process import ODE, SDE, Process, event_norm
from metaflowmaps.work.choices import Choice, spelled


class Method(Choice, ABC):
    """How samples are steered."""

    kind: ClassVar[str] = "method"
    in_words: ClassVar[str] = ""  # what it does, for those who read no formulas: a sentence or two
    look: ClassVar[tuple[str, str]] = ("#7f848b", ".")  # colour and marker in figures
    draws: ClassVar[bool] = False  # does it draw from the posterior? Then num_draws is one of its fields
    gradients: ClassVar[bool] = False  # does it differentiate the reward?
    targets_law: ClassVar[bool] = True  # is p_reward what it aims at, or just high rewards?
    exact: ClassVar[bool] = False  # does it need a model that knows its value function?
    grid: ClassVar[str] = "uniform"  # where nobody says
    usual: ClassVar[type[Process]] = ODE  # the process where nobody says
    published: ClassVar[dict[str, Any]] = {}  # options that undo what this package adds to the published method
    moved_by: ClassVar[str] = ""  # what tables call the process of a method that moves in its own way
    own_moves: ClassVar[str] = ""  # how it moves where that is not the process's to say
    of_systems: ClassVar[tuple[str, ...]] = ()  # what ``finish`` reports, once a system

    @property
    def copies(self) -> int:
        """Rows of state that make one returned sample."""
        return 1

    @property
    def system(self) -> int | None:
        """Samples that are returned together, as one system of particles, and share a seed; None: all of a batch."""
        return 1

    @property
    def row_by_row(self) -> bool:
        """Does every row of state keep to its own reward?"""
        return True

    @property
    def calls_per_step(self) -> float:
        """Evaluations a step and sample, by the paper's count (differentiated: 2): what a budget is planned by."""
        return 1

    @property
    def shown_draws(self) -> int:
        """N, as tables show it; 0 for a method that draws nothing."""
        return int(getattr(self, "num_draws", 0))

    def with_draws(self, num_draws: int) -> "Method":
        """The same method with another N; refused for one that draws nothing."""
        if not self.draws:
            raise InputError(f"{spelled(type(self))} draws nothing from the posterior: leave num_draws out")
        return replace(self, num_draws=num_draws)  # type: ignore[type-var,no-any-return]

    def check(self, process: Process) -> None:
        """Refuse a process that the method cannot run on."""
        if self.own_moves:
            given = process.changed(("integrator", "renormalize", "renormalize_to", "sigma_cap"))
            if given:
                raise InputError(f"{self.name} {self.own_moves}: it has no {given[0]}; leave it out")

    def notes(self, info: Info) -> list[str]:
        """What the method itself says against a result, one line each with what to change; nothing on a good run."""
        return []

    def times(self, problem: SteeringProblem, process: Process) -> list[float]:
        """The times of its steps, from noise to 1."""
        return process.times(problem.path, self.grid)

    @abstractmethod
    def start(self, problem: SteeringProblem, x: Tensor) -> Any:
        """The first state, from noise x: (rows, *event)."""

    @abstractmethod
    def step(self, problem: SteeringProblem, process: Process, state: Any, t: float, u: float) -> tuple[Any, Info]:
        """The state at u from the one at t, and what to report, (rows,) each."""

    @abstractmethod
    def finish(self, problem: SteeringProblem, state: Any) -> tuple[Tensor, Info]:
        """The samples, and what to report of each system, under the names in ``of_systems``."""


class Guidance(NamedTuple):
    """What a guided method says of a batch of states."""

    drift: Tensor  # b_t(x), (B, *event)
    shift: Tensor  # D* − D, (B, *event)
    info: Info
    halved: Tensor | None = None  # the shift that half of the draws would give, less the shift: about its bias


class Guided(NamedTuple):
    """The state of a guided method."""

    x: Tensor
    memory: Any
    moves: Tensor | None = None  # what half of the draws would have moved it differently, (B, *event)


class GuidedMethod(Method):
    """Independent trajectories under b and an estimate of D* − D."""

    def remember(self, problem: SteeringProblem) -> Any:
        """A memory for one batch of trajectories, or None."""
        return None

    @abstractmethod
    def guide(self, problem: SteeringProblem, memory: Any, t: float, x: Tensor) -> Guidance:
        """The drift and the shift at (t, x)."""

    def start(self, problem: SteeringProblem, x: Tensor) -> Guided:
        """Noise, and an empty memory."""
        return Guided(x, self.remember(problem))

    def step(
        self, problem: SteeringProblem, process: Process, state: Guided, t: float, u: float
    ) -> tuple[Guided, Info]:
        """One step of the process under the guided drift."""
        infos: list[Info] = []
        halved: list[Tensor | None] = []

        def steered(t: float, x: Tensor) -> tuple[Tensor, Tensor]:
            guidance = self.guide(problem, state.memory, t, x)
            if not isinstance(guidance, Guidance):
                raise InputError(f"guide of {spelled(type(self))} must return Guidance(drift, shift, info)")
            drift, shift, info, half = guidance
            steering, info["scale"] = process.steering_term(problem.path, t, drift, shift)
            infos.append({**info, "drift_norm": event_norm(drift), "steering_norm": event_norm(steering)})
            halved.append(half)
            return drift, steering

        x, moves = process.step(problem, steered, t, u, state.x), state.moves
        if halved[0] is not None:
            move = (u - t) * float(problem.path.tilt_gain(t)) * halved[0]
            moves = move if moves is None else moves + move
        return Guided(x, state.memory, moves), infos[0]

    def finish(self, problem: SteeringProblem, state: Guided) -> tuple[Tensor, Info]:
        """The state itself."""
        return state.x, {} if state.moves is None else {"moves": state.moves}


__all__ = ["ODE", "SDE", "Guidance", "Guided", "GuidedMethod", "Info", "Method", "Process", "SteeringProblem"]
