"""mfm finetune."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.checkpoint import CheckpointStore
from metaflowmaps.commands import pictures
from metaflowmaps.commands.rewards import chosen_reward, file_hash, image_reward_of
from metaflowmaps.commands.runs import write_results
from metaflowmaps.commands.scene import Scene, Wish
from metaflowmaps.commands.shared import (
    Results,
    Say,
    begun,
    beside,
    digest,
    law_of,
    open_model,
    panels,
    training_of,
    tuned,
)
from metaflowmaps.commands.stage import open_stage
from metaflowmaps.data import read_source
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.meters import Watched, kept_records, measurements
from metaflowmaps.finetuning.reward_probe import PROBED, probe
from metaflowmaps.finetuning.stop_rule import StopRule
from metaflowmaps.finetuning.tune import TuningContext, make_objective, make_problem, make_student, run_finetuning
from metaflowmaps.finetuning.tuning_config import FinetuneConfig, resolved
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate import tuning_error as tuning
from metaflowmaps.lab.evaluate.images.class_mixture import wished
from metaflowmaps.lab.evaluate.images.image_rewards import RACE, image_reward
from metaflowmaps.lab.evaluate.images.stage import ImageEvalConfig, Stage
from metaflowmaps.lab.evaluate.tuning_error import TunedEvalConfig, evaluate_tuned
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.figures import tuning_figures
from metaflowmaps.rewards import LinearGaussian, Tempered
from metaflowmaps.training.loop import NonFiniteLoss
from metaflowmaps.work import ranks
from metaflowmaps.work.config import merged, override
from metaflowmaps.work.progress import training_progress


def _on(reward: Any, device: torch.device) -> Any:
    return reward.to(device) if isinstance(reward, torch.nn.Module) else reward


class Subject:
    """A base checkpoint with its reward: everything that fine-tuning and its judgement are about."""

    def __init__(
        self,
        checkpoint: str,
        reward: str | None,
        strength: float,
        data: str | None,
        device: str,
        vae: str | None = None,
    ) -> None:
        self.base, self.found, self.device = open_model(checkpoint, device)
        self.name, self.strength, self.moved = checkpoint, strength, data
        given, known, self.reward_name = chosen_reward(reward, 1.0, self.found)
        self.plain: Callable[..., Tensor] = (
            image_reward_of(self.reward_name, 1.0, checkpoint, self.found, self.base, data) if given is None else given
        )
        self.scene = Scene(self.base, self.found, Wish(vae=vae), 1)
        if self.scene.latent:
            self.plain = self.scene.on_samples(_on(self.plain, self.device))
        self.known = None
        if known is not None:
            self.known = LinearGaussian(known.A, known.y, known.noise_std, known.strength * strength)
        self.law = law_of(self.found)
        source = read_source(self.found.config.get("training", {}))
        self.data = None if source is None or source.law() is not None else source

    @property
    def reward(self) -> Callable[..., Tensor]:
        """λr."""
        if self.known is not None:
            return self.known
        return self.plain if self.strength == 1 else Tempered(self.plain, self.strength)

    @property
    def tilted(self) -> Any:
        """The exact tilted law, where it is known; classes are tilted one by one, and their mixture is another law."""
        if self.law is None or self.known is None or getattr(self.base.network, "num_classes", None):
            return None
        return self.law.tilt(self.known)

    def source(self) -> Any:
        """The base's own data, where they are known."""
        if self.law is not None:
            return self.law
        if self.data is None:
            return None
        return (self.data.moved(self.moved) if self.moved else self.data).load()[0]

    def stage(self) -> Stage | None:
        """What judges images, which must be at hand; None for vectors and latents: the reward alone judges those."""
        if self.data is None or self.scene.latent:
            return None
        stage, _ = open_stage(self.name, self.found, self.base, ImageEvalConfig(drift="none", data=self.moved))
        return stage


