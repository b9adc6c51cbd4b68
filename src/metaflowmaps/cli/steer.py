"""Sample with a reward; samples.safetensors holds samples, rewards and seeds.

Options of the method and of the process: --set method.recycle=8 --set process.grid=power.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from pydantic import Field, model_validator

from metaflowmaps.cli.context import Context, Results
from metaflowmaps.cli.drawing import Drawing, Tensors, draw
from metaflowmaps.cli.observations import ObservingOptions
from metaflowmaps.cli.results import Request
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.lab.named_rewards import REWARD_HELP, choose_reward
from metaflowmaps.lab.steering_run import SteeringRun, as_result
from metaflowmaps.steering import PRESETS, USUAL, Method, Process
from metaflowmaps.work.choices import Pick, built, dumped
from metaflowmaps.work.shards import Shard


class Steer(ObservingOptions):
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

    def count_of(self, method: Method) -> int:
        """How many samples; a seed of ``only`` may stand for a whole system of particles."""
        if not self.only:
            return self.count(self.num)
        if method.system is None:
            raise InputError(
                f"--only makes a whole particle system of {method.name} again: say how many samples had its seed, as "
                "--set method.particles=64"
            )
        if self.num is not None and self.num != len(self.only) * method.system:
            return self.count(self.num)
        return self.count(None) * method.system


def run(config: Steer, context: Context) -> Results:
    """Steered samples of a checkpoint, with their rewards and costs."""
    method, process = config.choices()
    pictures = config.open(context, config.count_of(method), needs_map=method.draws)
    opened, seed = pictures.opened, context.seed or 0
    given = config.observed(opened.model)
    if given is not None:
        if config.reward is None:
            raise InputError("a forecast has no usual reward: --reward my.py:crossed, a function of X at --query")
        pictures.observe(given)
    chosen = choose_reward(config.reward, opened, config.strength, config.data)
    steering = SteeringRun(pictures, chosen, method, process, seed, config.only, config.batch_size)
    identity = config.identity(
        pictures,
        preset=None,
        num=pictures.num,
        seed=seed,
        method=dumped(method),
        num_draws=method.shown_draws,
        process=dumped(process),
        steps=process.steps,
        reward=chosen.name,
        reward_sha256=chosen.sha256,
    )

    def keep(request: Request, tensors: Tensors) -> None:
        kept = {name: tensors[name] for name in ("samples", "rewards", "seeds")}
        config.write(request.out, "samples", kept)

    def finish(request: Request, made: Shard) -> Results:
        keep(request, made.tensors)
        result = as_result(made)
        steering.draw(result, request.out)
        return request.write(steering.metrics(result), result.cost, opened.device)

    calls = pictures.num * process.steps * method.calls_per_step
    size, expected = steering.size(context.share), partial(steering.expected_seconds, context.share)
    drawing = Drawing("steer", identity, calls, size, steering.make, finish, keep, expected)
    return draw(pictures, drawing, context, f"steer-{method.name}")
