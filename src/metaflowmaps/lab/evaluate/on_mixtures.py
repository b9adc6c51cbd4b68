"""The evaluations where the truth is known: posterior draws, steering and values of a map of a mixture.

Each is made ready as a :class:`Measurement` and run by who wants it: what tells it from others, what it will take, and
``measure(say)``, which returns metrics and what draws their figures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metaflowmaps.data import DataSource
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig, evaluate_posterior
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.lab.evaluate.steering_error import SteeringEvalConfig, cells, evaluate_steering
from metaflowmaps.lab.evaluate.value_error import ValueEvalConfig, evaluate_value
from metaflowmaps.lab.evaluate.variants import variant
from metaflowmaps.lab.figures import plots, result_figures, steering_figures
from metaflowmaps.lab.opened import OpenedModel, OpenedNetwork, opened
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.path import LinearPath
from metaflowmaps.posterior import ExactModel
from metaflowmaps.recipes.gmm import LAW
from metaflowmaps.recipes.tasks import SteeringTask, steering_task
from metaflowmaps.work.choices import build

EXACT = "exact"  # instead of a checkpoint: the mixture itself
LAWS: dict[str, DataSource] = {"gmm": LAW}
Say = Callable[[str], None]
Draw = Callable[[Path], object]


@dataclass(frozen=True)
class Measurement:
    """An evaluation that is ready to be run.

    Args:
        command: the command that asks for it, without ``mfm``.
        identity: what tells it from others.
        out: where its results go, unless told otherwise.
        device: where the model is.
        planned: what it will take.
        measure: takes a line of progress; returns the metrics, the cost under "cost" where more than seconds are
            known, and what draws the figures into a folder.
    """

    command: str
    identity: Json
    out: Path
    device: torch.device
    planned: Json
    measure: Callable[[Say], tuple[Json, Draw]]


def law_named(name: str) -> DataSource:
    """A law of :data:`LAWS`, or a data source of the user's own that knows its law."""
    if ":" in name:
        return build(DataSource, name, {})
    if name not in LAWS:
        raise unknown("law", name, [*LAWS, "file.py:Name"])
    return LAWS[name]


class _Judged(NamedTuple):
    """What a task judges, and the law it is judged by: that of a model tuned to a reward is tilted already."""

    task: SteeringTask
    model: Any
    law: GaussianMixture
    opened: OpenedModel | OpenedNetwork | None  # None: the mixture itself

    @classmethod
    def open(cls, checkpoint: str, task: str, device: str, read: Any = OpenedModel.open) -> "_Judged":
        known = steering_task(task)
        if checkpoint == EXACT:
            return cls(known, ExactModel(LinearPath(), known.law), known.law, None)
        subject = read(checkpoint, device)
        return cls(known, subject.model, subject.judging_law(known.source, f"--task {task}"), subject)

    def measurement(
        self, command: str, config: SteeringEvalConfig | ValueEvalConfig, planned: Json, measure: Any
    ) -> Measurement:
        """An evaluation of it; results go beside the model."""
        digest = EXACT if self.opened is None else self.opened.digest
        identity = {"checkpoint": digest, "task": self.task.name, **config.model_dump()}
        name = f"{command.replace(' ', '-')}-{self.task.name}"
        if self.opened is None:
            return Measurement(command, identity, Path("runs") / f"exact-{name}", torch.device("cpu"), planned, measure)
        return Measurement(command, identity, self.opened.beside(name), self.opened.device, planned, measure)


def steering_on_mixture(checkpoint: str, task: str, config: SteeringEvalConfig, device: str = "auto") -> Measurement:
    """Every method against the exact tilted law; of the mixture itself, those that its draws allow."""
    judged = _Judged.open(checkpoint, task, device)
    asked = config.methods
    if judged.opened is None:  # draws of a mixture have no pathwise gradient
        methods = {name: variant(name).method for name in asked}
        kept = tuple(name for name, method in methods.items() if not (method.draws and method.gradients))
        if not kept:
            raise InputError("exact draws have no gradient in the state: give methods that take none, such as mfm-gf")
        config = config.model_copy(update={"methods": kept})
    reward = judged.task.reward(config.reward)
    data_std = None if judged.opened is None else judged.opened.model.data_std

    def measure(say: Say) -> tuple[Json, Draw]:
        if config.methods != asked:
            say("exact draws have no gradient in the state; leaving mfm-g out")
        metrics, samples = evaluate_steering(judged.model, judged.law, reward, config, say, data_std)
        return metrics, lambda out: result_figures.steering(metrics, samples, judged.law.tilt(reward), out)

    each = sum(cell.method.calls_per_step for cell in cells(config, data_std))
    planned = {"calls": config.seeds * config.samples * config.steps * each}
    return judged.measurement("eval steering", config, planned, measure)


def value_on_mixture(checkpoint: str, task: str, config: ValueEvalConfig, device: str = "auto") -> Measurement:
    """V̂ of map and GLASS against the exact value."""
    if checkpoint == EXACT:
        raise InputError("mfm eval value judges a checkpoint; the exact value is what it compares with")
    judged = _Judged.open(checkpoint, task, device, opened)
    reward = judged.task.reward(config.reward)

    def measure(say: Say) -> tuple[Json, Draw]:
        metrics = evaluate_value(judged.model, judged.law, reward, config, say)
        return metrics, lambda out: plots.save(steering_figures.value_error(metrics), out / "value-against-calls.png")

    rows = config.states * len(config.times) * config.num_draws
    assert judged.opened is not None
    planned = judged.opened.cost_of(rows * (sum(config.map_steps) + sum(config.glass_steps)))
    return judged.measurement("eval value", config, planned, measure)


def posterior_on_mixture(checkpoint: str, law: str, config: PosteriorEvalConfig, device: str = "auto") -> Measurement:
    """Relative sliced W2 at each t for the map and for GLASS with the map's own drift."""
    subject = opened(checkpoint, device)
    judging = subject.judging_law(law_named(law), f"--law {law}")

    def measure(say: Say) -> tuple[Json, Draw]:
        measured = evaluate_posterior(subject.model, judging, config, say)
        metrics = measured.metrics()

        def draw(out: Path) -> None:
            plots.save(result_figures.panels(subject.model, judging, config.seed), out / "posteriors.png")
            plots.save(steering_figures.posterior_error(metrics), out / "error-against-calls.png")

        return {**metrics, "cost": {"seconds_by_sampler": measured.seconds}}, draw

    identity = {"checkpoint": subject.digest, "law": law, **config.model_dump()}
    out = subject.beside(f"eval-posterior-{config.samples}")
    return Measurement("eval posterior", identity, out, subject.device, subject.cost_of(0), measure)
