"""From a base map and a reward to a tuned map in a directory: tune, distil, resume.

With ``map=distil`` the drift is tuned in ``out/drift`` and the map of its posteriors learned in ``out``; otherwise
there is one stage, in ``out``.
"""

import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps.checkpoint import CheckpointStore
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.finetuning.alternatives import AdjointMatching, Draft
from metaflowmaps.finetuning.baseline import make_baseline
from metaflowmaps.finetuning.config import FinetuneConfig, Rule, usual
from metaflowmaps.finetuning.meters import Features, Meters, kept_records
from metaflowmaps.finetuning.objective import MFMFT
from metaflowmaps.finetuning.problem import Problem
from metaflowmaps.finetuning.states import Data, States, base_pool
from metaflowmaps.finetuning.tilted_map import DirectObjective, distillation
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.low_rank import add_low_rank
from metaflowmaps.random import stream
from metaflowmaps.rewards.base import describe, is_differentiable
from metaflowmaps.training.loop import Record, TrainResult, train
from metaflowmaps.training.run import starting_point
from metaflowmaps.work.config import differences, merged, override, validated

PROBED = 1024  # samples of the base that a reward is first tried on
OVERFLOW = 30.0  # of r without a baseline: its e^r is squared in a gradient's norm, and other samples have more
LARGEST = 1e7  # of λr: beyond, float32 does not resolve differences of one nat
FEW = 4.0  # effective samples of the probe, below which the base hardly makes what is asked for
WANTED = 0.02


class Tuned(NamedTuple):
    """Where a run stands at its end, and its bill: network and reward calls, per stage and in all."""

    result: TrainResult
    calls: dict[str, int]
    seconds: dict[str, float]


def first_stage(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration that the first stage's checkpoints carry: a drift on its way to a map is not that map."""
    return config.model_copy(update={"map": "none"}) if config.map == "distil" else config


def second_stage(config: FinetuneConfig) -> FinetuneConfig:
    """That of the distillation."""
    return config.model_copy(
        update={"steps": config.distil_steps, "batch_size": config.distil_batch_size, "stop": "none"}
    )


def make_problem(config: FinetuneConfig, base: MetaFlowMap, reward: Callable[..., Tensor]) -> Problem:
    """The problem of a configuration."""
    return Problem(base, reward, config.last, config.guidance, config.null_share, config.chunk)


def make_objective(config: FinetuneConfig, problem: Problem, data: Data | None = None) -> Any:
    """The objective of a configuration's first stage."""
    size, seed = config.batch_size, config.seed
    if config.method == "adjoint-matching":
        return AdjointMatching(problem, None, size, seed, config.adjoint_steps)  # type: ignore[arg-type]
    states = States(problem, config.states, seed, data)
    if config.method == "draft":
        return Draft(problem, states, size, seed, config.draft_at_zero)
    baseline = make_baseline(config.baseline, problem, states.pool_rewards, seed)
    if config.map == "direct":
        return DirectObjective(config, problem, states, baseline)
    weighted = config.method == "mfm-ft"
    return MFMFT(
        problem, states, baseline, config.num_draws, size, seed, config.form, weighted, config.sigma_squared
    )  # fmt: skip


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
    *,
    data: Data | None = None,
    device: torch.device | str = "cpu",
    resume: str = "auto",
    report: Callable[[str, Record], None] = lambda stage, record: None,
    others: dict[str, Callable[..., Tensor]] | None = None,
    features: Features | None = None,
    picture: Callable[[Tensor, Path], None] | None = None,
) -> Tuned:
    """Tune in ``out``, going on from what is there; ``resume`` may name another run to begin the first stage from."""
    base = base.to(device)
    elsewhere = resume not in ("auto", "none")
    if elsewhere and (Path(resume) / "drift" / "checkpoints").is_dir() and config.map in ("distil", "none"):
        resume = str(Path(resume) / "drift")
    problem = make_problem(config, base, reward)
    two_stages = config.map == "distil"
    first = out / "drift" if two_stages else out
    name = "drift" if two_stages or config.map == "none" else "map"
    seconds: dict[str, float] = {}

    def meters(place: Path, one_step: bool) -> Meters:
        draw = None if picture is None else (lambda x, step: picture(x, place / "samples" / f"step-{step:08d}.png"))
        return Meters(
            problem, config.meters, config.seed, place, others, features, draw, one_step, config.method != "draft"
        )  # fmt: skip

    alone = first_stage(config)
    tuned = _stage(
        alone, make_student(config, base), make_objective(config, problem, data), first, device, resume,
        lambda record: report(name, record), meters(first, config.method == "draft" or config.map == "direct"),
    )  # fmt: skip
    seconds[name] = tuned.seconds
    if two_stages:
        student = MetaFlowMap.from_pretrained(tuned.checkpoint).to(device).requires_grad_(False)
        objective = distillation(config, problem, student)
        tuned = _stage(
            second_stage(config), make_student(config, base), objective, out, device, "auto" if elsewhere else resume,
            lambda record: report("map", record), meters(out, True),
        )  # fmt: skip
        seconds["map"] = tuned.seconds
    return Tuned(tuned, dict(problem.calls), seconds)


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
    given = {"checkpoint": "a map in memory", "checkpoint_sha256": weights.hexdigest(), "reward": describe(reward)}
    for name in ("strength", *given):
        if name in settings:
            what = "multiply the reward by it" if name == "strength" else "it follows from the model and the reward"
            raise InputError(f"{name} is not set here: {what}")
    config = merged(override(validated(FinetuneConfig, given), usual(base.event_shape)), settings)
    base = copy.deepcopy(base)  # the caller's stays as it is
    tried = probe(config, base, reward)
    # of two functions without a name nothing differs but what they say of samples
    said = hashlib.sha256(f"{tried.mean:.4g} {tried.std:.4g} {tried.largest:.4g}".encode()).hexdigest()
    config = config.model_copy(update={"reward_sha256": said})
    _check_place(config, Path(out))
    tuned = run_finetuning(config, base, reward, Path(out), device=device, report=report)
    return MetaFlowMap.from_pretrained(tuned.result.checkpoint).to(device)


