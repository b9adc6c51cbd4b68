"""A map to play with: pictures, draws of the posterior, and one steering at a time that can be watched and stopped.

Its answers are plain values for a page: pictures as data URIs, seeds as text (a page cannot count to 2⁶³).
"""

import shlex
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.lab.named_rewards import choose_reward, offered_rewards
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.play.asked import KNOBS, AskedPictures, AskedPosterior, AskedSteering, Told
from metaflowmaps.lab.report.page import data_uri
from metaflowmaps.lab.sample_pictures import PictureOptions, SamplePictures
from metaflowmaps.lab.steering_run import SteeringRun, as_result
from metaflowmaps.lab.story import as_bytes
from metaflowmaps.random import RowNoise, fresh_seeds, stream
from metaflowmaps.steering import USUAL, Method, SteerResult, Step
from metaflowmaps.work.choices import build, choices, options_of
from metaflowmaps.work.shards import ShardInterrupted

Answer = dict[str, Any]
PICTURES = 12  # to choose from
REFINED = 4  # network calls a picture
WAIT_SECONDS = 10.0  # of draws for one another


class Busy(Exception):
    """Another job is running."""


@dataclass
class Job:
    """A steering: how far it is, and what came of it."""

    asked: AskedSteering
    command: str
    done: int = 0
    steps: int = 1
    state: Tensor | None = None  # (num, C, H, W) on its way
    stopped: bool = False
    error: str = ""
    notes: tuple[str, ...] = ()
    result: SteerResult | None = None
    finished: threading.Event = field(default_factory=threading.Event)

    def watch(self, step: Step) -> bool:
        """What ``steer`` calls after each step; true: stop."""
        self.done, self.steps = step.batch * step.steps + step.step + 1, step.batches * step.steps
        if step.batch == 0:
            self.state = step.state.x[: self.asked.num].detach().clone()
        return self.stopped


