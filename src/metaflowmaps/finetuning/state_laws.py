"""Where states come from. MFM-FT is off-policy: any law of (t, x) has the same fixed point; variance chooses.

Near the tilted law the draws of p(x_1 | x_t) agree on a reward and e^{r−V} is tame; a share from the base keeps early
times, where all laws are one, and the rest of the space covered.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import Cond, select_cond
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.tuning_problem import Resumable, TuningProblem, evaluating, in_parts
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import randn, stream
from metaflowmaps.sampling import INTEGRATORS, integrate, uniform_grid
from metaflowmaps.work.choices import Choice

Share = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
PoolSize = Annotated[int, Field(ge=64)]


class Data(Protocol):
    """Where the base's own data come from: n draws, a function of the generator."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n of them, (n, *event)."""
        ...


class Samples(NamedTuple):
    """Samples x_1 (n, *event) with their conditions."""

    x_1: Tensor
    cond: Cond

    def rows(self, index: Tensor) -> "Samples":
        """Some of them."""
        index = index.to(self.x_1.device)
        return Samples(self.x_1[index], select_cond(self.cond, index))


class StateSource(Resumable):
    """A law of states at work: the x_1 that the states x_t = α ε + β x_1 of a step are made from."""

    def __call__(self, model: MetaFlowMap, step: int, n: int, generator: torch.Generator) -> tuple[Tensor, Cond]:
        """x_1 (n, *event) and their conditions; ``model`` is the student as it is."""
        raise NotImplementedError

    def log_evidence(self) -> float:
        """log E[e^r] over samples of the base, where baselines start; 0 where it is not known."""
        return 0.0


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

    learned: ClassVar[tuple[str, ...]] = ("replay", "replay_cond")

    def __init__(self, problem: TuningProblem, options: StateMixture, seed: int, data: Data | None = None) -> None:
        if options.data and data is None:
            raise InputError("states.data needs the base's own data, and its checkpoint names none: use states.base")
        self.problem, self.options, self.seed, self.data = problem, options, seed, data
        self.pool, self.cond = base_pool(problem, options.pool, options.pool_steps, seed)
        self.pool_rewards = problem.rewards(self.pool, self.cond).double().cpu()
        self.replay: Tensor | None = None
        self.replay_cond: Cond = None

    def __call__(self, model: MetaFlowMap, step: int, n: int, generator: torch.Generator) -> tuple[Tensor, Cond]:
        """x_1 (n, *event) and their conditions."""
        shares = [self.options.data, self.options.base, self.options.tilted, self.options.replay]
        edges = [round(n * sum(shares[:i]) / sum(shares)) for i in range(5)]
        makers = (
            self._from_data,
            self._from_base,
            self._from_tilted,
            lambda n, g: self._from_replay(model, step, n, g),
        )
        counts = [end - begin for begin, end in pairwise(edges)]
        parts = [make(count, generator) for make, count in zip(makers, counts, strict=True) if count]
        conds = [dict(cond or {}) for _, cond in parts]
        return torch.cat([x for x, _ in parts]), {k: torch.cat([cond[k] for cond in conds]) for k in conds[0]}

    def tilt(self) -> Tensor:
        """Weights e^r of the pool, (pool,)."""
        hopeless = bool(self.pool_rewards.max() == -torch.inf)
        return torch.ones_like(self.pool_rewards) if hopeless else self.pool_rewards.softmax(0)

    def log_evidence(self) -> float:
        """log E[e^r] over the pool."""
        return log_mean_exp(self.pool_rewards)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the replay, where the pool is."""
        super().load_state_dict(state)
        if self.replay is not None:
            self.replay = self.replay.to(self.pool)
            self.replay_cond = {k: v.to(self.pool.device) for k, v in (self.replay_cond or {}).items()}

    def _from_data(self, n: int, generator: torch.Generator) -> Samples:
        assert self.data is not None
        return Samples(self.data.sample(n, generator).to(self.pool), self.problem.conditions(n, generator))

    def _from_base(self, n: int, generator: torch.Generator) -> Samples:
        return Samples(self.pool, self.cond).rows(torch.randint(len(self.pool), (n,), generator=generator))

    def _from_tilted(self, n: int, generator: torch.Generator) -> Samples:
        chosen = torch.multinomial(self.tilt(), n, replacement=True, generator=generator)
        return Samples(self.pool, self.cond).rows(chosen)

    def _from_replay(self, model: MetaFlowMap, step: int, n: int, generator: torch.Generator) -> Samples:
        """Of samples of the student: all are made at first, then a quarter in turn."""
        size, every = self.options.replay_pool, self.options.refresh_every
        fresh = size if self.replay is None else 0 if step % every else max(1, size // 4)
        if fresh:
            g = samples_stream(self.seed, f"replay-{step}")
            with evaluating(model):
                samples, cond = student_samples(self.problem, model, fresh, self.options.replay_steps, g)
            if self.replay is None:
                self.replay, self.replay_cond = samples, cond
            else:
                replaced = (torch.arange(fresh) + (step // every) * fresh) % size
                self.replay[replaced] = samples
                for name, value in (self.replay_cond or {}).items():
                    value[replaced] = (cond or {})[name]
        assert self.replay is not None
        return Samples(self.replay, self.replay_cond).rows(torch.randint(size, (n,), generator=generator))


def log_mean_exp(rewards: Tensor) -> float:
    """log E[e^r] over rewards (n,), refused where all are −inf."""
    value = float(torch.logsumexp(rewards, 0) - math.log(len(rewards)))
    if not math.isfinite(value):
        raise InputError("no sample of the base has a finite reward: there is nothing to tilt towards")
    return value


@torch.no_grad()
def base_pool(problem: TuningProblem, n: int, steps: int, seed: int) -> Samples:
    """n samples of the base with their conditions, a function of the seed."""
    g = stream(seed, "finetune-pool")
    cond = problem.conditions(n, g)
    slices = in_parts(n, problem.chunk)
    parts = [problem.base.generate(s.stop - s.start, steps, g, select_cond(cond, s)) for s in slices]
    problem.count(forwards=n * steps)
    return Samples(torch.cat(parts), cond)


def samples_stream(seed: int, name: str) -> torch.Generator:
    """The noise of samples of the student, by what they are made for."""
    return stream(seed, "finetune-samples", name)


@torch.no_grad()
def student_samples(
    problem: TuningProblem,
    model: MetaFlowMap,
    n: int,
    steps: int,
    generator: torch.Generator,
    integrator: str = "euler",
) -> Samples:
    """n samples (n, *event) of the student's drift by its ODE, with their conditions."""
    cond = problem.conditions(n, generator)
    noise = randn((n, *model.event_shape), generator, model.dtype, model.device)
    parts = []
    for s in in_parts(n, problem.chunk):
        part = select_cond(cond, s)
        drift = lambda t, x, c=part: model.drift(t, x, c)  # noqa: E731
        parts.append(integrate(drift, noise[s], uniform_grid(steps), integrator))
    problem.count(forwards=n * steps * INTEGRATORS[integrator].calls)
    return Samples(torch.cat(parts), cond)