def _check_place(config: FinetuneConfig, out: Path) -> None:
    """Refuse a directory in which another run stands."""
    if out.is_file():
        raise InputError(f"{out} is a file: give a directory")
    stages = (
        {out: config} if config.map != "distil" else {out: second_stage(config), out / "drift": first_stage(config)}
    )
    for place in (out, out / "drift"):
        held, _ = CheckpointStore(place / "checkpoints").latest_valid()
        if held is None:
            continue
        wanted = stages[place].model_dump(mode="json") if place in stages else None
        lines = differences(held.config.get("training"), wanted)
        other = [line for line in lines if not line.startswith("sample_every")]
        if other:
            raise InputError(f"{out} holds another run ({'; '.join(other[:3])}): choose another out")


def _stage(
    config: FinetuneConfig,
    student: MetaFlowMap,
    objective: Any,
    out: Path,
    device: torch.device | str,
    resume: str,
    report: Callable[[Record], None],
    meters: Meters,
) -> TrainResult:
    """One stage in one directory, with its meters and its rule for stopping."""
    check_rule(config, meters.names)
    out.mkdir(parents=True, exist_ok=True)
    config = config.model_copy(update={"sample_every": config.meters.every})
    start, rule = starting_point(config, out, resume), Rule.of(config.stop)
    step = 0 if start is None else int(start.document("position.json")["step"])
    records = kept_records(out, step)
    if not records and config.meters.every:
        records.append(meters(student.to(device).eval(), 0))
    if rule is not None and step and rule.fires(records):
        config = config.model_copy(update={"steps": step})  # it had stopped here already

    def look(model: MetaFlowMap, step: int) -> bool:
        records.append(meters(model, step))
        meters.draw(model, step)
        return rule is not None and rule.fires(records)

    return train(student, objective, config, out, device=device, start=start, report=report, on_sample=look)


class Probe(NamedTuple):
    """What λr is on samples of the base, and what it leaves of them."""

    mean: float
    std: float
    largest: float
    ess: float  # of so many samples, under e^{λr}
    fitting: float  # the λ that leaves a share WANTED of them
    log_evidence: float  # log E[e^{λr}], what ``bound`` of the meters can reach


