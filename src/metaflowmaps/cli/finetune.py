"""Put a reward into the weights: a map that samples p_1 e^{λr} without guidance. Run it again to go on."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from metaflowmaps.cli.context import TRAINS, Context, Name, OnCheckpoint, Results
from metaflowmaps.cli.results import Request
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.reward_probe import PROBED
from metaflowmaps.finetuning.tuning_config import FinetuneConfig, resolved
from metaflowmaps.finetuning.tuning_objective import TuningObjective
from metaflowmaps.lab.evaluate.tuning_error import TunedEvalConfig
from metaflowmaps.lab.evaluate.tuning_run import TuningRun, about
from metaflowmaps.lab.evaluate.tuning_subject import TuningSubject
from metaflowmaps.lab.named_rewards import REWARD_HELP, ChosenReward, choose_reward
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.sample_pictures import PictureOptions, SamplePictures
from metaflowmaps.work import ranks
from metaflowmaps.work.choices import choices
from metaflowmaps.work.config import merged, override

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

    def next_command(self, results: Results, folder: str) -> str:
        """Samples of what was tuned, whose map belongs to its drift unless none was asked for."""
        return f"mfm sample {folder}" + (" --method ode" if results["config"].get("map") == "none" else "")


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
    defaults = resolved(about(subject, chosen.name, chosen.sha256), subject.base.event_shape, given)
    config, most = override(defaults, settings), context.max_steps
    if most is None:
        return config
    return merged(config, {"steps": min(config.steps, most), "distil": {"steps": min(config.distil.steps, most)}})


def tune(
    subject: TuningSubject, config: FinetuneConfig, context: Context, judged: TunedEvalConfig | None = None
) -> Results:
    """Tune; complete runs report, interrupted ones go on. ``judged``: how many samples the result is held to."""
    tuning = TuningRun.ready(subject, config)
    tried = tuning.tried
    if context.dry_run:
        return context.plan("finetune", config.model_dump(), tuning.planned())
    if context.resume not in ("auto", "none") and not Path(context.resume).is_dir():
        raise InputError(f"--resume {context.resume}: no such run; give auto or none, or the directory of a tuning run")
    tuning.check()
    reward = re.sub(r"[^\w.-]+", "-", Path(subject.reward_name).name).strip("-")
    request = Request(
        context, "finetune", config.model_dump(), subject.opened.beside(f"finetune-{reward}-{subject.strength:g}")
    )
    out = context.out or request.out
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
    trained = tuning.train(request.out, context.resume, context.say)
    metrics, cost = tuning.judge(trained, request.out, judged)
    return request.write(metrics, cost, subject.opened.device)
