"""Where states come from. MFM-FT is off-policy: any law of (t, x) has the same fixed point; variance chooses.

Near the tilted law the draws of p(x_1 | x_t) agree on a reward and e^{r−V} is tame; a share from the base keeps early
times, where all laws are one, and the rest of the space covered.
"""

from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.config import StatesConfig
from metaflowmaps.finetuning.problem import Cond, Problem, evaluating, in_parts
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import randn, stream
from metaflowmaps.sampling import integrate, uniform_grid


class Data(Protocol):
    """Where the base's own data come from: n draws, a function of the generator."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...


class States:
    """Mixes the sources by their shares; rows of one source stand together, in the order of the configuration."""

    def __init__(self, problem: Problem, config: StatesConfig, seed: int, data: Data | None = None) -> None:
        if config.data and data is None:
            raise InputError("states.data needs the base's own data, and its checkpoint names none: use states.base")
        self.problem, self.config, self.seed, self.data = problem, config, seed, data
        self.pool, self.cond = base_pool(problem, config.pool, config.pool_steps, seed)
        self.pool_rewards = problem.rewards(self.pool, self.cond).double().cpu()
        self.replay: Tensor | None = None
        self.replay_cond: Cond = {}

    def __call__(self, model: MetaFlowMap, step: int, n: int, generator: torch.Generator) -> tuple[Tensor, Cond]:
        shares = [self.config.data, self.config.base, self.config.tilted, self.config.replay]
        edges = [round(n * sum(shares[:i]) / sum(shares)) for i in range(5)]
        counts = [end - begin for begin, end in pairwise(edges)]
        parts: list[tuple[Tensor, Cond]] = []
        if counts[0]:
            assert self.data is not None
            x_1 = self.data.sample(counts[0], generator).to(self.pool)
            parts.append((x_1, self.problem.conditions(counts[0], generator)))
        if counts[1]:
            parts.append(self._rows(torch.randint(len(self.pool), (counts[1],), generator=generator)))
        if counts[2]:
            tilt = self.tilt()
            parts.append(self._rows(torch.multinomial(tilt, counts[2], replacement=True, generator=generator)))
        if counts[3]:
            self._refresh(model, step)
            assert self.replay is not None
            chosen = torch.randint(len(self.replay), (counts[3],), generator=generator).to(self.replay.device)
            parts.append((self.replay[chosen], {k: v[chosen] for k, v in self.replay_cond.items()}))
        return torch.cat([x for x, _ in parts]), {
            name: torch.cat([cond[name] for _, cond in parts]) for name in parts[0][1]
        }

    def tilt(self) -> Tensor:
        """Weights e^r of the pool."""
        hopeless = bool(self.pool_rewards.max() == -torch.inf)
        return torch.ones_like(self.pool_rewards) if hopeless else self.pool_rewards.softmax(0)

    def _rows(self, index: Tensor) -> tuple[Tensor, Cond]:
        index = index.to(self.pool.device)
        return self.pool[index], {k: v[index] for k, v in self.cond.items()}

    def _refresh(self, model: MetaFlowMap, step: int) -> None:
        """Samples of the student: all of them at first, then a quarter in turn."""
        size, every = self.config.replay_pool, self.config.refresh_every
        if self.replay is not None and step % every:
            return
        n = size if self.replay is None else max(1, size // 4)
        with evaluating(model):
            made, cond = student_samples(self.problem, model, n, self.config.replay_steps, self.seed, f"replay-{step}")
        if self.replay is None:
            self.replay, self.replay_cond = made, cond
            return
        place = (torch.arange(n) + (step // every) * n) % size
        self.replay[place] = made
        for name, value in cond.items():
            self.replay_cond[name][place] = value

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot make again."""
        if self.replay is None:
            return {}
        return {"replay": self.replay.clone(), "cond": {k: v.clone() for k, v in self.replay_cond.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict gave."""
        if state:
            self.replay = state["replay"].to(self.pool)
            self.replay_cond = {name: value.to(self.pool.device) for name, value in state["cond"].items()}


@torch.no_grad()
def base_pool(problem: Problem, n: int, steps: int, seed: int) -> tuple[Tensor, Cond]:
    """n samples of the base with their conditions, a function of the seed."""
    g = stream(seed, "finetune-pool")
    cond = problem.conditions(n, g)
    parts = [
        problem.base.generate(s.stop - s.start, steps, g, {k: v[s] for k, v in cond.items()} or None)
        for s in in_parts(n, problem.chunk)
    ]
    problem.count(forwards=n * steps)
    return torch.cat(parts), cond


@torch.no_grad()
def student_samples(
    problem: Problem, model: MetaFlowMap, n: int, steps: int, seed: int, name: str
) -> tuple[Tensor, Cond]:
    """n samples of the student's drift by its ODE."""
    g = stream(seed, "finetune-samples", name)
    cond = problem.conditions(n, g)
    noise = randn((n, *model.event_shape), g, model.dtype, model.device)
    parts = []
    for s in in_parts(n, problem.chunk):
        part = {k: v[s] for k, v in cond.items()} or None
        parts.append(integrate(lambda t, x, c=part: model.drift(t, x, c), noise[s], uniform_grid(steps)))  # type: ignore[misc]
    problem.count(forwards=n * steps)
    return torch.cat(parts), cond
