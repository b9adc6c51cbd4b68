"""The image experiments: posterior, value, generation and three of steering, on a map of images or of latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from metaflowmaps.checkpoint import Checkpoint
from metaflowmaps.errors import InputError
from metaflowmaps.interop.opening import is_latent, stored
from metaflowmaps.lab.evaluate.images.assemble import chosen_features, equip, open_setup
from metaflowmaps.lab.evaluate.images.class_mixture import ClassMixture, MixtureConfig
from metaflowmaps.lab.evaluate.images.experiment import ImageExperiment
from metaflowmaps.lab.evaluate.images.generation import Generation, GenerationConfig
from metaflowmaps.lab.evaluate.images.inverse_problems import Inverse, InverseConfig
from metaflowmaps.lab.evaluate.images.race import Race, RaceConfig
from metaflowmaps.lab.evaluate.images.recovery import Recovery, RecoveryConfig
from metaflowmaps.lab.evaluate.images.rollout_value import ImageValue, ImageValueConfig
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig, ImageSetup, Say
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.lab.figures import result_figures as figures
from metaflowmaps.lab.opened import OpenedModel, images_of

Draw = Callable[[Path], dict[str, str]]  # writes the figures into a folder, and says what they show


class Experiment(NamedTuple):
    """One question: the command that asks it, its configuration, what answers it, and the figures of an answer."""

    command: str
    config: type[ImageEvalConfig]
    kind: type[ImageExperiment[Any, Any]]
    figures: Callable[[Any, Any, Path], dict[str, str]]

    def run(self, setup: ImageSetup, config: ImageEvalConfig, say: Say) -> tuple[Json, Draw]:
        """Metrics, and what draws the figures."""
        result = self.kind(setup, config, say).run()
        return result.metrics, lambda out: self.figures(result, config, out)


EXPERIMENTS = {
    "posterior": Experiment(
        "eval posterior",
        RecoveryConfig,
        Recovery,
        lambda result, config, out: figures.recovery(result, config.times, out),
    ),
    "value": Experiment(
        "eval value", ImageValueConfig, ImageValue, lambda result, config, out: figures.value(result, out)
    ),
    "generation": Experiment(
        "eval generation", GenerationConfig, Generation, lambda result, config, out: figures.generation(result, out)
    ),
    "class-mixture": Experiment(
        "eval steering", MixtureConfig, ClassMixture, lambda result, config, out: figures.mixture(result, out)
    ),
    "race": Experiment("eval steering", RaceConfig, Race, lambda result, config, out: figures.race(result, out)),
    "inverse": Experiment(
        "eval steering",
        InverseConfig,
        Inverse,
        lambda result, config, out: figures.inverse(result, config.draws, out),
    ),
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
) -> tuple[ImageSetup, dict[str, object]]:
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
