"""What a fine-tuning is about, and how it is judged: the base, the reward, the law or the images it is held to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.data import DataSource, read_source
from metaflowmaps.finetuning.tuning_config import FinetuneConfig
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate import tuning_error as tuning
from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.class_mixture import wanted_mixture
from metaflowmaps.lab.evaluate.images.image_rewards import RACE, image_reward
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig, ImageSetup
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.lab.figures import plots, result_figures, tuning_figures
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.rewards import LinearGaussian, Tempered

Reward = Callable[..., Tensor]
SHOWN_SEED = 7  # of the samples in pictures


@dataclass
class TuningSubject:
    """A base checkpoint with its reward.

    Args:
        opened: the base.
        reward_name: how the reward is typed.
        plain: the reward on samples, of strength 1.
        strength: λ.
        data_moved: where the base's images are now, where they have been moved.
        decode: pictures of samples; None where samples are pictures, or vectors.
    """

    opened: OpenedModel
    reward_name: str
    plain: Reward
    strength: float = 1.0
    data_moved: str | None = None
    decode: Callable[[Tensor], Tensor] | None = None

    @property
    def base(self) -> MetaFlowMap:
        """The map that is tuned."""
        return self.opened.model

    @property
    def known(self) -> LinearGaussian | None:
        """λr, where mixtures can be tilted by it exactly."""
        if not isinstance(self.plain, LinearGaussian):
            return None
        return LinearGaussian(self.plain.A, self.plain.y, self.plain.noise_std, self.plain.strength * self.strength)

    @property
    def reward(self) -> Reward:
        """λr."""
        if self.known is not None:
            return self.known
        return self.plain if self.strength == 1 else Tempered(self.plain, self.strength)

    @property
    def tilted(self) -> GaussianMixture | None:
        """The exact tilted law, where it is known; classes are tilted one by one, and their mixture is another law."""
        law, known = self.opened.law, self.known
        classes = getattr(self.base.network, "num_classes", None)
        return None if law is None or known is None or classes else law.tilt(known)

    @property
    def data(self) -> DataSource | None:
        """The examples that the base was trained on, where they are examples of no known law."""
        source = read_source(self.opened.checkpoint.config.get("training", {}))
        return None if source is None or source.law() is not None else source

    def source(self) -> Any:
        """The base's own data, where they are known: its law or its examples."""
        if self.opened.law is not None or self.data is None:
            return self.opened.law
        return (self.data.moved(self.data_moved) if self.data_moved else self.data).load()[0]

    # -- judging -----------------------------------------------------------------------------------------------------

    @cached_property
    def setup(self) -> ImageSetup | None:
        """What judges images, which must be at hand; None for vectors and latents: the reward alone judges those."""
        if self.data is None or self.decode is not None:
            return None
        return open_setup(self.opened, ImageEvalConfig(drift="none", data=self.data_moved))[0]

    @cached_property
    def others(self) -> dict[str, Reward]:
        """Rewards that are watched and not trained on."""
        setup, own = self.setup, self.reward_name.partition(":")[0]
        if setup is None:
            return {}
        usable = [name for name in (*RACE, "ink") if name != own and (name != "margin" or setup.guide is not None)]
        return {name: image_reward(setup, name) for name in usable}

    @property
    def judge(self) -> tuning.SampleJudge:
        """What samples of the tuned model are held to: its exact law, images, or the reward alone."""
        setup = self.setup
        if setup is not None:
            wanted = wanted_mixture(setup) if self.reward_name == "mixture" and setup.train.labels is not None else None
            return tuning.ImageJudge(setup, self.reward, self.others, wanted)
        if self.opened.law is not None and self.known is not None and self.tilted is not None:
            return tuning.MixtureJudge(self.opened.law, self.known)
        return tuning.PlainJudge(self.reward)

    def usual_judgement(self) -> tuning.TunedEvalConfig:
        """How many samples are looked at."""
        if not self.opened.is_pictorial:
            return tuning.TunedEvalConfig()
        return tuning.TunedEvalConfig(samples=2048 if self.decode is None else 256, seeds=1, ode_steps=50)

    # -- showing -----------------------------------------------------------------------------------------------------

    def picture(self) -> Callable[[Tensor, Path], None] | None:
        """What draws samples on the way; None for what cannot be shown."""
        if not (self.opened.is_pictorial or self.opened.is_planar):
            return None
        law = self.tilted

        def draw(x: Tensor, file: Path) -> None:
            title = f"Samples at {file.stem.replace('-', ' ')}"
            if self.opened.is_planar:
                plots.save(plots.scatter(x.cpu(), title, law), file)
            else:
                result_figures.samples_grid(self._shown(x[: result_figures.GRID]), title, file)

        return draw

    def draw(self, config: FinetuneConfig, model: MetaFlowMap, meters: list[Json], evidence: float, out: Path) -> None:
        """The figures of a finished run."""
        has_map = config.tuned["map"]
        sampler, tuned = "map-1" if has_map else "ode-50", f"uned to {config.reward}, λ = {config.strength:g}"
        if self.opened.is_pictorial:
            x = torch.cat([tuning.drawn(m, sampler, 32, SHOWN_SEED) for m in (self.base, model)])
            result_figures.samples_grid(self._shown(x), f"Base (two rows) and t{tuned}", out / "samples.png")
        elif self.opened.is_planar:
            x = tuning.drawn(model, sampler, 4000, SHOWN_SEED)
            words = "one network call each" if has_map else "50 steps of the drift"
            plots.save(plots.scatter(x.cpu(), f"T{tuned}:\n{words}", self.tilted), out / "samples.png")
            if all(config.tuned.values()) and self.tilted is not None:
                plots.save(result_figures.panels(model, self.tilted, config.seed), out / "posteriors.png")
        plots.save(plots.training_curve(out / "metrics.jsonl"), out / "training.png")
        if len(meters) > 1:
            plots.save(tuning_figures.meters(meters, config.reward, evidence), out / "meters.png")

    def _shown(self, x: Tensor) -> Tensor:
        return x.cpu() if self.decode is None else self.decode(x)


def summary(config: FinetuneConfig, result: tuning.TunedResult) -> str:
    """What came of a tuning, in a sentence."""
    name, cell = next(iter(result.samplers.items()))
    now, before = cell.judged, result.base["map-1"].judged
    if now.reward is None:
        return f"Tuned to {config.reward} with λ = {config.strength:g}: no finite samples are left."
    near = f" Sliced W2 to the exact tilted law is {now.ratio:.2f} times its floor." if now.ratio is not None else ""
    return (
        f"Tuned to {config.reward} with λ = {config.strength:g} by {config.method.titled()}: mean λr "
        f"{now.reward:.3g} by {tuning.sampler_title(name)}, {before.reward:.3g} before; mean distance between "
        f"samples {now.distance:.3g}, {before.distance:.3g} before.{near}"
    )
