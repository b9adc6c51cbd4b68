r"""How good is V̂ from one-step draws on images? Against rollouts: 200 particles of a 200-step SDE at each state.

States are held-out images noised to t. The rollouts of the map's own drift draw from its posterior with little error
(:class:`metaflowmaps.posterior.RolloutPosterior`), so V from them is the reference; its own Monte-Carlo error is
measured by a second, independent set, and no estimate can correlate with the first better than the second does.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from metaflowmaps._shapes import Cond
from metaflowmaps.cost import Meter
from metaflowmaps.lab.evaluate.draws import DrawsConfig, DrawsPosterior, pearson, posteriors, rmse, steps_of, title_of
from metaflowmaps.lab.evaluate.images.experiment import Cells, Drawn, ImageExperiment
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward
from metaflowmaps.lab.evaluate.images.setup import LATENT_BATCH, ImageEvalConfig, ImageSetup, Say, TableRows, table
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.posterior import Posterior, RolloutPosterior
from metaflowmaps.random import randn, stream
from metaflowmaps.value import GradientFree, value_gradient
from metaflowmaps.work.shards import Shard

CHUNK = 32  # draws a state at a time
ByDraws = dict[str, dict[str, dict[str, float]]]  # number of draws -> time -> {pearson, rmse}


class ImageValueConfig(DrawsConfig, ImageEvalConfig):
    """Which states, which reward, how many draws."""

    states: int = Field(64, ge=3)
    num_draws: tuple[PositiveInt, ...] = Field((1, 4, 16, 64, 200), min_length=1)
    rollout_steps: int = Field(200, ge=1)
    rollout_particles: int = Field(200, ge=2)
    reward: str = "margin"
    strength: float = Field(0.2, gt=0)

    def calls(self) -> int:
        """Evaluations of the map's network: two sets of rollouts, and every estimate."""
        rollouts = 2 * self.rollout_particles * self.rollout_steps
        draws = sum(self.num_draws) * sum((*self.map_steps, *self.glass_steps))
        return len(self.times) * self.states * (rollouts + draws)


class NoisyStates(NamedTuple):
    """Held-out images at time t, what the map is told of them, and draws of each at a time."""

    t: float
    x_t: Tensor
    cond: Cond = None
    chunk: int = CHUNK


@dataclass(frozen=True)
class Estimated:
    """The error of each sampler's estimates, and of a second set of rollouts."""

    config: ImageValueConfig
    by_sampler: dict[str, ByDraws]
    rollout: ByDraws
    seconds: dict[str, float]  # a draw, by sampler
    value_std: dict[str, float]  # of the reference over the states, by time
    extras: Json

    @cached_property
    def metrics(self) -> Json:
        """metrics.by_sampler[name][num_draws][t] = {pearson, rmse}; rollout: the second reference."""
        config, most = self.config, max(self.config.num_draws)
        return {
            "by_sampler": {**self.by_sampler, "rollout": self.rollout},
            "seconds_per_draw": self.seconds,
            "value_std": self.value_std,
            "reward": config.reward,
            **self.extras,
            "tables": {
                f"Value of the reward {config.reward}, {most} draws, against rollouts": self._errors(str(most)),
                "Pearson r by number of draws": self._few_draws(),
            },
            "summary": f"The value from posterior draws against {config.rollout_particles} rollouts of "
            f"{config.rollout_steps} steps at {config.states} noised held-out images a time.",
        }

    def _errors(self, most: str) -> TableRows:
        """Every sampler with as many draws as there are, and the rollouts beside them."""
        rows: list[list[object]] = []
        for name, by_draws in self.by_sampler.items():
            rows.append([title_of(name), steps_of(name), *_in_a_row(by_draws[most])])
        again = self.rollout[str(self.config.rollout_particles)]
        rows.append(["rollouts again", self.config.rollout_steps, *_in_a_row(again)])
        columns = [f"{what}, t = {t:g}" for what in ("r", "RMSE") for t in self.config.times]
        return table(["sampler", "calls a draw", *columns], rows)

    def _few_draws(self) -> TableRows:
        chosen = ("map-1", f"glass-{max(self.config.glass_steps, default=0)}")
        rows = [
            [title_of(name), int(n), *(at["pearson"] for at in by_time.values())]
            for name, by_draws in self.by_sampler.items()
            if name in chosen
            for n, by_time in by_draws.items()
        ]
        return table(["sampler", "draws", *(f"t = {t:g}" for t in self.config.times)], rows)


