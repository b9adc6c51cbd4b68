"""Put a reward into the weights: a map that samples p_1 e^{λr} without guidance. Run it again to go on."""

import re
import time
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from metaflowmaps.checkpoint import CheckpointStore
from metaflowmaps.cli.context import TRAINS, Context, Name, OnCheckpoint, Results
from metaflowmaps.cli.results import Request
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.meters import Watched, kept_records, measurements
from metaflowmaps.finetuning.reward_probe import PROBED, Probe, probe
from metaflowmaps.finetuning.stop_rule import StopRule
from metaflowmaps.finetuning.tune import TuningContext, make_objective, make_problem, make_student, run_finetuning
from metaflowmaps.finetuning.tuning_config import FinetuneConfig, resolved
from metaflowmaps.finetuning.tuning_objective import TuningObjective
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate import tuning_error as tuning
from metaflowmaps.lab.evaluate.tuning_subject import TuningSubject, summary
from metaflowmaps.lab.named_rewards import REWARD_HELP, ChosenReward, choose_reward
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.sample_pictures import PictureOptions, SamplePictures
from metaflowmaps.training.loop import NonFiniteLoss
from metaflowmaps.work import ranks
from metaflowmaps.work.choices import choices
from metaflowmaps.work.config import merged, override
from metaflowmaps.work.progress import training_progress

OF_THE_SUBJECT = {  # settings that say what a run is about: how to give them
    "strength": "give it as --strength",
    "reward": "give it as --reward",
    "checkpoint": "give it as the CHECKPOINT argument",
    "data": "give it as --data",
    "law": "leave it out",
    "tuned": "leave it out",
    "recipe": "leave it out",
    "checkpoint_sha256": "leave it out",
    "reward_sha256": "leave it out",
    "data_moved": "give it as --data",
}


class Finetune(OnCheckpoint):
    """The reward, the method and what is tuned."""

    shared = TRAINS

    reward: str | None = Field(None, description=REWARD_HELP)
    strength: float = Field(1.0, description="λ: the reward is multiplied by it.")
    method: str = Field("mfm-ft", description=f"{', '.join(choices(TuningObjective))} or file.py:Name.")
    map: str | None = Field(None, description="distil (the tuned drift's whole map, in another stage) or none.")
    num_draws: int | None = Field(None, ge=1, description="Posterior draws a state (N).")
    guidance: float = Field(1.0, description="Scale w of a base with classes, throughout.")
    vae: str | None = Field(None, description="Autoencoder of latents: a folder or hub id, where not known.")
    data: Annotated[str | None, Name(("--data",), "DIR")] = Field(None, description="Where the base's images are now.")
    stop: str = Field("none", description='Stop early: "distance<2", "reward>5", "reward stalls 4".')
    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (), description="Change a setting: key.sub=value (repeatable)."
    )


def run(config: Finetune, context: Context) -> Results:
    """A tuned map."""
    ranks.alone("mfm finetune")
    opened = OpenedModel.open(config.checkpoint, context.device)
    subject, chosen = choose_subject(opened, config)
    given = config.model_dump(include={"method", "map", "num_draws", "guidance", "stop"}) | {"seed": context.seed}
    given = {name: value for name, value in given.items() if value is not None}
    return tune(subject, resolve(subject, chosen, given, config.settings, context), context)


def choose_subject(opened: OpenedModel, config: Finetune) -> tuple[TuningSubject, ChosenReward]:
    """The base with its reward on samples."""
    chosen = choose_reward(config.reward, opened, 1.0)
    pictures = SamplePictures(opened, PictureOptions(vae=config.vae), 1)
    subject = TuningSubject(
        opened,
        chosen.name,
        pictures.on_samples(chosen.reward),
        config.strength,
        config.data,
        pictures.decode if pictures.latent else None,
    )
    return subject, chosen