def resolve_finetuning(
    subject: Subject, given: dict[str, Any], settings: Sequence[str], max_steps: int | None
) -> FinetuneConfig:
    """The configuration of a run: the defaults of its kind, options, --set, --max-steps."""
    law = subject.tilted
    _check_settings(subject, settings)
    start: dict[str, Any] = {
        "checkpoint": subject.name,
        "checkpoint_sha256": digest(subject.found),
        "reward": subject.reward_name,
        "reward_sha256": file_hash(subject.reward_name).get("reward_sha256"),
        "strength": subject.strength,
        "data": subject.data,
        "data_moved": subject.moved,
        "law": None if law is None else {
            "means": law.means.tolist(), "covariances": law.covariances.tolist(), "weights": law.weights.tolist()
        },
    }  # fmt: skip
    config = override(resolved(start, subject.base.event_shape, given), settings)
    _check_guidance(subject, config.guidance)
    if max_steps is not None:
        shorter = {"steps": min(config.steps, max_steps), "distil": {"steps": min(config.distil.steps, max_steps)}}
        config = merged(config, shorter)
    return config


GIVEN = {  # settings that say what the run is about
    "strength": "--strength", "reward": "--reward", "checkpoint": "the CHECKPOINT argument", "data": "",
    "law": "", "tuned": "", "recipe": "", "checkpoint_sha256": "", "reward_sha256": "", "data_moved": "",
}  # fmt: skip


def _check_settings(subject: Subject, settings: Sequence[str]) -> None:
    """Refuse settings that would contradict what was opened."""
    for setting in settings:
        key = setting.partition("=")[0].strip().partition(".")[0]
        if key in GIVEN:
            raise InputError(f"--set {setting}: " + (f"give it as {GIVEN[key]}" if GIVEN[key] else "leave it out"))
    if subject.moved is not None and subject.data is None:
        raise InputError(f"--set data={subject.moved} is for bases of images, not for {subject.name}: leave it out")


def _check_guidance(subject: Subject, scale: float) -> None:
    """Refuse a scale that the base never saw: its map and its drift are made for those of its training."""
    training = training_of(subject.found)
    scales = getattr(getattr(subject.base.network, "config", None), "guidance", None)  # a table, as published maps have
    usual = scales if isinstance(scales, list) else [1.0]
    seen = [training["guidance"]] if tuned(subject.found) else training.get("condition", {}).get("guidance", usual)
    classes = int(getattr(subject.base.network, "num_classes", 0))
    if not classes and scale != 1:
        raise InputError(f"--guidance {scale:g} needs a base with classes, and {subject.name} has none: leave it out")
    if scale not in [float(w) for w in seen]:
        raise InputError(
            f"--guidance {scale:g}: {subject.name} was trained at {', '.join(f'{w:g}' for w in seen)} and knows no "
            "posterior at another scale; tune at one of these, or train a base with --set condition.guidance=[…]"
        )


def default_place(subject: Subject, checkpoint: str) -> Path:
    """Where a run goes without --out."""
    reward = re.sub(r"[^\w.-]+", "-", Path(subject.reward_name).name).strip("-")
    return beside(checkpoint, subject.found, f"finetune-{reward}-{subject.strength:g}")


