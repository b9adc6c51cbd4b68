r"""Baselines c(t, x): they keep e^{r − c} in range and leave the fixed point where it is.

The residual of MFM-FT at a state is multiplied by e^{−c(t, x)}, which is not zero anywhere. Two conditions: ∇_x does
not act on c, and c does not look at the draws it weighs (with V̂ of the same draws one is back at the self-normalised
estimate and its bias). All kinds here are used first and updated after.

    none      c = 0; e^r may overflow
    running   log-mean of e^r in bins of the inner time: a state counts by e^{V − c}, likely ones more
    learned   a perceptron fitted to V by ``E[e^{r − c} + c]``, whose minimum is c = V: all states count alike
    draws     V̂ from independent draws, not far below the running level
"""

import copy
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metaflowmaps.draws import equal_log_weights
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.config import BaselineConfig
from metaflowmaps.finetuning.problem import Place, Problem
from metaflowmaps.networks.mlp import MLP
from metaflowmaps.value import log_mean

LIMIT = 5.0  # of r − c, beyond which the fit of a learned baseline goes on linearly
BELOW = 3.0  # the running level, is the floor of an estimate from few draws
REACH = 20.0  # of a learned baseline around the running one: where e^r is 0 it would fall without end


class Baseline(Protocol):
    """c(t, x) and what it learns."""

    def __call__(self, place: Place, generator: torch.Generator) -> Tensor:
        """c: (B,)."""
        ...

    def update(self, place: Place, value: Tensor) -> None:
        """Learn from log-means of e^r over this batch's draws."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class NoBaseline:
    """c = 0."""

    def __call__(self, place: Place, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(place.t)

    def update(self, place: Place, value: Tensor) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Running:
    """Log-mean of e^r a bin, an exponential average; a bin that nothing fell into yet has the mean over all."""

    def __init__(self, config: BaselineConfig, start: float) -> None:
        self.config, self.level = config, torch.full((config.bins,), start, dtype=torch.float64)

    def __call__(self, place: Place, generator: torch.Generator) -> Tensor:
        return self.level.to(place.t)[bins_of(place.a, self.config.bins)]

    def update(self, place: Place, value: Tensor) -> None:
        index = bins_of(place.a, self.config.bins).cpu()
        value = value.detach().double().cpu()
        for b in index.unique().tolist():
            mine = value[index == b]
            seen = torch.logsumexp(mine, 0) - math.log(len(mine))
            if bool(seen.isfinite()):
                rates = torch.tensor([1 - self.config.rate, self.config.rate], dtype=torch.float64).log()
                self.level[b] = torch.logsumexp(rates + torch.stack([self.level[b], seen]), 0)

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = state["level"]


class Learned:
    """A running level plus a perceptron of (a, z)."""

    def __init__(self, config: BaselineConfig, start: float, problem: Problem, seed: int) -> None:
        self.running = Running(config, start)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Value(math.prod(problem.base.event_shape), config.width)
        self.network = network.to(problem.base.device, problem.base.dtype)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.lr)

    @torch.no_grad()
    def __call__(self, place: Place, generator: torch.Generator) -> Tensor:
        return self.running(place, generator) + self._beside(place)

    def _beside(self, place: Place) -> Tensor:
        out: Tensor = REACH * torch.tanh(self.network(place.a, place.z) / REACH)
        return out

    @torch.enable_grad()
    def update(self, place: Place, value: Tensor) -> None:
        level = self.running(place, torch.Generator())
        self.optimizer.zero_grad()
        c = self._beside(place)
        # a logarithm of a mean is below V on average, its exponential is right: the loss weighs e^{r − c}
        over = value.detach() - level - c
        weight = torch.where(over > LIMIT, math.exp(LIMIT) * (1 + over - LIMIT), over.clamp_max(LIMIT).exp())
        loss = (weight + c).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.running.update(place, value)

    def state_dict(self) -> dict[str, Any]:
        return {
            "running": self.running.state_dict(),
            "network": {k: v.clone() for k, v in self.network.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running.load_state_dict(state["running"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


class IndependentDraws:
    """V̂ from draws of its own over a floor: few draws of a sharp reward may all miss, and e^{r − c} had no bound."""

    def __init__(self, config: BaselineConfig, problem: Problem, start: float) -> None:
        self.draws, self.problem, self.running = config.draws, problem, Running(config, start)

    def __call__(self, place: Place, generator: torch.Generator) -> Tensor:
        rewards = self.problem.draws(place, self.draws, False, generator).rewards
        value = log_mean(rewards, equal_log_weights(rewards))
        return torch.logaddexp(value, self.running(place, generator) - BELOW)

    def update(self, place: Place, value: Tensor) -> None:
        self.running.update(place, value)

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.running.load_state_dict(state["running"])


class _Value(nn.Module):
    """(a, z) -> a number; 0 at first."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.body = MLP(dim, width, 3)
        self.head = nn.Linear(dim, 1)
        nn.init.zeros_(self.body.output.weight)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(dim))
        nn.init.zeros_(self.head.bias)

    def forward(self, a: Tensor, z: Tensor) -> Tensor:
        flat = z.flatten(1)
        zero = torch.zeros_like(a)
        out: Tensor = self.head(self.body(flat, a, a, torch.zeros_like(flat), zero))[:, 0]
        return out


def bins_of(a: Tensor, bins: int) -> Tensor:
    """Which bin each inner time falls into."""
    return (a * bins).long().clamp(0, bins - 1)


def make_baseline(config: BaselineConfig, problem: Problem, rewards: Tensor, seed: int) -> Baseline:
    """The baseline of a configuration; it starts at log E[e^r] over the pool's rewards."""
    start = float(torch.logsumexp(rewards, 0) - math.log(len(rewards)))
    if not math.isfinite(start):
        raise InputError("no sample of the base has a finite reward: there is nothing to tilt towards")
    if config.kind == "running":
        return Running(config, start)
    if config.kind == "learned":
        return Learned(config, start, problem, seed)
    return IndependentDraws(config, problem, start) if config.kind == "draws" else NoBaseline()
