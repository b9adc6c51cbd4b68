"""The image experiments: posterior, value, generation and three of steering, on a map of images or of latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from metaflowmaps.checkpoint import Checkpoint
from metaflowmaps.errors import InputError
from metaflowmaps.interop.opening import is_latent, stored
from metaflowmaps.lab.evaluate.images.assemble import chosen_features, equip, open_setup
from metaflowmaps.lab.evaluate.images.class_mixture import MixtureConfig, evaluate_mixture
from metaflowmaps.lab.evaluate.images.generation import GenerationConfig, evaluate_generation
from metaflowmaps.lab.evaluate.images.inverse_problems import InverseConfig, evaluate_inverse
from metaflowmaps.lab.evaluate.images.race import RaceConfig, evaluate_race
from metaflowmaps.lab.evaluate.images.recovery import RecoveryConfig, evaluate_recovery
from metaflowmaps.lab.evaluate.images.rollout_value import ImageValueConfig, evaluate_image_value
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig, ImageSetup
from metaflowmaps.lab.figures import result_figures as figures
from metaflowmaps.lab.opened import OpenedModel, images_of

Say = Callable[[str], None]
Measured = tuple[dict[str, Any], Callable[[Path], dict[str, str]]]  # metrics; what writes the figures -> captions


class Experiment(NamedTuple):
    """One question: the command that asks it, its configuration, and what answers it."""

    command: str
    config: type[ImageEvalConfig]
    run: Callable[[ImageSetup, Any, Say], Measured]


def _recovery(setup: ImageSetup, config: RecoveryConfig, say: Say) -> Measured:
    result = evaluate_recovery(setup, config, say)
    return result.metrics, lambda out: figures.recovery(result, config.times, out)


def _value(setup: ImageSetup, config: ImageValueConfig, say: Say) -> Measured:
    metrics = evaluate_image_value(setup, config, say)
    return metrics, lambda out: figures.value(metrics, out)


def _mixture(setup: ImageSetup, config: MixtureConfig, say: Say) -> Measured:
    result = evaluate_mixture(setup, config, say)
    return result.metrics, lambda out: figures.mixture(result, out)


def _race(setup: ImageSetup, config: RaceConfig, say: Say) -> Measured:
    result = evaluate_race(setup, config, say)
    return result.metrics, lambda out: figures.race(result, out)


def _inverse(setup: ImageSetup, config: InverseConfig, say: Say) -> Measured:
    result = evaluate_inverse(setup, config, say)
    return result.metrics, lambda out: figures.inverse(result, config.draws, out)


def _generation(setup: ImageSetup, config: GenerationConfig, say: Say) -> Measured:
    result = evaluate_generation(setup, config, say)
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
) -> tuple[ImageSetup, dict[str, Any]]:
    """The setup of an experiment, and what tells it from others.

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
    setup, sources = open_setup(opened, judging, alone)
    sources |= equip(setup, opened, judging, named, kinds)
    return setup, {"checkpoint": opened.digest, "experiment": name, **config.asked(), **sources}
