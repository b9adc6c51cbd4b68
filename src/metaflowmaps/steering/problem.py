"""What every steering method works on: a counted model, a counted and checked reward, and noise for each row.

A sample, or a particle system that is returned whole, has a seed; rows of state that are copies of it (candidates,
particles) have seeds derived from that one. All noise is a function of the seed of its row, its purpose and how often
that was asked for (:class:`metaflowmaps.random.RowNoise`): a sample does not depend on the batch it is made in.
The exception is a model that draws by a ``draw`` of its own, without ``push``: its generator is one for the batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond, Time, batch_time, mask_over, repeat_cond, repeat_rows
from metaflowmaps.cost import Meter
from metaflowmaps.draws import DrawOptions, Draws, make_draws
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.path import Path, as_path
from metaflowmaps.posterior import MapPosterior
from metaflowmaps.random import RowNoise, copy_seeds, randn
from metaflowmaps.rewards.base import codecs_of
from metaflowmaps.rewards.checked import CheckedReward, checked_reward
from metaflowmaps.weighted_posterior import WeightedPosterior

Info = dict[str, Tensor]
FIRST = 0.01  # where gradients look at t = 0: (α²/β) ∂X/∂x is 0/0 there, and the posterior has hardly moved


class SteeringProblem:
    """Model, reward and condition of one batch of samples; every evaluation passes the meter.

    States may hold k rows a sample, as k blocks of the batch: conditions are repeated to match.
    """

    def __init__(self, model: Any, reward: Any, meter: Meter) -> None:
        self.path: Path = as_path(_needed(model, "path"))
        self.event_shape = tuple(_needed(model, "event_shape"))
        self.dtype, self.device = dtype_of(model), device_of(model)
        self.model, self.given_reward, self.meter = model, reward, meter
        self.reward = _CountedReward(checked_reward(reward), meter)
        self.metered = MeteredModel(model, meter)
        self.posterior: Any = None
        decoder = getattr(model, "decoder", None)
        decoders = [*([decoder] if isinstance(decoder, nn.Module) else []), *codecs_of(reward)]
        for module in dict.fromkeys(decoders):  # one that model and reward share counts once
            meter.watch(module, "decodes", None)
        self.cond: Cond = None
        self.seeds = torch.empty(0, dtype=torch.int64)
        self._streams: dict[tuple[str | float, ...], RowNoise] = {}
        self._made: dict[str, float] = {}

    def begin(self, seeds: Tensor, cond: Cond) -> None:
        """A new batch: the seeds of its samples or whole particle systems, and its conditions."""
        self.seeds, self.cond = seeds.to(self.device), cond
        self._streams = {}

    def once(self, name: str, make: Callable[[], float]) -> float:
        """A number that is made once for all batches, or where there are conditions for each."""
        if self.cond is not None:
            return make()
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def stream(self, *name: str | float, rows: int | None = None) -> RowNoise:
        """The noise of one purpose, for each row of state, or without ``rows`` for each seed.

        What one purpose draws never shifts another's numbers. What some batches ask for and others do not needs a
        name that tells when: else a row's numbers would depend on what its neighbours asked.
        """
        rows = rows or len(self.seeds)
        key = (*name, rows)
        if key not in self._streams:
            self._streams[key] = RowNoise(copy_seeds(self.seeds, rows // len(self.seeds)), *name)
            self._streams[key].mask = self._mask_of(rows)
        return self._streams[key]

    def _mask_of(self, rows: int) -> Tensor | None:
        """Where states are samples and not padding, (rows, *event); None where no condition says it."""
        mask = (self.cond or {}).get("mask")
        if mask is None or rows % len(mask):  # a stream of systems: no noise of states comes from it
            return None
        like = torch.empty(len(mask), *self.event_shape, dtype=self.dtype, device=self.device)
        return repeat_rows(mask_over(mask, like).expand_as(like), rows // len(mask))

    def noise(self, name: str, rows: int) -> Tensor:
        """Standard normals for ``rows`` states: (rows, *event)."""
        return randn((rows, *self.event_shape), self.stream(name, rows=rows), self.dtype, self.device)

    def start(self, t: float, rows: int) -> Tensor:
        """States to start from at t: noise, or what a model with ``start(t, noise, seeds)`` makes of it."""
        noise = self.noise("start", rows)
        if not hasattr(self.model, "start"):
            return noise
        begun: Tensor = self.model.start(t, noise, copy_seeds(self.seeds, rows // len(self.seeds)))
        return begun

    def cond_for(self, rows: int) -> Cond:
        """The condition of a state of so many rows."""
        if self.cond is None:
            return None
        return repeat_cond(self.cond, rows // len(next(iter(self.cond.values()))))

    def drift(self, t: Time, x: Tensor) -> Tensor:
        """b_t(x), under the condition of the state's rows."""
        return self.metered.drift(t, x, self.cond_for(len(x)))

    def denoise(self, t: float, x: Tensor, drift: Tensor) -> Tensor:
        """D_t(x), from a drift that is known already."""
        return self.path.to_denoise(t, x, drift, "drift")

    def score_of(self, x: Tensor) -> Tensor:
        """r(x), counted: (rows,)."""
        return self.reward(x, self.cond_for(len(x)))

    def shift_per_gradient(self, t: float) -> float:
        """α²/β, the factor in D* − D = (α²/β) ∇V."""
        return float(self.path.alpha(t)) ** 2 / float(self.path.beta(t))

    def open_posterior(self, posterior: Callable[[Any], Any] | None, map_steps: int = 1) -> None:
        """Draw from ``posterior(model)``, or where it is None from the model, in ``map_steps`` jumps of a map."""
        if posterior is None:
            self.posterior = self.metered.posterior(map_steps)
        else:
            self.posterior = posterior(self.metered)
            if not callable(getattr(self.posterior, "draw", None)):
                raise InputError(
                    f"posterior={getattr(posterior, '__name__', posterior)} must make an object with "
                    "draw(t, x_t, num_draws, generator=None, cond=None)"
                )

    def draws(self, t: Time, x: Tensor, options: DrawOptions) -> Draws:
        """Draws at (t, x) with their rewards and, in the units of a shift, their gradients (t a float, then)."""
        if self.posterior is None:
            raise InputError("this method draws and has opened no posterior: begin with problem.open_posterior(None)")
        noise = self.stream("draws", rows=len(x))
        made = make_draws(self.posterior, self.reward, t, x, options, noise, self.cond_for(len(x)))
        if made.gradients is None:
            return made
        return made._replace(gradients=self.shift_per_gradient(float(t)) * made.gradients)