def finetune(
    subject: Subject, config: FinetuneConfig, out: Path, resume: str, invocation: str, say: Say,
    judged: TunedEvalConfig | None = None,
) -> Results:  # fmt: skip
    """Tune in ``out``; complete runs report, interrupted ones go on."""
    ranks.alone("mfm finetune")
    torch.set_num_threads(config.threads)
    if judged is None:
        few = TunedEvalConfig(samples=256 if subject.scene.latent else 2048, seeds=1, ode_steps=50)
        judged = few if len(subject.base.event_shape) == 3 else TunedEvalConfig()
    tried = probe(config, make_problem(config, subject.base, subject.plain))
    stage = subject.stage()
    others = others_of(subject, stage)
    rule = StopRule.of(config.stop)
    if rule is not None:
        rule.check(measurements(others, config.tuned["drift"]))
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        raise InputError(f"--resume {resume}: no such run; give auto or none, or the directory of a tuning run")
    if (out / "checkpoints").is_dir() and not (out / "run.json").exists():
        raise InputError(f"--out {out} holds the checkpoints of another run: choose another directory")
    made = make_student(config, subject.base)
    parameters = {
        "parameters": sum(p.numel() for p in subject.base.parameters()),
        "trained_parameters": sum(p.numel() for p in made.parameters() if p.requires_grad),
    }
    done = begun(out, "finetune", config.model_dump())
    if done is not None:
        say(f"{out} is complete: {subject.name} tuned to {config.reward}, λ = {config.strength:g}")
        return done
    say(
        f"λr on base samples: mean {tried.mean:.3g}, std {tried.std:.3g}; "
        f"the tilt rests on {tried.ess:.0f} of {PROBED} of them"
    )
    try:
        with training_progress(say) as report:
            watched = Watched(others, None if stage is None else stage.judge.features, _picture(subject))
            context = TuningContext(subject.device, resume, _data(subject, config), report, watched)
            run = run_finetuning(config, subject.base, subject.reward, out, context)
    except NonFiniteLoss as error:
        _forget(out)
        raise NonFiniteLoss(f"{error}; or a lower --strength ({tried.fitting:.2g})") from error
    except InputError:
        _forget(out)
        raise
    began = time.perf_counter()
    model = MetaFlowMap.from_pretrained(run.result.checkpoint).to(subject.device)
    problem = make_problem(config, subject.base, subject.reward)
    metrics = evaluate_tuned(
        model, subject.base, judge_of(subject, stage, others), judged, config.seed,
        config.tuned, problem.conditions,
    )  # fmt: skip
    meters = kept_records(out / "drift" if config.map == "distil" else out, 2**62)
    metrics |= {
        **parameters, "loss": run.result.loss, "probe": tried._asdict(),
        "before": meters[0] if meters else {}, "after": meters[-1] if meters else {},
        "tables": tuning.tables(metrics), "summary": _summary(config, metrics),
    }  # fmt: skip
    _draw(subject, config, model, meters, tried.log_evidence, out)
    cost = {
        "seconds": sum(run.seconds.values()), "seconds_by_stage": run.seconds, "steps": run.result.step,
        **run.calls, "nfe": sum(run.calls.values()), "seconds_of_judging": time.perf_counter() - began,
    }  # fmt: skip
    results = write_results(
        out, "finetune", config.model_dump(), metrics, cost, seed=config.seed, device=subject.device,
        invocation=invocation,
    )  # fmt: skip
    return {**results, "out": str(out / "results.json")}


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


def dry_run(subject: Subject, config: FinetuneConfig) -> Results:
    """Resolve, try the reward, count, time a step of the first stage; write nothing."""
    torch.set_num_threads(config.threads)
    tried = probe(config, make_problem(config, subject.base, subject.plain))
    problem = make_problem(config, subject.base, subject.reward)
    student = make_student(config, subject.base)
    objective = make_objective(config, problem, _data(subject, config))
    seconds = 0.0
    for step in range(3):  # the first ones allocate and warm up
        began = time.perf_counter()
        batch = objective.batch(student, step).to(subject.device)
        objective(student, batch).mean().backward()
        seconds = time.perf_counter() - began
    parameters = sum(p.numel() for p in student.parameters())
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    metrics = {
        "parameters": parameters, "trained_parameters": trained, "reward_mean": tried.mean, "reward_std": tried.std,
        "effective_base_samples": tried.ess, "seconds_per_step": seconds, "expected_seconds": seconds * config.steps,
    }  # fmt: skip
    config_ = config.model_dump()
    return {"schema": 1, "command": "finetune", "dry_run": True, "config": config_, "metrics": metrics, "cost": {}}


def _data(subject: Subject, config: FinetuneConfig) -> Any:
    """The base's own data, where states are made from them."""
    return subject.source() if config.states.needs_data else None


