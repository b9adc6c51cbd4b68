"""Sample with a reward; samples.safetensors holds samples, rewards and seeds.

Options of the method and of the process: --set method.recycle=8 --set process.grid=power.
"""

import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps._files import write_tensors
from metaflowmaps.cli.context import Context, Results
from metaflowmaps.cli.drawing import Drawing, draw, usual_size
from metaflowmaps.cli.results import Request
from metaflowmaps.cli.sample_pictures import DrawingOptions, PictureWriter
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.lab.figures import plots, result_figures, steering_figures
from metaflowmaps.lab.named_rewards import REWARD_HELP, ChosenReward, choose_reward
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.posterior import ExactModel
from metaflowmaps.random import fresh_seeds, stream
from metaflowmaps.rewards.base import rows_of
from metaflowmaps.steering import PRESETS, USUAL, Method, Process, SteeringFailed, SteerResult, log_normaliser
from metaflowmaps.steering import steer as steered
from metaflowmaps.work.choices import Pick, built, dumped
from metaflowmaps.work.shards import Shard, ShardInterrupted, Share

DECODED = 8  # samples at a time, and a shard, where a gradient may go through a decoder


class Steer(DrawingOptions):
    """The reward, the method and the process."""

    reward: str | None = Field(None, description=REWARD_HELP)
    strength: float = Field(1.0, description="λ: the reward is multiplied by it.")
    num: int | None = Field(None, ge=1, description="How many samples (1024).")
    preset: str | None = Field(None, description=f"Method and process that go together: {', '.join(PRESETS)}.")
    method: Annotated[Method, Pick(Method)] = Field(USUAL.method, description="How the drift is steered.")
    num_draws: int | None = Field(None, ge=1, description="Posterior draws a step, method.num_draws.")
    process: Annotated[Process, Pick(Process)] = Field(USUAL.process, description="What moves the state.")
    steps: int | None = Field(None, ge=1, description="Steps of the time grid, process.steps.")
    batch_size: int | None = Field(None, ge=1, description="Rows of state at a time.")
    data: str | None = Field(None, description="Where the images are now that some rewards are made of.")

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, given: Any) -> Any:
        """What is not said is the preset's, or, of a method without one, the process that it prefers."""
        if not isinstance(given, Mapping):
            return given
        name, method = given.get("preset"), given.get("method")
        if name is not None:
            if name not in PRESETS:
                raise unknown("preset", name, PRESETS)
            return {**PRESETS[name]._asdict(), **given}
        return given if method is None else {"process": built(Method, method).usual(), **given}

    def choices(self) -> tuple[Method, Process]:
        """The method and the process, with the options that have a name of their own."""
        method = self.method if self.num_draws is None else self.method.with_draws(self.num_draws)
        process = self.process if self.steps is None else replace(self.process, steps=self.steps)
        method.check(process)
        return method, process