class MeteredModel:
    """A model whose evaluations are counted: what posteriors of other people's making are called with.

    A map's network is watched by hooks; a model whose evaluations cannot be watched is counted by the rows that come
    back.
    """

    def __init__(self, model: Any, meter: Meter) -> None:
        self.model, self.path, self.event_shape = model, model.path, tuple(model.event_shape)
        self.pathwise = getattr(model, "pathwise", True)
        drift, self._meter = _needed(model, "drift"), meter
        watched = model.network if isinstance(model, MetaFlowMap) else getattr(model, "metered", None)
        self._watched = isinstance(watched, nn.Module)
        if isinstance(watched, nn.Module):  # a guided drift is two evaluations of its network
            meter.watch(watched)
        self._drift = drift if self._watched else meter.counted(drift, "forwards", "backwards")
        if not isinstance(model, MetaFlowMap) and hasattr(model, "push"):
            self.push = model.push if self._watched else meter.counted(model.push, "forwards", "backwards")
        if hasattr(model, "jump"):
            self.jump = model.jump if self._watched else meter.counted(model.jump, "forwards", "backwards")

    def posterior(self, map_steps: int = 1) -> Any:
        """What the model itself draws from; refused by name where it does not draw."""
        if isinstance(self.model, MetaFlowMap):
            return MapPosterior(self.model, map_steps)
        if hasattr(self, "jump"):
            return WeightedPosterior(self, steps=map_steps)
        if map_steps != 1:
            raise InputError("map_steps belongs to a MetaFlowMap; this model draws in its own way")
        if not hasattr(self.model, "draw"):
            raise InputError(
                "this method draws from the posterior and the model has no draw(t, x_t, num_draws, ...): use "
                "mfm.Glass() (it needs the drift alone), mfm.DPS(), mfm.TDS() or mfm.BestOfN()"
            )
        return self

    def drift(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """b_t(x) under a condition for each row: (rows, *event)."""
        times = batch_time(t, x)
        out: Tensor = self._drift(times, x) if cond is None else self._drift(times, x, cond)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(f"the model's drift must return a tensor of shape {tuple(x.shape)}, got {given}")
        return out.to(x.dtype)

    def draw(
        self, t: Any, x_t: Tensor, num_draws: int, generator: torch.Generator | None = None, cond: Cond = None
    ) -> Tensor:
        """The model's own draws: one evaluation each, as far as the meter can see."""

        def rows() -> Tensor:
            out: Tensor = self.model.draw(t, x_t, num_draws, generator=generator, cond=cond)
            if not isinstance(out, Tensor) or out.shape != (num_draws, *x_t.shape):
                given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise InputError(
                    f"the model's draw must return a tensor of shape {(num_draws, *x_t.shape)}, got {given}"
                )
            return out.flatten(0, 1)

        counted = rows if self._watched else self._meter.counted(rows, "forwards", "backwards")
        return counted().reshape(num_draws, *x_t.shape)


class _CountedReward:
    """A checked reward whose calls and backward passes are counted."""

    def __init__(self, checked: CheckedReward, meter: Meter) -> None:
        self.reward, self.differentiable = checked, checked.differentiable
        self._call: Callable[..., Tensor] = meter.counted(checked, "reward_calls", "reward_backwards")

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        mask = (cond or {}).get("mask")
        return self._call(x if mask is None else x * mask_over(mask, x), cond)


def device_of(model: Any) -> torch.device:
    """Where a model lives: its device, that of its parameters, or the CPU."""
    given = getattr(model, "device", None)
    if given is None:
        first = _first_parameter(model)
        given = None if first is None else first.device
    return torch.device(given or "cpu")


def dtype_of(model: Any) -> torch.dtype:
    """A model's dtype, that of its parameters, or the default."""
    given: torch.dtype | None = getattr(model, "dtype", None)
    if given is not None:
        return given
    first = _first_parameter(model)
    return torch.get_default_dtype() if first is None else first.dtype


def _first_parameter(model: Any) -> Tensor | None:
    return next(model.parameters(), None) if isinstance(model, nn.Module) else None


def _needed(model: Any, name: str) -> Any:
    if not hasattr(model, name):
        raise InputError(
            f"a model to steer needs path, event_shape and drift(t, x, cond=None); {type(model).__name__} has no {name}"
        )
    return getattr(model, name)
