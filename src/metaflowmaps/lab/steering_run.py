"""Steering a checkpoint's map as a request: who is steered by what, how the work is cut, and its figures."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.lab.figures import plots, result_figures, steering_figures
from metaflowmaps.lab.named_rewards import ChosenReward
from metaflowmaps.lab.results import Course
from metaflowmaps.lab.sample_pictures import SamplePictures
from metaflowmaps.posterior import ExactModel
from metaflowmaps.random import fresh_seeds, stream
from metaflowmaps.rewards.base import rows_of
from metaflowmaps.steering import Method, Process, SteeringFailed, SteerResult, Step, log_normaliser, steer
from metaflowmaps.work.shards import Shard, ShardInterrupted, Share

DECODED = 8  # samples at a time, and a shard, where a gradient may go through a decoder
PROBE_STEPS = (2, 6)  # of an estimate: what is the same for any number of steps, and what is not
PROBE_SECONDS = 2  # that its longer part takes at least, where there are samples enough: few rows cost as much as one
CALLS = ("forwards", "backwards", "reward_calls", "reward_backwards")


@dataclass(frozen=True)
class SteeringRun:
    """Samples of a map that are steered.

    Args:
        pictures: the map, and what its samples are told.
        chosen: the reward, on pictures where samples are latents.
        method: how the drift is steered.
        process: what moves the state.
        seed: of all samples.
        only: saved seeds, whose samples are made again; none: fresh ones.
        batch_size: rows of state at a time.
        callback: is told of every step, in place of a bar.
    """

    pictures: SamplePictures
    chosen: ChosenReward
    method: Method
    process: Process
    seed: int
    only: tuple[int, ...] = ()
    batch_size: int | None = None
    callback: Callable[[Step], Any] | None = None

    @cached_property
    def reward(self) -> Any:
        """The reward on samples."""
        return self.pictures.on_samples(self.chosen.reward)

    def __post_init__(self) -> None:
        if self.method.exact and self.pictures.opened.law is None:
            raise InputError(
                "--method exact needs a checkpoint of a known mixture (recipes gmm, mixture-16d); use --method mfm-gf"
            )

    @property
    def model(self) -> Any:
        """The map; of the exact method, the mixture that it was trained on."""
        model, law = self.pictures.opened.model, self.pictures.opened.law
        return ExactModel(model.path, law) if self.method.exact and law is not None else model

    @cached_property
    def observed(self) -> bool:
        """Does the reward hold one observation a sample?"""
        model = self.pictures.opened.model
        one = torch.zeros(1, *model.event_shape, dtype=model.dtype, device=model.device)
        return rows_of(self.reward, one) is not None

    @property
    def unit(self) -> int:
        """Samples of a seed; 0 where one seed is of them all, and they cannot be cut."""
        return 0 if self.observed else self.method.system or 0

    @cached_property
    def seeds(self) -> Tensor | None:
        """One a unit; None where there is one of them all."""
        if self.only:
            return torch.tensor(self.only)
        return fresh_seeds(self.pictures.num // self.unit, stream(self.seed, "steer")) if self.unit else None

    def size(self, share: Share) -> int:
        """Samples a shard; work that cannot be shared as it is asked for is refused."""
        num, unit = self.pictures.num, self.unit
        if not unit:
            if share.size is not None or (share.worker is not None and share.worker.count > 1):
                what = f"all samples of {self.method.name} are one system of particles, which"
                fix = "say how large a system is, as --set method.particles=64"
                if self.observed:
                    what, fix = "the reward holds one observation a sample, so it", "leave them out"
                raise InputError(f"{what} cannot be cut into shards by --worker and --shard-size: {fix}")
            return num
        if num % unit:
            raise InputError(f"--num must be a multiple of particles ({unit}), got {num}: whole systems are returned")
        if share.size is not None and share.size % unit:
            raise InputError(
                f"--shard-size must be a multiple of particles ({unit}), got {share.size}: a shard is a whole "
                "number of systems"
            )
        decoded = self.pictures.latent and unit == 1 and share.size is None
        size = share.usual_size(unit, self.method.copies)
        return min(size, DECODED) if decoded else size

    def make(self, part: slice) -> Shard:
        """The samples of a range."""
        n, seeds = part.stop - part.start, self.seeds
        if seeds is not None and self.unit:
            seeds = seeds[part.start // self.unit : part.stop // self.unit]
        rows = self.batch_size or (DECODED * self.method.copies if self.pictures.latent else None)
        try:
            with self.pictures.autocast():
                result = steer(
                    self.model,
                    self.reward,
                    n,
                    self.method,
                    self.process,
                    cond=self.pictures.rows(part),
                    seed=stream(self.seed, "steer") if seeds is None else seeds,
                    batch_size=rows,
                    callback=self.callback,
                    progress=self.callback is None and n == self.pictures.num,  # else shards are counted
                )
        except SteeringFailed as failed:
            raise ShardInterrupted(self._as_shard(failed.result), failed) from None
        if result.interrupted:
            raise ShardInterrupted(self._as_shard(result), KeyboardInterrupt())
        return self._as_shard(result)

    def expected_seconds(self, share: Share) -> float | None:
        """What all samples will take, by a probe of a few steps; None where so few steps lead to no sample.

        Seconds are a line in the steps, through two points, of as many samples as take ``PROBE_SECONDS``, or a shard.
        """
        num = self.pictures.num
        most = min(num, self.size(share))
        n = num if self.observed else self.unit or 1
        short, longer = (min(steps, self.process.steps) for steps in PROBE_STEPS)
        self.pictures.settle()
        try:
            self._timed(n, short)  # the first call of anything takes longer
            while (seconds := self._timed(n, longer)) < PROBE_SECONDS and n < most:
                n = min(4 * n, most)
            each = seconds / longer if short == longer else max(0.0, seconds - self._timed(n, short)) / (longer - short)
        except ShardInterrupted as stopped:
            if isinstance(stopped.cause, KeyboardInterrupt):
                raise stopped.cause from None
            return None
        return (seconds + each * (self.process.steps - longer)) * num / n

    def _timed(self, n: int, steps: int) -> float:
        """Seconds for the first samples in so many steps, whatever they are worth."""
        probe = replace(self, process=replace(self.process, steps=steps), callback=lambda step: None)
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            probe.make(slice(0, n))
        return time.perf_counter() - began

    def _as_shard(self, result: SteerResult) -> Shard:
        """A shard of steered samples: rows, means over rows, and what there is one of for each system."""
        tensors = {"samples": result.samples, "rewards": result.rewards, "seeds": result.seeds}
        for name, value in result.info.items():
            if name not in ("nonfinite", "bias"):  # of the whole batch, not of its rows
                tensors[f"each.{name}" if name in self.method.of_systems else f"mean.{name}"] = value
        cost = {name: value for name, value in result.cost.items() if name != "nfe"}
        return Shard(tensors, {"cost": cost, "rows": len(result.samples)})

    def metrics(self, result: SteerResult) -> dict[str, Any]:
        """What results say of the samples."""
        rewards, info = result.rewards.double(), result.info
        metrics: dict[str, Any] = {
            "method_title": self.method.titled(),
            "reward": self.chosen.name,
            "num": self.pictures.num,
            "reward_mean": float(rewards.mean()),
            "reward_std": float(rewards.std()) if len(rewards) > 1 else 0.0,
            "reward_max": float(rewards.max()),
            **{name: float(info[name].double().mean()) for name in ("ess", "base_ess") if name in info},
        }
        if "log_evidence" in info:
            metrics["log_evidence"] = log_normaliser(result)
        if self.pictures.opened.is_pictorial:
            metrics["captions"] = result_figures.CAPTIONS["steer"]
        return metrics

    def draw(self, result: SteerResult, out: Path) -> None:
        """The samples, and the way there."""
        name, known, law = self.method.name, self.chosen.known, self.pictures.opened.law
        title = f"{name} for the reward {self.chosen.name}, {result.cost['nfe']:,.0f} evaluations each"
        self.pictures.save(result.samples, title, None if known is None or law is None else law.tilt(known), out)
        if len(result.info["time"]) > 1 and "ess" in result.info:
            shown = [k for k in ("time", "ess", "gradient_norm") if k in result.info]
            course = Course.of({k: result.info[k].tolist() for k in shown})
            plots.save(steering_figures.trajectory({name: course}), out / "trajectory.png")


def as_result(made: Shard) -> SteerResult:
    """The run that shards, put together, are of."""
    rows = made.tensors
    info = {name.partition(".")[2]: value for name, value in rows.items() if "." in name}
    cost = dict(made.facts["cost"])
    nfe = sum(cost[name] for name in CALLS) / max(1, len(rows["samples"]))
    return SteerResult(rows["samples"], rows["rewards"], rows["seeds"], {**cost, "nfe": nfe}, info)