class Steering:
    """One request: who is steered by what, and how the work is cut."""

    def __init__(self, config: Steer, context: Context) -> None:
        self.config, self.context, self.seed = config, context, context.seed or 0
        self.method, self.process = config.choices()
        self.num = _count(config, self.method)
        self.opened = OpenedModel.open(config.checkpoint, context.device, needs_map=self.method.draws)
        self.pictures = PictureWriter(self.opened, config, self.num)
        self.chosen: ChosenReward = choose_reward(config.reward, self.opened, config.strength, config.data)
        self.reward = self.pictures.on_samples(self.chosen.reward)
        law = self.opened.law
        if self.method.exact and law is None:
            raise InputError(
                "--method exact needs a checkpoint of a known mixture (recipes gmm, mixture-16d); use --method mfm-gf"
            )
        self.model: Any = self.opened.model
        if self.method.exact and law is not None:
            self.model = ExactModel(self.model.path, law)
        self.unit, self.size = self._cut()
        self.seeds = torch.tensor(config.only) if config.only else None
        if self.seeds is None and self.unit:
            self.seeds = fresh_seeds(self.num // self.unit, stream(self.seed, "steer"))
        self.warned = WarnOnce()

    def identity(self) -> Results:
        """What tells it from others."""
        return self.pictures.identity(
            preset=None,
            num=self.num,
            seed=self.seed,
            method=dumped(self.method),
            num_draws=self.method.shown_draws,
            process=dumped(self.process),
            steps=self.process.steps,
            reward=self.chosen.name,
            reward_sha256=self.chosen.sha256,
        )

    def calls(self) -> float:
        """Evaluations of the network, by the paper's count."""
        return self.num * self.process.steps * self.method.calls_per_step

    def make(self, part: slice) -> Shard:
        """The samples of a range."""
        n, seeds = part.stop - part.start, self.seeds
        if seeds is not None and self.unit:
            seeds = seeds[part.start // self.unit : part.stop // self.unit]
        rows = self.config.batch_size or (DECODED * self.method.copies if self.pictures.latent else None)
        try:
            with self.warned, self.pictures.autocast():
                result = steered(
                    self.model,
                    self.reward,
                    n,
                    self.method,
                    self.process,
                    cond=self.pictures.rows(part),
                    seed=stream(self.seed, "steer") if seeds is None else seeds,
                    batch_size=rows,
                    progress=n == self.num and sys.stderr.isatty(),
                )
        except SteeringFailed as failed:
            raise ShardInterrupted(_as_shard(failed.result), failed) from None
        if result.interrupted:
            raise ShardInterrupted(_as_shard(result), KeyboardInterrupt())
        return _as_shard(result)

    def _cut(self) -> tuple[int, int]:
        """Samples of a seed (0: not to be cut) and samples a shard; work that cannot be shared is refused."""
        share, method, model = self.context.share, self.method, self.opened.model
        one = torch.zeros(1, *model.event_shape, dtype=model.dtype, device=self.opened.device)
        if rows_of(self.reward, one) is not None:
            return 0, _whole(self.num, share, "the reward holds one observation a sample, so it", "leave them out")
        system = method.system
        if system is None:
            what = f"all samples of {method.name} are one system of particles, which"
            return 0, _whole(self.num, share, what, "say how large a system is, as --set method.particles=64")
        if self.num % system:
            raise InputError(
                f"--num must be a multiple of particles ({system}), got {self.num}: whole systems are returned"
            )
        if share.size is not None and share.size % system:
            raise InputError(
                f"--shard-size must be a multiple of particles ({system}), got {share.size}: a shard is a whole "
                "number of systems"
            )
        size = usual_size(share, system, method.copies)
        decoded = self.pictures.latent and system == 1 and share.size is None
        return system, min(size, DECODED) if decoded else size


def run(config: Steer, context: Context) -> Results:
    """Steered samples of a checkpoint, with their rewards and costs."""
    steering = Steering(config, context)
    opened = steering.opened
    if context.dry_run:
        return context.plan("steer", steering.identity(), opened.cost_of(steering.calls()))
    request = Request(context, "steer", steering.identity(), opened.beside(f"steer-{steering.method.name}"))

    def keep(drawn: dict[str, Tensor]) -> None:
        kept = {name: drawn[name] for name in ("samples", "rewards", "seeds")}
        write_tensors(request.out / "samples.safetensors", kept)

    def finish(made: Shard) -> Results:
        keep(made.tensors)
        result = _as_result(made)
        _draw(request, steering, result)
        rewards, info = result.rewards.double(), result.info
        metrics: Results = {
            "num": steering.num,
            "reward_mean": float(rewards.mean()),
            "reward_std": float(rewards.std()) if steering.num > 1 else 0.0,
            "reward_max": float(rewards.max()),
            **{name: float(info[name].double().mean()) for name in ("ess", "base_ess") if name in info},
        }
        if "log_evidence" in info:
            metrics["log_evidence"] = log_normaliser(result)
        if opened.is_pictorial:
            metrics["captions"] = result_figures.CAPTIONS["steer"]
        return request.write(metrics, result.cost, opened.device)

    return draw(request, Drawing(steering.num, steering.size, steering.make, finish, keep))


def _count(config: Steer, method: Method) -> int:
    """How many samples; a seed of ``only`` may stand for a whole system of particles."""
    if not config.only:
        return config.count(config.num)
    if method.system is None:
        raise InputError(
            f"--only makes a whole particle system of {method.name} again: say how many samples had its seed, as "
            "--set method.particles=64"
        )
    if config.num is not None and config.num != len(config.only) * method.system:
        return config.count(config.num)
    return config.count(None) * method.system


def _whole(num: int, share: Share, what: str, fix: str) -> int:
    """All samples in one shard; several are refused."""
    if share.size is not None or (share.worker is not None and share.worker.count > 1):
        raise InputError(f"{what} cannot be cut into shards by --worker and --shard-size: {fix}")
    return num


def _draw(request: Request, steering: Steering, result: SteerResult) -> None:
    """The figures."""
    opened, out, pictures = steering.opened, request.out, steering.pictures
    cost, name = f"{result.cost['nfe']:,.0f} evaluations each", steering.method.name
    if opened.is_planar:
        known, law = steering.chosen.known, opened.law
        tilted = None if known is None or law is None else law.tilt(known)
        title = f"{name}, {steering.num} samples, {cost}"
        plots.save(plots.scatter(result.samples, title, tilted), out / "samples.png")
    elif opened.is_pictorial:
        title = f"{name} for the reward {steering.chosen.name}, {cost}"
        shown = pictures.shown(result.samples[: result_figures.GRID])
        result_figures.samples_grid(shown, title, out / "samples.png")
        pictures.write(result.samples, out)
    if len(result.info["time"]) > 1 and "ess" in result.info:
        kept = [k for k in ("time", "ess", "gradient_norm") if k in result.info]
        curves: dict[str, list[float]] = {k: result.info[k].tolist() for k in kept}
        plots.save(steering_figures.trajectory({name: curves}), out / "trajectory.png")


class WarnOnce:
    """``with once: …`` for each shard: what one of them has warned of, the others do not repeat."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __enter__(self) -> None:
        self._caught = warnings.catch_warnings(record=True)
        self._list: Any = self._caught.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._caught.__exit__(kind, error, trace)
        for warning in self._list:
            text = re.sub(r"\d+", "", str(warning.message))  # whatever their numbers
            if text not in self._seen:
                self._seen.add(text)
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _as_shard(result: SteerResult) -> Shard:
    """A shard of steered samples: rows, means over rows, and what there is one of for each system."""
    tensors = {"samples": result.samples, "rewards": result.rewards, "seeds": result.seeds}
    for name, value in result.info.items():
        if name != "nonfinite":
            tensors[f"each.{name}" if name == "log_evidence" else f"mean.{name}"] = value
    cost = {name: value for name, value in result.cost.items() if name != "nfe"}
    return Shard(tensors, {"cost": cost, "rows": len(result.samples)})


def _as_result(made: Shard) -> SteerResult:
    """The run that the shards are of."""
    rows = made.tensors
    info = {name.partition(".")[2]: value for name, value in rows.items() if "." in name}
    cost, calls = dict(made.facts["cost"]), ("forwards", "backwards", "reward_calls", "reward_backwards")
    nfe = sum(cost[name] for name in calls) / max(1, len(rows["samples"]))
    return SteerResult(rows["samples"], rows["rewards"], rows["seeds"], {**cost, "nfe": nfe}, info)