# -- internals -----------------------------------------------------------------------------------------


def others_of(subject: Subject, stage: Stage | None) -> dict[str, Callable[..., Tensor]]:
    """Rewards that are watched and not trained on."""
    if stage is None:
        return {}
    own = subject.reward_name.partition(":")[0]
    usable = [name for name in (*RACE, "ink") if name != own and (name != "margin" or stage.guide is not None)]
    return {name: image_reward(stage, name) for name in usable}


def judge_of(subject: Subject, stage: Stage | None, others: dict[str, Callable[..., Tensor]]) -> tuning.SampleJudge:
    if stage is not None:
        wish = wished(stage) if subject.reward_name == "mixture" and stage.train.labels is not None else None
        return tuning.ImageJudge(stage, subject.reward, others, wish)
    if subject.law is not None and subject.known is not None and subject.tilted is not None:
        return tuning.MixtureJudge(subject.law, subject.known)
    return tuning.PlainJudge(subject.reward)


def _picture(subject: Subject) -> Callable[[Tensor, Path], None] | None:
    if len(subject.base.event_shape) == 3:
        shown = subject.scene.pictures if subject.scene.latent else torch.Tensor.cpu
        return lambda x, file: pictures.samples_grid(
            shown(x[: pictures.GRID]), f"Samples at {file.stem.replace('-', ' ')}", file
        )
    if subject.base.event_shape == (2,):
        law = subject.tilted
        return lambda x, file: _save_scatter(x, law, file)
    return None


def _save_scatter(x: Tensor, law: Any, file: Path) -> None:
    figures.save(figures.scatter(x.cpu(), f"Samples at {file.stem.replace('-', ' ')}", law), file)


def _draw(
    subject: Subject,
    config: FinetuneConfig,
    model: MetaFlowMap,
    meters: list[dict[str, Any]],
    evidence: float,
    out: Path,
) -> None:
    """The figures of a finished run."""
    has_map = config.tuned["map"]
    sampler = "map-1" if has_map else "ode-50"
    words = "one network call each" if has_map else "50 steps of the drift"
    title = f"Tuned to {config.reward}, λ = {config.strength:g}:\n{words}"
    if len(subject.base.event_shape) == 3:
        x = torch.cat([tuning.drawn(subject.base, sampler, 32, 7), tuning.drawn(model, sampler, 32, 7)])
        x = subject.scene.pictures(x) if subject.scene.latent else x
        shown = f"Base (two rows) and tuned to {config.reward}, λ = {config.strength:g}"
        pictures.samples_grid(x, shown, out / "samples.png")
    elif subject.base.event_shape == (2,):
        x = tuning.drawn(model, sampler, 4000, 7)
        figures.save(figures.scatter(x.cpu(), title, subject.tilted), out / "samples.png")
        if all(config.tuned.values()) and subject.tilted is not None:
            figures.save(panels(model, subject.tilted, config.seed), out / "posteriors.png")
    figures.save(figures.training_curve(out / "metrics.jsonl"), out / "training.png")
    if len(meters) > 1:
        figures.save(tuning_figures.meters(meters, config.reward, evidence), out / "meters.png")


def _summary(config: FinetuneConfig, metrics: dict[str, Any]) -> str:
    first, base = next(iter(metrics["samplers"])), metrics["base"]
    cell, before = metrics["samplers"][first], base["map-1"]
    if "reward" not in cell:
        return f"Tuned to {config.reward} with λ = {config.strength:g}: no finite samples are left."
    near = f" Sliced W2 to the exact tilted law is {cell['ratio']:.2f} times its floor." if "ratio" in cell else ""
    return (
        f"Tuned to {config.reward} with λ = {config.strength:g} by {config.method.titled()}: mean λr "
        f"{cell['reward']:.3g} by {tuning.sampler_title(first)}, {before['reward']:.3g} before; mean distance between "
        f"samples {cell['distance']:.3g}, {before['distance']:.3g} before.{near}"
    )