def probe(config: FinetuneConfig, base: MetaFlowMap, reward: Callable[..., Tensor]) -> Probe:
    """Try a reward, at strength 1, on a few samples of the base; what cannot be tuned to is refused."""
    problem = make_problem(config, base, reward)
    x_1, cond = base_pool(problem, PROBED, config.states.pool_steps, config.seed)
    r = problem.rewards(x_1, cond).double().cpu()
    finite = r[r.isfinite()]
    if not len(finite):
        raise InputError(f"--reward {config.reward} is finite on none of {PROBED} base samples: check its scale")
    _try_gradient(config, problem, x_1, cond)
    spread, size = float(finite.std()) if len(finite) > 1 else 0.0, float(finite.abs().max())
    if len(finite) == len(r) and spread <= 1e-6 * size:
        raise InputError(
            f"--reward {config.reward} is {float(finite[0]):g} on all of {PROBED} base samples, and a constant "
            "tilts nothing: check the reward"
        )
    fitting, largest = _fitting(r, config.strength), config.strength * float(finite.max())
    unweighted = config.method in ("mfm-ft", "self-normalised") and config.baseline.kind == "none"
    bare = unweighted and largest > OVERFLOW
    if bare or config.strength * size > LARGEST:
        limit = 0.9 * (OVERFLOW / float(finite.max()) if bare else LARGEST / size)
        remedy = ", or keep a baseline (--set baseline.kind=running)" if bare else ""
        raise InputError(
            f"--strength {config.strength:g} overflows: λr reaches {largest if bare else config.strength * size:.3g} "
            f"on {PROBED} base samples; --strength {min(limit, fitting):.2g} fits{remedy}"
        )
    scaled = config.strength * r
    if unweighted and float(scaled.logsumexp(0)) - math.log(len(r)) < -2 * OVERFLOW:
        raise InputError(
            f"without a baseline e^{{λr}} vanishes: λr is at most {largest:.3g} on {PROBED} base samples; keep one "
            "(--set baseline.kind=running)"
        )
    ess = float(1 / scaled.softmax(0).square().sum())
    if ess < FEW:
        warnings.warn(
            f"λ = {config.strength:g} asks for what {ess:.1f} of {PROBED} base samples have; --strength {fitting:.2g} "
            f"leaves {WANTED:.0%} of them",
            stacklevel=2,
        )
    shown = scaled[scaled.isfinite()]
    evidence = float(scaled.logsumexp(0)) - math.log(len(scaled))
    return Probe(float(shown.mean()), float(shown.std()) if len(shown) > 1 else 0.0, largest, ess, fitting, evidence)


def _try_gradient(config: FinetuneConfig, problem: Problem, x_1: Tensor, cond: dict[str, Tensor]) -> None:
    """Refuse, before anything is written, a reward without the gradient that its method takes."""
    regression = config.method in ("mfm-ft", "self-normalised")
    declared = is_differentiable(problem.reward)
    unused = config.map == "direct" or config.form == "gradient-free" or (config.form == "auto" and not declared)
    if regression and unused:
        return
    fix = "use --set form=gradient-free" if regression else "use method=mfm-ft (--method mfm-ft)"
    if not declared:
        raise InputError(f"--reward {config.reward} declares itself not differentiable: {fix}")
    try:
        with torch.enable_grad():
            x = x_1[:2].detach().clone().requires_grad_(True)
            r = problem.reward(x, {k: v[:2] for k, v in cond.items()} or None)
    except InputError as error:
        raise InputError(
            f"--reward {config.reward} takes no x with a gradient ({str(error)[:160]}): {fix}, or wrap it as "
            "mfm.rewards.BlackBox"
        ) from error
    if not r.requires_grad:
        raise InputError(f"--reward {config.reward} has no gradient in x (detach(), steps or numpy inside): {fix}")


def check_rule(config: FinetuneConfig, measured: Iterable[str]) -> None:
    """Refuse a stop rule about what is not measured."""
    rule = Rule.of(config.stop)
    if rule is not None and rule.name not in measured:
        raise unknown("stop: measurement", rule.name, list(measured))


def _fitting(r: Tensor, strength: float) -> float:
    """The largest λ up to ``strength`` whose weights leave a share WANTED of the samples, by bisection."""
    low, high = 0.0, strength
    for _ in range(200):  # a strength may be too large by any number of digits
        middle = (low + high) / 2
        share = float(1 / (middle * r).softmax(0).square().sum()) / len(r)
        low, high = (middle, high) if share >= WANTED else (low, middle)
    return low
