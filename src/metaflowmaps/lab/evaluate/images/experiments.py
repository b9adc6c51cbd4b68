"""The image experiments: posterior, value, generation and three of steering, on a map of images or of latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from metaflowmaps.checkpoint import Checkpoint
from metaflowmaps.errors import InputError
from metaflowmaps.interop.opening import is_latent, stored
from metaflowmaps.lab.evaluate.images.assemble import chosen_features, equip, open_stage
from metaflowmaps.lab.evaluate.images.class_mixture import MixtureConfig, evaluate_mixture
from metaflowmaps.lab.evaluate.images.generation import GenerationConfig, evaluate_generation
from metaflowmaps.lab.evaluate.images.inverse_problems import InverseConfig, evaluate_inverse
from metaflowmaps.lab.evaluate.images.race import RaceConfig, evaluate_race
from metaflowmaps.lab.evaluate.images.recovery import RecoveryConfig, evaluate_recovery
from metaflowmaps.lab.evaluate.images.rollout_value import ImageValueConfig, evaluate_image_value
from metaflowmaps.lab.evaluate.images.stage import ImageEvalConfig, Stage
from metaflowmaps.lab.figures import result_figures as figures
from metaflowmaps.lab.opened import OpenedModel, images_of

Say = Callable[[str], None]
Measured = tuple[dict[str, Any], Callable[[Path], dict[str, str]]]  # metrics; what writes the figures -> captions


class Experiment(NamedTuple):
    """One question: the command that asks it, its configuration, and what answers it."""

    command: str
    config: type[ImageEvalConfig]
    run: Callable[[Stage, Any, Say], Measured]


def _recovery(stage: Stage, config: RecoveryConfig, say: Say) -> Measured:
    result = evaluate_recovery(stage, config, say)
    return result.metrics, lambda out: figures.recovery(result, config.times, out)


def _value(stage: Stage, config: ImageValueConfig, say: Say) -> Measured:
    metrics = evaluate_image_value(stage, config, say)
    return metrics, lambda out: figures.value(metrics, out)


def _mixture(stage: Stage, config: MixtureConfig, say: Say) -> Measured:
    result = evaluate_mixture(stage, config, say)
    return result.metrics, lambda out: figures.mixture(result, out)


def _race(stage: Stage, config: RaceConfig, say: Say) -> Measured:
    result = evaluate_race(stage, config, say)
    return result.metrics, lambda out: figures.race(result, out)


def _inverse(stage: Stage, config: InverseConfig, say: Say) -> Measured:
    result = evaluate_inverse(stage, config, say)
    return result.metrics, lambda out: figures.inverse(result, config.draws, out)


def _generation(stage: Stage, config: GenerationConfig, say: Say) -> Measured:
    result = evaluate_generation(stage, config, say)
    return result.metrics, lambda out: figures.generation(result, out)


EXPERIMENTS = {
    "posterior": Experiment("eval posterior", RecoveryConfig, _recovery),
    "value": Experiment("eval value", ImageValueConfig, _value),
    "generation": Experiment("eval generation", GenerationConfig, _generation),
    "class-mixture": Experiment("eval steering", MixtureConfig, _mixture),
    "race": Experiment("eval steering", RaceConfig, _race),
    "inverse": Experiment("eval steering", InverseConfig, _inverse),
}
STEERING = ("class-mixture", "race", "inverse")  # of images; of latents the race alone
PIXELS_ONLY = ("class-mixture", "inverse")


def on_images(checkpoint: Checkpoint) -> bool:
    """Whether this is a map of images or of latents, and not of a mixture; published ones have an autoencoder."""
    return images_of(checkpoint) is not None or "vae" in stored(checkpoint)


def usual_steering(checkpoint: Checkpoint) -> str:
    """The steering experiment where none is named: the class mixture, or of latents the race."""
    latent = "vae" in stored(checkpoint) or checkpoint.training.get("data", {}).get("name") == "latents"
    return "race" if latent else "class-mixture"


def prepare(
    name: str, opened: OpenedModel, config: ImageEvalConfig, named: Callable[[str], Any], kinds: tuple[str, ...]
) -> tuple[Stage, dict[str, Any]]:
    """The stage of an experiment, and what tells it from others.

    Args:
        name: the experiment.
        opened: the map.
        config: its configuration.
        named: a reward on pictures by its text, or None.
        kinds: what such texts begin with.
    """
    if name in PIXELS_ONLY and (is_latent(opened.model) or "vae" in opened.stored):
        raise InputError(
            f"{name} looks at pixels and at classifiers of them, {opened.name} makes latents: mfm eval steering "
            f"{opened.name} --task race takes any reward on pictures"
        )
    judging = config.model_copy(update={"features": chosen_features(config, opened.model)})
    alone = name == "generation" and judging.features == "inception" and config.statistics is not None
    stage, sources = open_stage(opened, judging, alone)
    sources |= equip(stage, opened, judging, named, kinds)
    return stage, {"checkpoint": opened.digest, "experiment": name, **config.asked(), **sources}
