"""From a base map and a reward to a tuned map in a directory: tune, distil, resume.

With ``map=distil`` the drift is tuned in ``out/drift`` and the map of its posteriors learned in ``out``; otherwise
there is one stage, in ``out``.
"""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps.checkpoint import CheckpointStore
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.distillation import distillation
from metaflowmaps.finetuning.meters import Meters, Watched, kept_records
from metaflowmaps.finetuning.reward_probe import probe
from metaflowmaps.finetuning.state_laws import Data, StateSource
from metaflowmaps.finetuning.stop_rule import StopRule
from metaflowmaps.finetuning.tuning_config import FinetuneConfig, resolved
from metaflowmaps.finetuning.tuning_objective import TuningSetup
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.compiling import use_compiled
from metaflowmaps.networks.low_rank import add_low_rank
from metaflowmaps.random import stream
from metaflowmaps.rewards.base import describe
from metaflowmaps.training.loop import TrainingObjective, TrainResult, Watch, train
from metaflowmaps.training.run_log import Record
from metaflowmaps.training.starting import starting_point
from metaflowmaps.work.config import differences
from metaflowmaps.work.notebook import notebook_report


class Tuned(NamedTuple):
    """Where a run stands at its end, and its bill: network and reward calls in all, seconds by stage."""

    result: TrainResult
    calls: dict[str, int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class TuningContext:
    """What a run is surrounded by and does not depend on.

    Args:
        device: where it trains.
        resume: ``auto``, ``none``, or the directory of another run to begin the first stage from.
        data: the base's own, where states are made from them.
        report: called with the stage's name and its records.
        watched: what its meters look at besides the reward.
    """

    device: torch.device | str = "cpu"
    resume: str = "auto"
    data: Data | None = None
    report: Callable[[str, Record], None] = lambda stage, record: None
    watched: Watched = field(default_factory=Watched)


def tune(
    base: MetaFlowMap,
    reward: Callable[..., Tensor],
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    report: Callable[[str, Record], None] | None = None,
    **settings: Any,
) -> MetaFlowMap:
    """:func:`metaflowmaps.finetune`."""
    weights = hashlib.sha256(b"".join(v.cpu().contiguous().numpy().tobytes() for v in base.state_dict().values()))
    about = {"checkpoint": "a map in memory", "checkpoint_sha256": weights.hexdigest(), "reward": describe(reward)}
    for name in ("strength", "tuned", *about):
        if name in settings:
            what = "multiply the reward by it" if name == "strength" else "it follows from the model and the reward"
            raise InputError(f"{name} is not set here: {what}")
    config = resolved(about, base.event_shape, settings)
    base = copy.deepcopy(base)  # the caller's stays as it is
    tried = probe(config, make_problem(config, base, reward))
    # of two functions without a name nothing differs but what they say of samples
    said = hashlib.sha256(f"{tried.mean:.4g} {tried.std:.4g} {tried.largest:.4g}".encode()).hexdigest()
    config = config.model_copy(update={"reward_sha256": said})
    _check_free(config, Path(out))
    context = TuningContext(device=device, report=report or notebook_report())
    tuned = run_finetuning(config, base, reward, Path(out), context)
    return MetaFlowMap.from_pretrained(tuned.result.checkpoint).to(device)


def make_problem(config: FinetuneConfig, base: MetaFlowMap, reward: Callable[..., Tensor]) -> TuningProblem:
    """The problem of a configuration."""
    return TuningProblem(base, reward, config.last, config.guidance, config.null_share, config.chunk)


def make_objective(config: FinetuneConfig, problem: TuningProblem, data: Data | None = None) -> TrainingObjective:
    """The objective of a configuration's first stage, at work."""
    config.method.check_reward(problem.reward.differentiable)
    source = config.states.start(problem, config.seed, data) if config.method.needs_states else None
    return config.method.start(_setup(config, problem, source))


def _setup(config: FinetuneConfig, problem: TuningProblem, source: StateSource | None = None) -> TuningSetup:
    return TuningSetup(problem, source, config.batch_size, config.seed, config.map_loss, config.times, config.steps)


def make_student(config: FinetuneConfig, base: MetaFlowMap) -> MetaFlowMap:
    """A copy of the base that learns: all of its weights, or factors beside them."""
    student = copy.deepcopy(base).requires_grad_(True)
    if config.low_rank:
        add_low_rank(student.network, config.low_rank, stream(config.seed, "low-rank"))
    return student


def run_finetuning(
    config: FinetuneConfig,
    base: MetaFlowMap,
    reward: Callable[..., Tensor],
    out: Path,
    context: TuningContext = TuningContext(),
) -> Tuned:
    """Tune in ``out``, going on from what is there.

    Args:
        config: of the run.
        base: the map that is tuned; it is frozen.
        reward: λr.
        out: a directory.
        context: device, resumption, reports.
    """
    problem = make_problem(config, base.to(context.device), reward)
    first, *others = stages_of(config, out)
    elsewhere = Path(context.resume) / "drift"
    if context.resume not in ("auto", "none") and first.name == "drift" and (elsewhere / "checkpoints").is_dir():
        context = replace(context, resume=str(elsewhere))
    result = first.run(problem, make_objective(first.config, problem, context.data), context)
    seconds = {first.name: result.seconds}
    for stage in others:  # the distillation, if there is one; what is resumed from elsewhere is the first stage alone
        context = replace(context, resume="none" if context.resume == "none" else "auto")
        drift = MetaFlowMap.from_pretrained(result.checkpoint).to(context.device).requires_grad_(False)
        objective = distillation(_setup(stage.config, problem), drift, config.distil.pool, config.distil.pool_steps)
        result = stage.run(problem, objective, context)
        seconds[stage.name] = result.seconds
    return Tuned(result, dict(problem.calls), seconds)


@dataclass(frozen=True)
class Stage:
    """One stage in one directory, and the configuration that its checkpoints carry."""

    config: FinetuneConfig
    out: Path

    @property
    def name(self) -> str:
        """What it tunes, first of all."""
        return "map" if self.config.tuned["map"] else "drift"

    def run(self, problem: TuningProblem, objective: TrainingObjective, context: TuningContext) -> TrainResult:
        """Train with its meters and its rule for stopping, going on from what is there."""
        config, rule = self.config, StopRule.of(self.config.stop)
        meters = Meters(problem, config.meters, config.seed, self.out, context.watched, config.tuned)
        if rule is not None:
            rule.check(meters.names)
        self.out.mkdir(parents=True, exist_ok=True)
        start = starting_point(config, self.out, context.resume)
        student = make_student(config, problem.base)
        for model in (problem.base, student):
            use_compiled(model.network, config.compile, context.device, config.precision)
        step = 0 if start is None else int(start.document("position.json")["step"])
        records = kept_records(self.out, step)
        if not records and config.meters.every:
            records.append(meters(student.to(context.device).eval(), 0))
        if rule is not None and step and rule.fires(records):
            config = config.model_copy(update={"steps": step})  # it had stopped here already

        def look(model: MetaFlowMap, step: int) -> Path | bool | None:
            records.append(meters(model, step))
            drawn = meters.draw(model, step)
            return True if rule is not None and rule.fires(records) else drawn

        watch = Watch(context.report, look, stage=self.name)
        return train(student, objective, config, self.out, device=context.device, start=start, watch=watch)


def stages_of(config: FinetuneConfig, out: Path) -> list[Stage]:
    """A run's stages: one, or with ``map=distil`` the drift's, which is not that map yet, and the map's."""
    whole = config.model_copy(update={"sample_every": config.meters.every})
    if config.map != "distil":
        return [Stage(whole, out)]
    learned = {"steps": config.distil.steps, "batch_size": config.distil.batch_size, "stop": "none"}
    return [
        Stage(whole.model_copy(update={"map": "none"}), out / "drift"),
        Stage(whole.model_copy(update=learned), out),
    ]


def _check_free(config: FinetuneConfig, out: Path) -> None:
    """Refuse a directory in which another run stands."""
    if out.is_file():
        raise InputError(f"{out} is a file: give a directory")
    wanted = {stage.out: stage.config.model_dump(mode="json") for stage in stages_of(config, out)}
    for folder in (out, out / "drift"):
        held, _ = CheckpointStore(folder / "checkpoints").latest_valid()
        lines = [] if held is None else differences(held.config.get("training"), wanted.get(folder))
        if lines:
            raise InputError(f"{out} holds another run ({'; '.join(lines[:3])}): choose another out")
