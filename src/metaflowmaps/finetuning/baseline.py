r"""Baselines c(t, x): they keep e^{r − c} in range and leave the fixed point where it is.

The residual of MFM-FT at a state is multiplied by e^{−c(t, x)}, which is not zero anywhere. Two conditions: ∇_x does
not act on c, and c does not look at the draws it weighs (with V̂ of the same draws one is back at the self-normalised
estimate and its bias). All kinds here are used first and updated after.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from metaflowmaps.finetuning.tuning_problem import BaseStates, Resumable, Tilt, TuningProblem
from metaflowmaps.networks import MLP, MLPConfig
from metaflowmaps.work.choices import Choice

LIMIT = 5.0  # of r − c, beyond which the fit of a learned baseline goes on linearly
BELOW = 3.0  # the running level, is the floor of an estimate from few draws
REACH = 20.0  # of a learned baseline around the running one: where e^r is 0 it would fall without end

Bins = Annotated[int, Field(ge=1)]  # of the inner time, in which running means are kept
Rate = Annotated[float, Field(gt=0, le=1)]  # of their averages


class Level(Resumable):
    """A baseline at work; by default c = 0, which learns nothing."""

    def __call__(self, states: BaseStates, generator: torch.Generator) -> Tensor:
        """c(t, x): (B,)."""
        return torch.zeros_like(states.t)

    def update(self, states: BaseStates, value: Tensor) -> None:
        """Learn from log-means (B,) of e^r over this batch's draws."""


class Baseline(Choice):
    """A kind of c(t, x). Members are frozen dataclasses."""

    def start(self, problem: TuningProblem, level: float, seed: int) -> Level:
        """The baseline at work, from ``level`` = log E[e^r] of the base."""
        raise NotImplementedError


@dataclass(frozen=True)
class NoBaseline(Baseline):
    """c = 0; e^r may overflow."""

    name: ClassVar[str] = "none"

    def start(self, problem: TuningProblem, level: float, seed: int) -> Level:
        """c = 0."""
        return Level()


@dataclass(frozen=True)
class RunningBaseline(Baseline):
    """Log-mean of e^r in bins of the inner time: a state counts by e^{V − c}, likely ones more."""

    name: ClassVar[str] = "running"
    bins: Bins = 32
    rate: Rate = 0.01

    def start(self, problem: TuningProblem, level: float, seed: int) -> "RunningLevel":
        """All bins at the level."""
        return RunningLevel(self.bins, self.rate, level)


class RunningLevel(Level):
    """Log-mean of e^r a bin, an exponential average; a bin that nothing fell into yet has the mean over all."""

    learned: ClassVar[tuple[str, ...]] = ("level",)

    def __init__(self, bins: int, rate: float, start: float) -> None:
        self.rate, self.level = rate, torch.full((bins,), start, dtype=torch.float64)

    def __call__(self, states: BaseStates, generator: torch.Generator) -> Tensor:
        """The level of each state's bin."""
        return self.level.to(states.t)[bins_of(states.a, len(self.level))]

    def update(self, states: BaseStates, value: Tensor) -> None:
        """e^level moves by the rate towards the mean of e^value of its bin."""
        index = bins_of(states.a, len(self.level)).cpu()
        value = value.detach().double().cpu()
        rates = torch.tensor([1 - self.rate, self.rate], dtype=torch.float64).log()
        for b in index.unique().tolist():
            mine = value[index == b]
            seen = torch.logsumexp(mine, 0) - math.log(len(mine))
            if bool(seen.isfinite()):
                self.level[b] = torch.logsumexp(rates + torch.stack([self.level[b], seen]), 0)


@dataclass(frozen=True)
class LearnedBaseline(Baseline):
    """A perceptron fitted to V by ``E[e^{r − c} + c]``, whose minimum is c = V: all states count alike."""

    name: ClassVar[str] = "learned"
    bins: Bins = 32
    rate: Rate = 0.01
    width: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 3e-3

    def start(self, problem: TuningProblem, level: float, seed: int) -> "LearnedLevel":
        """A perceptron that says 0, beside the level."""
        return LearnedLevel(self, problem, level, seed)


class LearnedLevel(RunningLevel):
    """A running level plus a perceptron of (a, z)."""

    learned: ClassVar[tuple[str, ...]] = ("level", "network", "optimizer")

    def __init__(self, options: LearnedBaseline, problem: TuningProblem, start: float, seed: int) -> None:
        super().__init__(options.bins, options.rate, start)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _ValueNetwork(math.prod(problem.base.event_shape), options.width)
        self.network = network.to(problem.base.device, problem.base.dtype)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=options.lr)

    @torch.no_grad()
    def __call__(self, states: BaseStates, generator: torch.Generator) -> Tensor:
        """The running level and what the perceptron adds."""
        return super().__call__(states, generator) + self._added(states)

    def _added(self, states: BaseStates) -> Tensor:
        out: Tensor = REACH * torch.tanh(self.network(states.a, states.z) / REACH)
        return out

    @torch.enable_grad()
    def update(self, states: BaseStates, value: Tensor) -> None:
        """A step of Adam on ``e^{r − c} + c``, then the running level."""
        level = super().__call__(states, torch.Generator())
        self.optimizer.zero_grad()
        c = self._added(states)
        # a logarithm of a mean is below V on average, its exponential is right: the loss weighs e^{r − c}
        over = value.detach() - level - c
        weight = torch.where(over > LIMIT, math.exp(LIMIT) * (1 + over - LIMIT), over.clamp_max(LIMIT).exp())
        loss = (weight + c).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        super().update(states, value)


class _ValueNetwork(nn.Module):
    """(a, z) -> a number; 0 at first."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.body = MLP(MLPConfig(width=width, depth=3), (dim,))
        self.head = nn.Linear(dim, 1)
        nn.init.zeros_(self.body.output.weight)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(dim))
        nn.init.zeros_(self.head.bias)

    def forward(self, a: Tensor, z: Tensor) -> Tensor:
        flat = z.flatten(1)
        out: Tensor = self.head(self.body(flat, a, a, torch.zeros_like(flat), torch.zeros_like(a)))[:, 0]
        return out


@dataclass(frozen=True)
class DrawnBaseline(Baseline):
    """V̂ from independent draws, not far below the running level."""

    name: ClassVar[str] = "draws"
    num_draws: Annotated[int, Field(ge=1)] = 4
    bins: Bins = 32
    rate: Rate = 0.01

    def start(self, problem: TuningProblem, level: float, seed: int) -> "DrawnLevel":
        """Draws over a running floor."""
        return DrawnLevel(self, problem, level)


class DrawnLevel(RunningLevel):
    """V̂ from draws of its own over a floor: few draws of a sharp reward may all miss, and e^{r − c} had no bound."""

    def __init__(self, options: DrawnBaseline, problem: TuningProblem, start: float) -> None:
        super().__init__(options.bins, options.rate, start)
        self.problem, self.num_draws = problem, options.num_draws

    def __call__(self, states: BaseStates, generator: torch.Generator) -> Tensor:
        """log(e^V̂ + e^{level − BELOW})."""
        value = Tilt.of(self.problem.draws(states, self.num_draws, False, generator).rewards).value
        return torch.logaddexp(value, super().__call__(states, generator) - BELOW)


def bins_of(a: Tensor, bins: int) -> Tensor:
    """Which bin each inner time falls into."""
    return (a * bins).long().clamp(0, bins - 1)