def _in_a_row(by_time: dict[str, dict[str, float]]) -> list[float]:
    return [at[what] for what in ("pearson", "rmse") for at in by_time.values()]


class ImageValue(ImageExperiment[ImageValueConfig, Estimated]):
    """V̂ of map and GLASS at noised held-out images, and V of rollouts."""

    def __init__(self, setup: ImageSetup, config: ImageValueConfig, say: Say = lambda line: None) -> None:
        super().__init__(setup, config, say)
        self.reward: Any = image_reward(setup, config.reward, config.strength)

    @cached_property
    def samplers(self) -> dict[str, DrawsPosterior]:
        """Whose draws V̂ is made of, by name."""
        return posteriors(self.setup.model, self.config)

    def cells(self) -> Cells:
        times = self.config.times
        rollouts = {f"{t!r}.rollout": partial(self._rollouts, t) for t in times}
        return rollouts | {f"{t!r}.{name}": partial(self._estimates, t, name) for t in times for name in self.samplers}

    def judge(self, drawn: Drawn) -> Estimated:
        config, numbers = self.config, [str(n) for n in self.config.num_draws]
        errors: dict[str, ByDraws] = {name: {n: {} for n in numbers} for name in self.samplers}
        rollout: ByDraws = {str(config.rollout_particles): {}}
        seconds, spread = {}, {}
        for t in config.times:
            truth, again = drawn(f"{t!r}.rollout").tensors["values"].cpu()
            spread[repr(t)] = float(truth.std())
            rollout[str(config.rollout_particles)][repr(t)] = _error(again, truth)
            for name in self.samplers:
                made = drawn(f"{t!r}.{name}")
                seconds[name] = made.facts["seconds"]
                for n, estimate in zip(numbers, made.tensors["values"].cpu(), strict=True):
                    errors[name][n][repr(t)] = _error(estimate, truth)
        return Estimated(config, errors, rollout, seconds, spread, self.setup.extras())

    def _states(self, t: float) -> tuple[NoisyStates, torch.Generator]:
        """The states, and the generator that goes on with the rollouts from there."""
        setup, states, seed = self.setup, self.config.states, self.config.seed
        x_1, _ = setup.images(states, "value", seed)
        g = stream(seed, "value", repr(t))
        x_t = setup.model.path.interpolate(randn(tuple(x_1.shape), g, device=x_1.device), x_1, t)
        chunk = max(1, LATENT_BATCH // len(x_t)) if setup.latent else CHUNK
        return NoisyStates(t, x_t, setup.cond_of_images(states, "value", seed), chunk), g

    @torch.no_grad()
    def _rollouts(self, t: float) -> Shard:
        """The reference and a second one: (2, states)."""
        config, model = self.config, self.setup.model
        count = 2 * config.states * config.rollout_particles
        self.say(f"t = {t:g}: {count:,} rollouts of {config.rollout_steps} steps")
        rollout = RolloutPosterior(model.path, model.drift, config.rollout_steps)
        states, g = self._states(t)
        with self.setup.autocast():
            values = [estimate(rollout, self.reward, states, config.rollout_particles, g) for _ in range(2)]
        return Shard({"values": torch.stack(values)}, {})

    @torch.no_grad()
    def _estimates(self, t: float, name: str) -> Shard:
        """V̂ by number of draws, (num_draws, states), and the seconds a draw took."""
        config, values = self.config, []
        states, _ = self._states(t)
        with Meter(self.setup.model.network) as meter, self.setup.autocast():
            for n in config.num_draws:
                g = stream(config.seed, "value", name, n, repr(t))
                values.append(estimate(self.samplers[name], self.reward, states, n, g))
        return Shard(
            {"values": torch.stack(values)}, {"seconds": meter.seconds / (config.states * sum(config.num_draws))}
        )


def estimate(posterior: Posterior, reward: Any, states: NoisyStates, n: int, g: torch.Generator) -> Tensor:
    """V̂ at these states from n draws each: (states,)."""
    how = GradientFree(chunk=states.chunk)
    return value_gradient(posterior, reward, states.t, states.x_t, n, how, g, states.cond).value.double().cpu()


def _error(estimate: Tensor, truth: Tensor) -> dict[str, float]:
    return {"pearson": pearson(estimate, truth), "rmse": rmse(estimate, truth)}
