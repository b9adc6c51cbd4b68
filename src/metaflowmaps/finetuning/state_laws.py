"""Where states come from. MFM-FT is off-policy: any law of (t, x) has the same fixed point; variance chooses.

Near the tilted law the draws of p(x_1 | x_t) agree on a reward and e^{r−V} is tame; a share from the base keeps early
times, where all laws are one, and the rest of the space covered.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.tuning_problem import Cond, TuningProblem, evaluating, in_parts, rows_of_cond
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import randn, stream
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.work.choices import Choice

Share = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
PoolSize = Annotated[int, Field(ge=64)]


class Data(Protocol):
    """Where the base's own data come from: n draws, a function of the generator."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n of them, (n, *event)."""
        ...


class StateSource:
    """A law of states at work: the x_1 that the states x_t = α ε + β x_1 of a step are made from."""

    def __call__(self, model: MetaFlowMap, step: int, n: int, generator: torch.Generator) -> tuple[Tensor, Cond]:
        """x_1 (n, *event) and their conditions; ``model`` is the student as it is."""
        raise NotImplementedError

    def log_evidence(self) -> float:
        """log E[e^r] over samples of the base, where baselines start; 0 where it is not known."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot make again."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict gave."""


class StateLaw(Choice):
    """Whose x_1 the states are made from. Any law will do (off-policy)."""

    kind: ClassVar[str] = "law of states"

    @property
    def needs_data(self) -> bool:
        """Whether states are made from the base's own data."""
        return False

    def evaluations(self) -> int:
        """Network calls before the first step."""
        return 0

    def start(self, problem: TuningProblem, seed: int, data: Data | None = None) -> StateSource:
        """The law at work on a problem."""
        raise NotImplementedError


@dataclass(frozen=True)
class StateMixture(StateLaw):
    """Shares of the rows: the base's data, its samples, those resampled by e^r, and the student's own."""

    name: ClassVar[str] = "mixture"

    data: Share = 0.0  # the images or the mixture that the base was trained on
    base: Share = 0.25  # samples of the base model, made once
    tilted: Share = 0.75  # the same, resampled by e^r: where the tuned model will be
    replay: Share = 0.0  # samples of the student, made anew as it learns
    pool: PoolSize = 16_384  # samples of the base
    pool_steps: Count = 4  # network calls each, by refinement
    replay_pool: PoolSize = 4_096
    replay_steps: Count = 32  # ODE steps each
    refresh_every: Count = 500  # steps; a quarter of the replay is replaced

    def __post_init__(self) -> None:
        if self.data + self.base + self.tilted + self.replay <= 0:
            raise InputError("states needs a share above 0: states.base=1 will do")

    @property
    def needs_data(self) -> bool:
        """Whether states are made from the base's own data."""
        return self.data > 0

    def evaluations(self) -> int:
        """Network calls that the pool costs."""
        return self.pool * self.pool_steps

    def start(self, problem: TuningProblem, seed: int, data: Data | None = None) -> "MixedStates":
        """The law at work on a problem; the pool is made here."""
        return MixedStates(problem, self, seed, data)


