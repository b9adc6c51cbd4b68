r"""How good is V̂ from one-step draws on images? Against rollouts: 200 particles of a 200-step SDE at each state.

States are held-out images noised to t. The rollouts of the map's own drift draw from its posterior with little error
(:class:`metaflowmaps.posterior.RolloutPosterior`), so V from them is the reference; its own Monte-Carlo error is
measured by a second, independent set, and no estimate can correlate with the first better than the second does.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps._shapes import Cond
from metaflowmaps.lab.evaluate.draws import pearson
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward
from metaflowmaps.lab.evaluate.images.setup import LATENT_BATCH, ImageEvalConfig, ImageSetup, Say, Timed, table
from metaflowmaps.posterior import GlassPosterior, MapPosterior, RolloutPosterior
from metaflowmaps.random import randn, stream
from metaflowmaps.value import GradientFree, value_gradient
from metaflowmaps.work.shards import Shard

CHUNK = 32  # draws a state at a time


class ImageValueConfig(ImageEvalConfig):
    """Which states, which reward, how many draws."""

    states: int = Field(64, ge=3)
    times: tuple[float, ...] = Field((0.1, 0.2, 0.5, 0.8), min_length=1)
    num_draws: tuple[int, ...] = Field((1, 4, 16, 64, 200), min_length=1)
    map_steps: tuple[int, ...] = (1, 2, 4)
    glass_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rollout_steps: int = Field(200, ge=1)
    rollout_particles: int = Field(200, ge=2)
    reward: str = "margin"
    strength: float = Field(0.2, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> "ImageValueConfig":
        if any(not 0 <= t < 1 for t in self.times):
            raise ValueError("times must lie in [0, 1): at t = 1 the value is the reward")
        if not (self.map_steps or self.glass_steps):
            raise ValueError("give map_steps or glass_steps: there is nothing to judge")
        if min((*self.map_steps, *self.glass_steps, *self.num_draws)) < 1:
            raise ValueError("steps and num_draws must be at least 1")
        return self

    def calls(self) -> int:
        """Evaluations of the map's network: two sets of rollouts, and every estimate."""
        rollouts = 2 * self.rollout_particles * self.rollout_steps
        draws = sum(self.num_draws) * sum((*self.map_steps, *self.glass_steps))
        return len(self.times) * self.states * (rollouts + draws)


@torch.no_grad()
def evaluate_image_value(setup: ImageSetup, config: ImageValueConfig, say: Say = lambda line: None) -> dict[str, Any]:
    """metrics.by_sampler[name][num_draws][t] = {pearson, rmse}, with calls a draw; rollout: the second reference."""
    model, reward = setup.model, image_reward(setup, config.reward, config.strength)
    posteriors: dict[str, Any] = {f"map-{k}": MapPosterior(model, k) for k in config.map_steps}
    for k in config.glass_steps:
        posteriors[f"glass-{k}"] = GlassPosterior(model.path, model.drift, k)
    drawn = setup.share(
        {f"{t!r}.rollout": _rollouts(setup, reward, config, t, say) for t in config.times}
        | {
            f"{t!r}.{name}": _estimates(setup, reward, config, t, name, posterior)
            for t in config.times
            for name, posterior in posteriors.items()
        }
    )
    cells: dict[str, Any] = {name: {str(n): {} for n in config.num_draws} for name in posteriors}
    cells["rollout"] = {str(config.rollout_particles): {}}
    seconds, spread = {}, {}
    for t in config.times:
        truth, again = drawn(f"{t!r}.rollout").tensors["values"].cpu()
        spread[repr(t)] = float(truth.std())
        cells["rollout"][str(config.rollout_particles)][repr(t)] = _against(again, truth)
        for name in posteriors:
            made = drawn(f"{t!r}.{name}")
            for n, estimate in zip(config.num_draws, made.tensors["values"].cpu(), strict=True):
                cells[name][str(n)][repr(t)] = _against(estimate, truth)
            seconds[name] = made.facts["seconds"]
    metrics = {"by_sampler": cells, "seconds_per_draw": seconds, "value_std": spread, "reward": config.reward}
    metrics |= setup.extras()
    return {**metrics, **_words(cells, config)}