def resolve(
    subject: TuningSubject, chosen: ChosenReward, given: Results, settings: tuple[str, ...], context: Context
) -> FinetuneConfig:
    """The configuration of a run: the defaults of its kind, options, --set, --max-steps."""
    for setting in settings:
        key = setting.partition("=")[0].strip().partition(".")[0]
        if key in OF_THE_SUBJECT:
            raise InputError(f"--set {setting}: {OF_THE_SUBJECT[key]}")
    config = override(resolved(about(subject, chosen), subject.base.event_shape, given), settings)
    if context.max_steps is not None:
        most = context.max_steps
        shorter = {"steps": min(config.steps, most), "distil": {"steps": min(config.distil.steps, most)}}
        config = merged(config, shorter)
    return config


def about(subject: TuningSubject, chosen: ChosenReward) -> Results:
    """What a run is about, as its configuration keeps it."""
    if subject.data_moved is not None and subject.data is None:
        raise InputError(
            f"--data {subject.data_moved} is for bases of images, not for {subject.opened.name}: leave it out"
        )
    law = subject.tilted
    exact = (
        {}
        if law is None
        else {"means": law.means.tolist(), "covariances": law.covariances.tolist(), "weights": law.weights.tolist()}
    )
    return {
        "checkpoint": subject.opened.name,
        "checkpoint_sha256": subject.opened.digest,
        "reward": chosen.name,
        "reward_sha256": chosen.sha256,
        "strength": subject.strength,
        "data": subject.data,
        "data_moved": subject.data_moved,
        "law": exact or None,
    }


def _check_guidance(subject: TuningSubject, scale: float) -> None:
    """Refuse a scale that the base never saw: its map and its drift are made for those of its training."""
    network, name, checkpoint = subject.base.network, subject.opened.name, subject.opened.checkpoint
    training, scales = checkpoint.training, getattr(getattr(network, "config", None), "guidance", None)
    usual = scales if isinstance(scales, list | tuple) else [1.0]  # a table, as published maps have
    seen = [training["guidance"]] if checkpoint.tuned else training.get("condition", {}).get("guidance", usual)
    if not int(getattr(network, "num_classes", 0)) and scale != 1:
        raise InputError(f"--guidance {scale:g} needs a base with classes, and {name} has none: leave it out")
    if scale not in [float(w) for w in seen]:
        raise InputError(
            f"--guidance {scale:g}: {name} was trained at {', '.join(f'{w:g}' for w in seen)} and knows no "
            "posterior at another scale; tune at one of these, or train a base with --set condition.guidance=[…]"
        )


def tune(
    subject: TuningSubject, config: FinetuneConfig, context: Context, judged: tuning.TunedEvalConfig | None = None
) -> Results:
    """Tune; complete runs report, interrupted ones go on. ``judged``: how many samples the result is held to."""
    _check_guidance(subject, config.guidance)
    torch.set_num_threads(config.threads)
    tried = probe(config, make_problem(config, subject.base, subject.plain))
    if context.dry_run:
        return context.plan("finetune", config.model_dump(), _planned(subject, config, tried))
    rule = StopRule.of(config.stop)
    if rule is not None:
        rule.check(measurements(subject.others, config.tuned["drift"]))
    if context.resume not in ("auto", "none") and not Path(context.resume).is_dir():
        raise InputError(f"--resume {context.resume}: no such run; give auto or none, or the directory of a tuning run")
    make_student(config, subject.base)  # what cannot be made claims no directory
    reward = re.sub(r"[^\w.-]+", "-", Path(subject.reward_name).name).strip("-")
    usual = subject.opened.beside(f"finetune-{reward}-{subject.strength:g}")
    request = Request(context, "finetune", config.model_dump(), usual)
    out = context.out or usual
    if (out / "checkpoints").is_dir() and not (out / "run.json").exists():
        raise InputError(f"--out {out} holds the checkpoints of another run: choose another directory")
    done = request.begin()
    if done is not None:
        context.say(f"{request.out} is complete: {config.checkpoint} tuned to {config.reward}, λ = {config.strength:g}")
        return done
    context.say(
        f"λr on base samples: mean {tried.mean:.3g}, std {tried.std:.3g}; "
        f"the tilt rests on {tried.ess:.0f} of {PROBED} of them"
    )
    trained = _train(subject, config, request, tried)
    return _finish(subject, config, request, trained, tried, judged or subject.usual_judgement())


