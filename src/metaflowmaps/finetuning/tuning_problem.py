r"""What every fine-tuning objective works on: a frozen base, a checked reward, conditions, and what it all cost.

Velocities are compared in chart coordinates at context time 0, where the student's drift is its diagonal: there a
one-draw target has bounded variance at every t (:mod:`metaflowmaps.parameterization`).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond, select_cond
from metaflowmaps.draws import DrawOptions, Draws, equal_log_weights, make_draws, tilted_weights
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.parameterization import Chart
from metaflowmaps.posterior import MapPosterior
from metaflowmaps.random import rand
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.value import log_mean

COUNTS = ("forwards", "backwards", "reward_calls", "reward_backwards")


class Resumable:
    """What learns while a run lasts: the attributes that ``learned`` names go through its checkpoints."""

    learned: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot make again."""
        held = {name: getattr(self, name) for name in self.learned}
        return {k: copy.deepcopy(v.state_dict() if hasattr(v, "state_dict") else v) for k, v in held.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what state_dict gave."""
        for name in self.learned:
            held = getattr(self, name)
            if hasattr(held, "load_state_dict"):
                held.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])


class BaseStates(NamedTuple):
    """States (t, x) with the base's drift there, in its own coordinates and in the student's (a, z, F)."""

    t: Tensor
    x: Tensor
    cond: Cond
    chart: Chart
    a: Tensor
    z: Tensor
    drift: Tensor
    flow: Tensor  # F of the base's drift

    def as_flow(self, velocity: Tensor) -> Tensor:
        """A velocity (B, *event) at these states as F."""
        return self.chart.velocity_in(self.t, self.x, velocity)


class Tilt(NamedTuple):
    """What the rewards of N draws say of each state: V̂ (B,), and each draw's share of e^r (N, B)."""

    value: Tensor
    share: Tensor

    @classmethod
    def of(cls, rewards: Tensor) -> "Tilt":
        """From rewards (N, B)."""
        equal = equal_log_weights(rewards)
        return cls(log_mean(rewards, equal), tilted_weights(rewards, equal))


class TuningProblem(Resumable):
    """The base and the reward. Everything about the base is without gradient in its weights.

    Args:
        base: the map that is tuned; it is frozen and put in evaluation mode.
        reward: ``(x, cond) -> (B,)``, times its strength.
        last: inner times of states stay below.
        guidance: the one scale w of a base with classes.
        null_share: of the null class among labels.
        chunk: rows differentiated at a time.
    """

    learned: ClassVar[tuple[str, ...]] = ("calls",)

    def __init__(
        self,
        base: MetaFlowMap,
        reward: Callable[..., Tensor],
        last: float = 0.9936,
        guidance: float = 1.0,
        null_share: float = 0.2,
        chunk: int = 2048,
    ) -> None:
        self.base, self.reward = base.requires_grad_(False).eval(), checked_reward(reward)
        self.path, self.last, self.guidance, self.chunk = base.path, last, guidance, chunk
        self.null_share = null_share
        self.classes = int(getattr(base.network, "num_classes", 0))
        self.calls = dict.fromkeys(COUNTS, 0)
        if guidance != 1 and not self.classes:
            raise InputError(f"guidance={guidance:g} needs a base with classes, and this one has none: leave it out")
        law = base.guidance_law
        self.unasked = 1.0 if law is None or law.asked else law.scale  # the scale of what the base gives for a label
        if guidance != self.unasked and law is not None and getattr(base.network, "guidance", None) is None:
            raise InputError(
                f"this base gives labels at guidance {self.unasked:g}, and its network takes no other: tune it at "
                f"guidance={self.unasked:g}, or convert it with --set guidance=true"
            )

    def conditions(self, n: int, generator: torch.Generator, label: Tensor | None = None) -> dict[str, Tensor]:
        """Labels, all classes alike and the null class in its share, at the one guidance scale; {} without classes."""
        if not self.classes:
            return {}
        if label is None:
            label = torch.randint(self.classes, (n,), generator=generator)
        null = rand((n,), generator) < self.null_share
        label = torch.where(null, torch.full_like(label, self.classes), label)
        return {name: value.to(self.base.device) for name, value in self.guided(label).items()}

    def guided(self, label: Tensor) -> dict[str, Tensor]:
        """Labels with the one guidance scale, if the base needs to be told; the null class has nothing to guide."""
        if self.guidance == self.unasked:
            return {"label": label}
        scale = torch.where(label == self.classes, torch.ones(()), torch.tensor(float(self.guidance)))
        return {"label": label, "guidance": scale}

    def times(self, n: int, generator: torch.Generator) -> Tensor:
        """(n,) inner times of states, uniform below ``last``."""
        return self.last * rand((n,), generator)

    def noised(self, a: Tensor, x_1: Tensor, noise: Tensor, cond: Cond) -> BaseStates:
        """The states α ε + β x_1 at inner times a (B,), and the base there."""
        t = self.base.anchor(torch.zeros_like(a), torch.zeros_like(x_1)).chart.time_out(a).clamp(0, 1)
        return self.at(t, self.path.interpolate(noise, x_1, t), cond)

    @torch.no_grad()
    def at(self, t: Tensor, x: Tensor, cond: Cond) -> BaseStates:
        """The states (t, x), and the base there."""
        flow = self.base.anchor(torch.zeros_like(t), torch.zeros_like(x), cond)
        chart = flow.chart
        a, z = chart.time_in(t), chart.state_in(t, x)
        f = flow(a, a, z)
        self.count(forwards=len(t))
        return BaseStates(t, x, cond, chart, a, z, chart.velocity_out(t, t, x, f), f)

    def draws(self, states: BaseStates, num_draws: int, differentiate: bool, generator: torch.Generator) -> Draws:
        """num_draws of p(x_1 | x_t) by the base map, with rewards and, if asked for, their gradients in x_t.

        Returns:
            Draws of shape (num_draws, B, *event), rewards (num_draws, B) and gradients or None.
        """
        n, posterior = len(states.t), MapPosterior(self.base)
        options = DrawOptions(num_draws, differentiate, chunk=max(1, self.chunk // n))
        parts = [
            make_draws(
                posterior, self.reward, states.t[s], states.x[s], options, generator, select_cond(states.cond, s)
            )
            for s in in_parts(n, self.chunk)
        ]
        gradients = torch.cat([p.gradients for p in parts if p.gradients is not None], 1) if differentiate else None
        self.count(forwards=n * num_draws, reward_calls=n * num_draws)
        if differentiate:
            self.count(backwards=n * num_draws, reward_backwards=n * num_draws)
        return Draws(torch.cat([p.x_1 for p in parts], 1), torch.cat([p.rewards for p in parts], 1), gradients)

    @torch.no_grad()
    def rewards(self, x_1: Tensor, cond: Cond) -> Tensor:
        """r(x_1): (B,), in parts."""
        self.count(reward_calls=len(x_1))
        return torch.cat([self.reward(x_1[s], select_cond(cond, s)) for s in in_parts(len(x_1), self.chunk)])

    def count(self, **calls: int) -> None:
        """Add network and reward calls to the bill."""
        for name, number in calls.items():
            self.calls[name] += number

    @contextmanager
    def unbilled(self) -> Iterator[None]:
        """Looking on is not part of the bill."""
        calls = dict(self.calls)
        yield
        self.calls = calls


def student_flow(model: MetaFlowMap, a: Tensor, z: Tensor, cond: Cond) -> Tensor:
    """The student's diagonal at context time 0: F of its drift."""
    return model.anchor(torch.zeros_like(a), torch.zeros_like(z), cond)(a, a, z)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, while it lasts: a student that makes states or figures drops nothing out."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def in_parts(n: int, size: int) -> Sequence[slice]:
    """Slices that cover n rows."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """Row i's draw index[i] from (N, B, *event): (B, *event)."""
    out: Tensor = tensor[index, torch.arange(tensor.shape[1], device=tensor.device)]
    return out