class Playground:
    """A map of pictures, and what a page may do with it.

    Args:
        opened: the map; its samples are pixels.
        rewards: more rewards than those that go with the map, as they are typed.
    """

    def __init__(self, opened: OpenedModel, rewards: tuple[str, ...] = ()) -> None:
        shape = tuple(opened.model.event_shape)
        if opened.latent or len(shape) != 3 or shape[0] not in (1, 3):
            raise InputError(
                f"mfm play shows maps of pixels, and {opened.name} makes {'latents' if opened.latent else shape}: "
                "mfm play digits"
            )
        self.opened, self.shape = opened, shape
        self.rewards = [*rewards, *(named.spelling for named in offered_rewards(opened))]
        self.own = len(rewards)
        for text in rewards:  # what cannot be read is said before a page is opened
            choose_reward(text, opened, 1.0)
        self.job: Job | None = None
        self._busy, self._turn = threading.Lock(), threading.Lock()

    # -- what there is ---------------------------------------------------------------------------------------------

    def about(self) -> Answer:
        """The map, its rewards and the methods."""
        pictures = self._pictures(Told(), 1)
        classes = self.opened.class_names or tuple(map(str, range(pictures.pipe.num_classes)))
        return {
            "name": self.opened.name,
            "shape": self.shape,
            "classes": classes,
            "rewards": self.rewards,
            "methods": [
                {"name": name, "title": kind.titled(), "words": kind.in_words, "options": _knobs(kind)}
                for name, kind in self._methods().items()
            ],
            "usual": {"method": USUAL.method.name, "steps": USUAL.process.steps},
        }

    def _methods(self) -> dict[str, type[Method]]:
        return {name: kind for name, kind in choices(Method).items() if not kind.exact}

    def _pictures(self, told: Told, num: int) -> SamplePictures:
        return SamplePictures(self.opened, PictureOptions(told.label or None, told.guidance), num)

    # -- pictures and draws ----------------------------------------------------------------------------------------

    def pictures(self, asked: AskedPictures) -> Answer:
        """Pictures of the map, to choose one from."""
        seeds = fresh_seeds(PICTURES, stream(asked.seed, "sample"))
        with self._drawing():
            made = self._made(seeds, asked)
        return {"pictures": _shown(made), "seeds": _texts(seeds)}

    def posterior(self, asked: AskedPosterior) -> Answer:
        """A picture, noised, and draws of what it may have been, one network call each."""
        model, device = self.opened.model, self.opened.device
        seeds = fresh_seeds(asked.draws, stream(0, "posterior-draws"))
        with self._drawing():
            x_1 = self._chosen(asked)
            noise = RowNoise(torch.tensor([asked.noise], device=device), "play").normal(model.event_shape)
            x_t = model.path.interpolate(noise.to(model.dtype), x_1, asked.t)
            start = RowNoise(seeds.to(device), "posterior").normal(model.event_shape, dtype=model.dtype)
            with Meter(model.network) as meter:
                draws = model.push(start, asked.t, x_t.expand_as(start), 1, self._pictures(asked, len(seeds)).cond)
        cost = {"evaluations": meter.evaluations, "seconds": meter.seconds}
        return {
            "clean": _shown(x_1)[0],
            "noisy": _shown(x_t)[0],
            "draws": _shown(draws),
            "seeds": _texts(seeds),
            **cost,
        }

    def _made(self, seeds: Tensor, told: Told) -> Tensor:
        cond = self._pictures(told, len(seeds)).cond
        return self.opened.model.generate(len(seeds), REFINED, cond=cond, seeds=seeds)

    def _chosen(self, asked: AskedPosterior) -> Tensor:
        """The picture of a seed, or one that was drawn: (1, C, H, W)."""
        if asked.picture is not None:
            if int(asked.picture) >= 2**63:
                raise InputError(f"a seed is less than 2**63, got {asked.picture}")
            return self._made(torch.tensor([int(asked.picture)]), asked)
        channels, height, width = self.shape
        if len(asked.pixels) != channels * height * width:
            raise InputError(f"a drawn picture has {height} × {width} × {channels} bytes, got {len(asked.pixels)}")
        pixels = torch.tensor(asked.pixels, device=self.opened.device, dtype=self.opened.model.dtype)
        return pixels.reshape(1, height, width, channels).permute(0, 3, 1, 2) / 127.5 - 1

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """The map for a moment; draws wait for one another, not for a steering."""
        if self._busy.locked():
            raise Busy("steering is under way: wait, or stop it")
        if not self._turn.acquire(timeout=WAIT_SECONDS):
            raise Busy("other draws are under way")
        try:
            with torch.no_grad():
                yield
        finally:
            self._turn.release()

    # -- steering --------------------------------------------------------------------------------------------------

    def steer(self, asked: AskedSteering) -> Answer:
        """Begin; refused while another is under way."""
        run, command = self._run(asked)
        if not self._busy.acquire(blocking=False):
            raise Busy("steering is under way: wait, or stop it")
        self.job = job = Job(asked, command)
        threading.Thread(target=self._work, args=(replace(run, callback=job.watch), job), daemon=True).start()
        return {"started": True}

    def progress(self) -> Answer:
        """How far it is, with the samples on their way; or what came of it."""
        job = self.job
        if job is None:
            return {"running": False}
        running = not job.finished.is_set()
        answer: Answer = {"running": running, "done": job.done, "steps": job.steps, "error": job.error}
        answer |= {"stopped": job.stopped, "command": job.command, "notes": job.notes}
        if running:
            return answer | {"pictures": [] if job.state is None else _shown(job.state)}
        if (result := job.result) is None:
            return answer
        count = max(1, len(result.samples))
        rewards = result.rewards.double()
        return answer | {
            "pictures": _shown(result.samples),
            "rewards": [float(r) if r.isfinite() else None for r in rewards],
            "seeds": _texts(result.seeds),
            "mean": float(rewards.mean()) if bool(rewards.isfinite().all()) and len(rewards) else None,
            "evaluations": result.cost["nfe"],
            "seconds": result.cost["seconds"] / count,
        }

    def stop(self) -> Answer:
        """Stop at the next step; what is finished stays."""
        if self.job is not None:
            self.job.stopped = True
        return {"stopping": True}

    def close(self, seconds: float = 5.0) -> None:
        """Stop, and wait for it."""
        self.stop()
        if self.job is not None:
            self.job.finished.wait(seconds)

    def _run(self, asked: AskedSteering) -> tuple[SteeringRun, str]:
        """The run, and the command that makes the same samples."""
        if asked.reward >= len(self.rewards):
            raise InputError("no such reward is offered: give one by mfm play --reward")
        methods = self._methods()
        if asked.method not in methods:
            raise unknown("method", asked.method, methods)
        bounds = {name: KNOBS[name] for name in _knobs(methods[asked.method])}
        for name, value in asked.options.items():
            if value > bounds.get(name, 0):
                raise InputError(f"{name} = {value} is no option here: {asked.method} has {bounds or 'none'}")
        method = build(Method, asked.method, asked.options)
        process = method.usual(steps=asked.steps)
        method.check(process)
        text = self._reward_text(asked)
        pictures = self._pictures(asked, asked.num)
        run = SteeringRun(pictures, choose_reward(text, self.opened, asked.strength), method, process, asked.seed)
        typed = [
            f"mfm steer {shlex.quote(self.opened.name)} --reward {shlex.quote(text)} --strength {asked.strength:g}"
        ]
        typed.append(f"--method {method.name} --steps {asked.steps} --num {asked.num} --seed {asked.seed}")
        typed += [f"--set method.{name}={value}" for name, value in asked.options.items()]
        typed += [f"--label {shlex.quote(asked.label)}"] if asked.label else []
        typed += [f"--guidance {asked.guidance:g}"] if asked.guidance is not None else []
        return run, " ".join(typed)

    def _reward_text(self, asked: AskedSteering) -> str:
        """As it is typed: one's own as it was given, a named one with the words after its colon."""
        spelling = self.rewards[asked.reward]
        if asked.reward < self.own:
            return spelling
        name, takes_words = spelling.partition(":")[0].partition("[")[0], ":" in spelling
        return f"{name}:{asked.words.strip()}" if takes_words and asked.words.strip() else name

    def _work(self, run: SteeringRun, job: Job) -> None:
        """The job's thread."""
        try:
            with self._turn, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                job.result = _made_by(run, job)
            job.notes = tuple(dict.fromkeys(str(warning.message) for warning in caught))
        except Exception as error:  # whatever it is, the page says it and the next job can begin
            job.error = str(error) or type(error).__name__
        finally:
            job.finished.set()
            self._busy.release()


def _made_by(run: SteeringRun, job: Job) -> SteerResult | None:
    try:
        return as_result(run.make(slice(0, job.asked.num)))
    except ShardInterrupted as stopped:
        if not job.stopped:
            raise InputError(str(stopped.cause)) from None
        return as_result(stopped.shard) if len(stopped.shard.tensors["samples"]) else None


def _knobs(kind: type[Method]) -> dict[str, Any]:
    """The options of a method that a page can turn, with their defaults."""
    usual = USUAL.method if kind is type(USUAL.method) else kind()
    return {name: getattr(usual, name) for name in KNOBS if name in options_of(kind) and getattr(usual, name)}


def _shown(x: Tensor) -> list[str]:
    return [data_uri(picture) for picture in as_bytes(x)]


def _texts(seeds: Tensor) -> list[str]:
    return list(map(str, seeds.tolist()))