def _train(subject: TuningSubject, config: FinetuneConfig, request: Request, tried: Probe) -> Any:
    """The run, with its meters."""
    context, setup = request.context, subject.setup
    watched = Watched(subject.others, None if setup is None else setup.judge.features, subject.picture())
    try:
        with training_progress(context.say) as report:
            surroundings = TuningContext(subject.opened.device, context.resume, _data(subject, config), report, watched)
            return run_finetuning(config, subject.base, subject.reward, request.out, surroundings)
    except NonFiniteLoss as error:
        _forget(request.out)
        raise NonFiniteLoss(f"{error}; or a lower --strength ({tried.fitting:.2g})") from error
    except InputError:
        _forget(request.out)
        raise


def _finish(
    subject: TuningSubject,
    config: FinetuneConfig,
    request: Request,
    trained: Any,
    tried: Probe,
    judged: tuning.TunedEvalConfig,
) -> Results:
    """Judge the tuned model, draw its figures, write the results."""
    began, out = time.perf_counter(), request.out
    model = MetaFlowMap.from_pretrained(trained.result.checkpoint).to(subject.opened.device)
    conditions = make_problem(config, subject.base, subject.reward).conditions
    result = tuning.evaluate_tuned(model, subject.base, subject.judge, judged, config.seed, config.tuned, conditions)
    meters = kept_records(out / "drift" if config.map == "distil" else out, 2**62)
    metrics = {
        **result.to_json(),
        **_parameters(subject, config),
        "loss": trained.result.loss,
        "probe": tried._asdict(),
        "before": meters[0] if meters else {},
        "after": meters[-1] if meters else {},
        "summary": summary(config, result),
    }
    subject.draw(config, model, meters, tried.log_evidence, out)
    cost = {
        "seconds": sum(trained.seconds.values()),
        "seconds_by_stage": trained.seconds,
        "steps": trained.result.step,
        **trained.calls,
        "nfe": sum(trained.calls.values()),
        "seconds_of_judging": time.perf_counter() - began,
    }
    return request.write(metrics, cost, subject.opened.device)


def _parameters(subject: TuningSubject, config: FinetuneConfig) -> Results:
    trained = sum(p.numel() for p in make_student(config, subject.base).parameters() if p.requires_grad)
    return {"parameters": sum(p.numel() for p in subject.base.parameters()), "trained_parameters": trained}


def _planned(subject: TuningSubject, config: FinetuneConfig, tried: Probe) -> Results:
    """Count, and time a step of the first stage."""
    student = make_student(config, subject.base)
    objective = make_objective(config, make_problem(config, subject.base, subject.reward), _data(subject, config))
    seconds = 0.0
    for step in range(3):  # the first ones allocate and warm up
        began = time.perf_counter()
        batch = objective.batch(student, step).to(subject.opened.device)
        objective(student, batch).mean().backward()
        seconds = time.perf_counter() - began
    return {
        **_parameters(subject, config),
        "reward_mean": tried.mean,
        "reward_std": tried.std,
        "effective_base_samples": tried.ess,
        "seconds_per_step": seconds,
        "expected_seconds": seconds * config.steps,
    }


def _data(subject: TuningSubject, config: FinetuneConfig) -> Any:
    """The base's own data, where states are made from them."""
    return subject.source() if config.states.needs_data else None


def _forget(out: Path) -> None:
    """Take back what a start that failed before its first checkpoint wrote: it must not occupy the directory."""
    stages = [stage for stage in (out / "drift", out) if stage.is_dir()]
    if any(CheckpointStore(stage / "checkpoints").steps() for stage in stages if (stage / "checkpoints").is_dir()):
        return
    for stage in stages:
        for name in ("meters.jsonl", "metrics.jsonl", "timings.jsonl"):
            (stage / name).unlink(missing_ok=True)
        for place in (stage / "checkpoints", stage):
            if place.is_dir() and place != out and not any(place.iterdir()):
                place.rmdir()
