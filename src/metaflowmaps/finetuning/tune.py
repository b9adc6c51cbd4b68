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
from metaflowmaps.finetuning.state_laws import Data
from metaflowmaps.finetuning.stop_rule import StopRule
from metaflowmaps.finetuning.tuning_config import FinetuneConfig, resolved
from metaflowmaps.finetuning.tuning_objective import TuningSetup
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.low_rank import add_low_rank
from metaflowmaps.random import stream
from metaflowmaps.rewards.base import describe
from metaflowmaps.training.loop import Record, TrainingObjective, TrainResult, Watch, train
from metaflowmaps.training.training_run import starting_point
from metaflowmaps.work.config import differences


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
    report: Callable[[str, Record], None] = lambda stage, record: None,
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
    tuned = run_finetuning(config, base, reward, Path(out), TuningContext(device=device, report=report))
    return MetaFlowMap.from_pretrained(tuned.result.checkpoint).to(device)


def make_problem(config: FinetuneConfig, base: MetaFlowMap, reward: Callable[..., Tensor]) -> TuningProblem:
    """The problem of a configuration."""
    return TuningProblem(base, reward, config.last, config.guidance, config.null_share, config.chunk)


def make_objective(config: FinetuneConfig, problem: TuningProblem, data: Data | None = None) -> TrainingObjective:
    """The objective of a configuration's first stage, at work."""
    config.method.check_reward(problem.reward.differentiable)
    source = config.states.start(problem, config.seed, data) if config.method.needs_states else None
    return config.method.start(
        TuningSetup(problem, source, config.batch_size, config.seed, config.map_loss, config.times)
    )


def make_student(config: FinetuneConfig, base: MetaFlowMap) -> MetaFlowMap:
    """A copy of the base that learns: all of its weights, or factors beside them."""
    student = copy.deepcopy(base).requires_grad_(True)
    if config.low_rank:
        add_low_rank(student.network, config.low_rank, stream(config.seed, "low-rank"))
    return student


def first_stage(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration that the first stage's checkpoints carry: a drift on its way to a map is not that map."""
    return config.model_copy(update={"map": "none"})


def second_stage(config: FinetuneConfig) -> FinetuneConfig:
    """That of the distillation."""
    return config.model_copy(
        update={"steps": config.distil.steps, "batch_size": config.distil.batch_size, "stop": "none"}
    )


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
    elsewhere = context.resume not in ("auto", "none")
    other_drift = Path(context.resume) / "drift"
    distils, parts = config.map == "distil", first_stage(config).tuned
    if elsewhere and (other_drift / "checkpoints").is_dir() and (distils or parts["drift"] != parts["map"]):
        context = replace(context, resume=str(other_drift))
    first = _Stage(
        "map" if parts["map"] else "drift",
        first_stage(config),
        out / "drift" if distils else out,
        one_step=parts["map"],
        has_drift=parts["drift"],
    )
    tuned = first.run(problem, make_objective(config, problem, context.data), context)
    seconds = {first.name: tuned.seconds}
    if distils:
        second = _Stage("map", second_stage(config), out)
        context = replace(context, resume="auto") if elsewhere else context
        drift = MetaFlowMap.from_pretrained(tuned.checkpoint).to(context.device).requires_grad_(False)
        size, seed = config.distil.batch_size, config.seed
        setup = TuningSetup(problem, None, size, seed, config.map_loss, config.times)
        objective = distillation(setup, drift, config.distil.pool, config.distil.pool_steps)
        tuned = second.run(problem, objective, context)
        seconds["map"] = tuned.seconds
    return Tuned(tuned, dict(problem.calls), seconds)


@dataclass(frozen=True)
class _Stage:
    """One stage in one directory: its configuration, and what of the model it tunes."""

    name: str
    config: FinetuneConfig
    out: Path
    one_step: bool = True
    has_drift: bool = True

    def run(self, problem: TuningProblem, objective: TrainingObjective, context: TuningContext) -> TrainResult:
        """Train with its meters and its rule for stopping, going on from what is there."""
        meters = Meters(
            problem, self.config.meters, self.config.seed, self.out, context.watched, self.one_step, self.has_drift
        )
        config, rule = self.config, StopRule.of(self.config.stop)
        if rule is not None:
            rule.check(meters.names)
        self.out.mkdir(parents=True, exist_ok=True)
        config = config.model_copy(update={"sample_every": config.meters.every})
        start = starting_point(config, self.out, context.resume)
        student = make_student(config, problem.base)
        step = 0 if start is None else int(start.document("position.json")["step"])
        records = kept_records(self.out, step)
        if not records and config.meters.every:
            records.append(meters(student.to(context.device).eval(), 0))
        if rule is not None and step and rule.fires(records):
            config = config.model_copy(update={"steps": step})  # it had stopped here already

        def look(model: MetaFlowMap, step: int) -> bool:
            records.append(meters(model, step))
            meters.draw(model, step)
            return rule is not None and rule.fires(records)

        watch = Watch(context.report, look, stage=self.name)
        return train(student, objective, config, self.out, device=context.device, start=start, watch=watch)


def _check_free(config: FinetuneConfig, out: Path) -> None:
    """Refuse a directory in which another run stands."""
    if out.is_file():
        raise InputError(f"{out} is a file: give a directory")
    distils = config.map == "distil"
    stages = {out: second_stage(config), out / "drift": first_stage(config)} if distils else {out: config}
    for folder in (out, out / "drift"):
        held, _ = CheckpointStore(folder / "checkpoints").latest_valid()
        if held is None:
            continue
        wanted = stages[folder].model_dump(mode="json") if folder in stages else None
        lines = differences(held.config.get("training"), wanted)
        other = [line for line in lines if not line.startswith("sample_every")]
        if other:
            raise InputError(f"{out} holds another run ({'; '.join(other[:3])}): choose another out")