def _states(setup: ImageSetup, config: ImageValueConfig, t: float) -> tuple[Tensor, torch.Generator, dict[str, Any]]:
    """Held-out images noised to t, the generator that goes on with the rollouts from there, and how to draw."""
    x_1, _ = setup.images(config.states, "value", config.seed)
    g = stream(config.seed, "value", repr(t))
    x_t = setup.model.path.interpolate(randn(tuple(x_1.shape), g, device=x_1.device), x_1, t)
    cond = setup.cond(setup.told_of(config.states, "value", config.seed), config.states)
    return x_t, g, {"cond": cond, "chunk": max(1, LATENT_BATCH // len(x_t)) if setup.latent else CHUNK}


def _rollouts(setup: ImageSetup, reward: Any, config: ImageValueConfig, t: float, say: Say) -> Callable[[], Shard]:
    """The reference and a second one: (2, states)."""

    @torch.no_grad()
    def make() -> Shard:
        say(f"t = {t:g}: {2 * config.states * config.rollout_particles:,} rollouts of {config.rollout_steps} steps")
        rollout = RolloutPosterior(setup.model.path, setup.model.drift, config.rollout_steps)
        x_t, g, how = _states(setup, config, t)
        with setup.autocast():
            values = [_value(rollout, reward, t, x_t, config.rollout_particles, g, **how) for _ in range(2)]
        return Shard({"values": torch.stack(values)}, {})

    return make


def _estimates(
    setup: ImageSetup, reward: Any, config: ImageValueConfig, t: float, name: str, posterior: Any
) -> Callable[[], Shard]:
    """V̂ by number of draws, (num_draws, states), and the seconds a draw took."""

    @torch.no_grad()
    def make() -> Shard:
        x_t, _, how = _states(setup, config, t)
        with Timed(setup.model) as timed, setup.autocast():
            values = [
                _value(posterior, reward, t, x_t, n, stream(config.seed, "value", name, n, repr(t)), **how)
                for n in config.num_draws
            ]
        seconds = timed.cost(config.states * sum(config.num_draws))["seconds"]
        return Shard({"values": torch.stack(values)}, {"seconds": seconds})

    return make


def _value(
    posterior: Any,
    reward: Any,
    t: float,
    x_t: Tensor,
    n: int,
    g: torch.Generator,
    cond: Cond = None,
    chunk: int = CHUNK,
) -> Tensor:
    return value_gradient(posterior, reward, t, x_t, n, GradientFree(chunk=chunk), g, cond).value.double().cpu()


def _against(estimate: Tensor, truth: Tensor) -> dict[str, float]:
    return {"pearson": pearson(estimate, truth), "rmse": float((estimate - truth).square().mean().sqrt())}


def _words(cells: dict[str, Any], config: ImageValueConfig) -> dict[str, Any]:
    times = [repr(t) for t in config.times]
    most = str(max(config.num_draws))
    rows = [
        [
            _title(name),
            int(name.rpartition("-")[2]),
            *(cells[name][most][t]["pearson"] for t in times),
            *(cells[name][most][t]["rmse"] for t in times),
        ]
        for name in cells
        if name != "rollout"
    ]
    own = cells["rollout"][str(config.rollout_particles)]
    rows.append(
        ["rollouts again", config.rollout_steps, *(own[t]["pearson"] for t in times), *(own[t]["rmse"] for t in times)]
    )
    head = [
        "sampler",
        "calls a draw",
        *(f"r, t = {float(t):g}" for t in times),
        *(f"RMSE, t = {float(t):g}" for t in times),
    ]
    few = [
        [_title(name), int(n), *(cells[name][n][t]["pearson"] for t in times)]
        for name in cells
        if name in ("map-1", f"glass-{max(config.glass_steps, default=0)}")
        for n in cells[name]
    ]
    return {
        "tables": {
            f"Value of the reward {config.reward}, {most} draws, against rollouts": table(head, rows),
            "Pearson r by number of draws": table(["sampler", "draws", *(f"t = {float(t):g}" for t in times)], few),
        },
        "summary": f"The value from posterior draws against {config.rollout_particles} rollouts of "
        f"{config.rollout_steps} steps at {config.states} noised held-out images a time.",
    }


def _title(name: str) -> str:
    kind, _, steps = name.rpartition("-")
    return f"{'map' if kind == 'map' else 'GLASS'}, {steps} steps"