class MixedStates(StateSource):
    """Mixes the sources by their shares; rows of one source stand together, in the order of the options."""

    def __init__(self, problem: TuningProblem, options: StateMixture, seed: int, data: Data | None = None) -> None:
        if options.data and data is None:
            raise InputError("states.data needs the base's own data, and its checkpoint names none: use states.base")
        self.problem, self.options, self.seed, self.data = problem, options, seed, data
        self.pool, self.cond = base_pool(problem, options.pool, options.pool_steps, seed)
        self.pool_rewards = problem.rewards(self.pool, self.cond).double().cpu()
        self.replay: Tensor | None = None
        self.replay_cond: Cond = {}

    def __call__(self, model: MetaFlowMap, step: int, n: int, generator: torch.Generator) -> tuple[Tensor, Cond]:
        """x_1 (n, *event) and their conditions."""
        shares = [self.options.data, self.options.base, self.options.tilted, self.options.replay]
        edges = [round(n * sum(shares[:i]) / sum(shares)) for i in range(5)]
        from_data, from_base, from_tilted, from_replay = (end - begin for begin, end in pairwise(edges))
        parts: list[tuple[Tensor, Cond]] = []
        if from_data:
            assert self.data is not None
            x_1 = self.data.sample(from_data, generator).to(self.pool)
            parts.append((x_1, self.problem.conditions(from_data, generator)))
        if from_base:
            parts.append(self._pooled(torch.randint(len(self.pool), (from_base,), generator=generator)))
        if from_tilted:
            tilt = self.tilt()
            parts.append(self._pooled(torch.multinomial(tilt, from_tilted, replacement=True, generator=generator)))
        if from_replay:
            self._refresh(model, step)
            assert self.replay is not None
            chosen = torch.randint(len(self.replay), (from_replay,), generator=generator).to(self.replay.device)
            parts.append((self.replay[chosen], rows_of_cond(self.replay_cond, chosen)))
        names = parts[0][1]
        return torch.cat([x for x, _ in parts]), {name: torch.cat([cond[name] for _, cond in parts]) for name in names}

    def tilt(self) -> Tensor:
        """Weights e^r of the pool, (pool,)."""
        hopeless = bool(self.pool_rewards.max() == -torch.inf)
        return torch.ones_like(self.pool_rewards) if hopeless else self.pool_rewards.softmax(0)

    def log_evidence(self) -> float:
        """log E[e^r] over the pool."""
        return log_mean_exp(self.pool_rewards)

    def _pooled(self, index: Tensor) -> tuple[Tensor, Cond]:
        index = index.to(self.pool.device)
        return self.pool[index], rows_of_cond(self.cond, index)

    def _refresh(self, model: MetaFlowMap, step: int) -> None:
        """Samples of the student: all of them at first, then a quarter in turn."""
        size, every = self.options.replay_pool, self.options.refresh_every
        if self.replay is not None and step % every:
            return
        n = size if self.replay is None else max(1, size // 4)
        with evaluating(model):
            steps = self.options.replay_steps
            samples, cond = student_samples(self.problem, model, n, steps, samples_stream(self.seed, f"replay-{step}"))
        if self.replay is None:
            self.replay, self.replay_cond = samples, cond
            return
        replaced = (torch.arange(n) + (step // every) * n) % size
        self.replay[replaced] = samples
        for name, value in cond.items():
            self.replay_cond[name][replaced] = value

    def state_dict(self) -> dict[str, Any]:
        """The replay."""
        if self.replay is None:
            return {}
        return {"replay": self.replay.clone(), "cond": {k: v.clone() for k, v in self.replay_cond.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict gave."""
        if state:
            self.replay = state["replay"].to(self.pool)
            self.replay_cond = {name: value.to(self.pool.device) for name, value in state["cond"].items()}


def log_mean_exp(rewards: Tensor) -> float:
    """log E[e^r] over rewards (n,), refused where all are −inf."""
    value = float(torch.logsumexp(rewards, 0) - math.log(len(rewards)))
    if not math.isfinite(value):
        raise InputError("no sample of the base has a finite reward: there is nothing to tilt towards")
    return value


@torch.no_grad()
def base_pool(problem: TuningProblem, n: int, steps: int, seed: int) -> tuple[Tensor, Cond]:
    """n samples of the base with their conditions, a function of the seed."""
    g = stream(seed, "finetune-pool")
    cond = problem.conditions(n, g)
    parts = [
        problem.base.generate(s.stop - s.start, steps, g, rows_of_cond(cond, s) or None)
        for s in in_parts(n, problem.chunk)
    ]
    problem.count(forwards=n * steps)
    return torch.cat(parts), cond


def samples_stream(seed: int, name: str) -> torch.Generator:
    """The noise of samples of the student, by what they are made for."""
    return stream(seed, "finetune-samples", name)


@torch.no_grad()
def student_samples(
    problem: TuningProblem, model: MetaFlowMap, n: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, Cond]:
    """n samples (n, *event) of the student's drift by its ODE, with their conditions."""
    cond = problem.conditions(n, generator)
    noise = randn((n, *model.event_shape), generator, model.dtype, model.device)
    parts = []
    for s in in_parts(n, problem.chunk):
        part = rows_of_cond(cond, s) or None
        parts.append(integrate(lambda t, x, c=part: model.drift(t, x, c), noise[s], uniform_grid(steps)))  # type: ignore[misc]
    problem.count(forwards=n * steps)
    return torch.cat(parts), cond
