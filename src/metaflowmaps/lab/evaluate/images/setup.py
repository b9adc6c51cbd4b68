r"""What every image experiment stands on: the map, the data it was not trained on, and a judge.

The **judge** is a classifier that no sampler ever sees: samples are compared in its features (a Fréchet distance *in
classifier features*, not "FID"), and it names their classes. Rewards use another classifier, the **guide**, of another
architecture and seed: a reward that is raised by fooling the guide does not fool the judge. Without a judge images are
compared in the leading principal components of the training images, and classes are not named.

A map of **latents** has an autoencoder beside it: rewards and judges of pictures see what it decodes. Then samples are
compared in Inception's features where torch-fidelity is there, and to a statistics file where one is given: that, and
nothing else here, is FID. A map that knows **classes** is told one for every sample, with the guidance that is asked
for: each class as often as any other, or the held-out image's own where one is noised. Of data larger than memory, a
seeded choice is looked at.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from metaflowmaps._shapes import Cond
from metaflowmaps.data import Examples
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.images.judging import BATCH, PART, Judge
from metaflowmaps.metrics.diversity import mean_pairwise_distance, vendi_score
from metaflowmaps.metrics.frechet import Moments, frechet_distance
from metaflowmaps.path import Drift, call_drift
from metaflowmaps.pipeline import Pipeline
from metaflowmaps.random import stream
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.steering import SteerResult
from metaflowmaps.work.config import Config
from metaflowmaps.work.shards import Shard, ShardFolder

LATENT_BATCH = 128  # latents of a cell, and rows of a network at a time
MOST = 10_000  # of encoded pictures, that are looked at
Say = Callable[[str], None]
R = TypeVar("R")
ALL = slice(None)
LATENT_SETTINGS = ("vae", "features", "inception", "statistics", "guidance", "labels", "precision", "pictures")


class ImageEvalConfig(Config):
    """What every image experiment can be told: whose classifiers, which drift, where the images are now."""

    guide: str | None = None  # None: NAME-guide beside the run, or the shipped one; NAME is that of the data set
    judge: str | None = None
    drift: str | None = None  # None: the run's own drift setup, or the shipped one; "none": the map's own drift alone
    data: str | None = None  # None: where the map was trained from; a map of latents: what mfm encode-latents wrote
    seed: int = Field(0, ge=0)
    vae: str | None = None  # of a map of latents; None: as its checkpoint names it
    features: Literal["auto", "classifier", "components", "inception"] = "auto"  # auto: inception, for latents
    inception: str | None = None  # torch-fidelity's weights; None: it fetches its own
    statistics: str | None = None  # an .npz with mu and sigma: Fréchet distances are to it
    guidance: float | None = None  # None: the usual one of the checkpoint
    labels: Literal["auto", "none", "uniform", "data"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"  # of the map's network
    pictures: int | None = Field(None, ge=2)  # held out, and trained on, at most; None: 10,000 latents, all of images

    def asked(self) -> dict[str, object]:
        """The settings; of those that only some maps have, the ones that were set."""
        defaults = type(self).model_fields
        return {
            key: value
            for key, value in self.model_dump().items()
            if key not in LATENT_SETTINGS or value != defaults[key].default
        }

    def calls(self) -> int:
        """Evaluations of the map's network that the experiment takes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Conditions:
    """What the map is told of each sample, and what its network computes in."""

    pipe: Pipeline
    labels: str = "auto"  # as ImageEvalConfig has it
    guidance: float | None = None
    conditional: bool = True  # does it know classes, and are they asked for?

    def of(self, labels: Tensor | None, n: int) -> Cond:
        """``cond`` of n samples; None where nothing is asked for."""
        if labels is None and self.guidance is None:
            return None
        return self.pipe.condition(labels, self.guidance, n)

    def title(self) -> str:
        """As tables say it."""
        if not self.conditional:
            return "Unconditional samples"
        scale = self.pipe.guidance if self.guidance is None else self.guidance
        return "Samples of all classes" + (f", guidance {scale:g}" if scale is not None else "")


@dataclass
class ImageSetup:
    """A map with everything that judges it."""

    model: MetaFlowMap
    train: Examples
    held_out: Examples
    judge: Judge
    guide: nn.Module | None = None
    drift: Drift | None = None  # (t, x) -> b, of a model trained for that alone; None: the map's own
    shards: ShardFolder | None = None  # where what is drawn is kept, and shared with other processes; None: nowhere
    shard: int = BATCH  # samples of a cell that is cut by their indices
    open_codec: Callable[[], Any] | None = None  # the autoencoder of latents; None: samples are pictures
    conditions: Conditions | None = None  # None: the map is told nothing
    most: int | None = None  # images of either part that are looked at; None: all
    statistics: Moments | None = None  # what Fréchet distances are to; None: the held-out images
    named: Callable[[str], Any] = lambda text: None  # a reward on pictures by its text; None: no such
    kinds: tuple[str, ...] = ()  # what such texts begin with

    # -- draws -------------------------------------------------------------------------------------------------------

    def share(self, cells: Mapping[str, Callable[[], Shard]]) -> Callable[[str], Shard]:
        """The draws of each cell by its name, when all have been made: here, or by any worker, and kept till the end.

        A cell is a function of its name and of the configuration, dear to make; judging it is cheap and done once.
        """
        if self.shards is None:
            return lambda name: cells[name]()
        files = {f"{i:05d}.{re.sub(r'[^0-9A-Za-z.+-]', '_', name)[-160:]}": name for i, name in enumerate(cells)}
        names, shards = {name: file for file, name in files.items()}, self.shards
        shards.begin(list(files), self.shard)
        shards.work(lambda file: cells[files[file]]())

        def get(name: str) -> Shard:
            made = shards.get(names[name], lambda file: cells[files[file]]())
            return Shard({key: value.to(self.model.device) for key, value in made.tensors.items()}, made.facts)

        return get

    # -- pictures ----------------------------------------------------------------------------------------------------

    @property
    def latent(self) -> bool:
        """Are samples latents?"""
        return self.open_codec is not None

    @cached_property
    def codec(self) -> Any:
        """The autoencoder, read when it is first needed; None for pixels."""
        return None if self.open_codec is None else self.open_codec().to(self.model.device)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures of samples (n, *event) -> (n, C, H, W), where the samples are."""
        if not self.latent:
            return x
        return torch.cat([self.codec.decode(part.to(self.model.device)) for part in x.split(PART)]).to(x.device)

    # -- what the map is told ----------------------------------------------------------------------------------------

    def labels(self, n: int, name: str, seed: int) -> Tensor | None:
        """Classes of n samples made of noise: in turn, or (labels=data) those of held-out images."""
        told = self.conditions
        if told is None or not told.conditional:
            return None
        if told.labels != "data":
            return (torch.arange(n) % told.pipe.num_classes).to(self.model.device)
        return self._own(self._order(n, name, seed))

    def cond(self, labels: Tensor | None, n: int) -> Cond:
        """What the map is told of n samples of these classes."""
        return None if self.conditions is None else self.conditions.of(labels, n)

    def cond_of_noise(self, n: int, name: str, seed: int, index: slice = ALL) -> Cond:
        """What it is told of n samples made of noise; of these, those at index."""
        labels = self.labels(n, name, seed)
        return self.cond(None if labels is None else labels[index], len(range(n)[index]))

    def cond_of_images(self, n: int, name: str, seed: int, index: slice = ALL) -> Cond:
        """What it is told of the :meth:`images` of the same arguments, when they are noised: their own classes."""
        chosen = self._order(n, name, seed)[index]
        return self.cond(self._own(chosen), len(chosen))

    def autocast(self) -> AbstractContextManager[Any]:
        """What the network computes in, while it lasts."""
        return nullcontext() if self.conditions is None else self.conditions.pipe.autocast()

    def flow(self, noise: Tensor, steps: int, cond: Cond = None, drift: Drift | None = None) -> Tensor:
        """Noise carried to samples by Euler steps of a drift, by default the map's own."""
        moves = self.model.drift if drift is None else drift
        return integrate(lambda t, x: call_drift(moves, t, x, cond), noise, uniform_grid(steps))

    def _own(self, index: Tensor) -> Tensor | None:
        """The held-out images' classes, as the map is told them."""
        told = self.conditions
        if told is None or not told.conditional:
            return None
        if told.labels == "uniform":
            raise InputError("labels=uniform would noise an image of one class and draw another: labels=data, or none")
        if self.held_out.labels is None or self.held_out.num_classes != told.pipe.num_classes:
            raise InputError(
                f"the map knows {told.pipe.num_classes} classes, the images have {self.held_out.num_classes}: "
                "--set labels=none, or give data of the same classes"
            )
        return self.held_out.labels[index].to(self.model.device)

    # -- data --------------------------------------------------------------------------------------------------------

    def images(self, n: int, name: str, seed: int, index: slice = ALL) -> tuple[Tensor, Tensor | None]:
        """n held-out images, each as often as any other, with their labels; of these, those at index."""
        chosen = self._order(n, name, seed)[index]
        labels = None if self.held_out.labels is None else self.held_out.labels[chosen]
        return self.held_out.tensor(chosen).to(self.model.device), labels

    def _order(self, n: int, name: str, seed: int) -> Tensor:
        order = torch.randperm(len(self.held_out), generator=stream(seed, "held-out", name))
        return order[torch.arange(n) % len(order)]

    def _chosen(self, part: Examples, role: str) -> Tensor:
        """Which images of a part are looked at: all, in their order, or a seeded choice of as many as may be."""
        if self.most is None or len(part) <= self.most:
            return torch.arange(len(part))
        return torch.randperm(len(part), generator=stream(0, "looked-at", role))[: self.most]

    @cached_property
    def seen(self) -> Tensor:
        """Images trained on: those that are looked at."""
        return self.train.tensor(self._chosen(self.train, "train")).to(self.model.device)

    @cached_property
    def unseen(self) -> Tensor:
        """Held-out images: those that are looked at."""
        return self.held_out.tensor(self._chosen(self.held_out, "held-out")).to(self.model.device)

    @cached_property
    def reference(self) -> Tensor:
        """Features of the held-out images."""
        return self.judge.features(self.unseen)

    def everything(self) -> Tensor:
        """All images there are, of those that are looked at."""
        return torch.cat([self.seen, self.unseen])

    def cond_of_everything(self) -> Cond:
        """What the map would be told of them."""
        told, parts = self.conditions, {"train": self.train, "held-out": self.held_out}
        known = [part.labels[self._chosen(part, role)] for role, part in parts.items() if part.labels is not None]
        labels = torch.cat(known).to(self.model.device) if told and told.conditional and len(known) == 2 else None
        return self.cond(labels, len(self.everything()))

    # -- distances ---------------------------------------------------------------------------------------------------

    @property
    def measure(self) -> str:
        """FID where it is that: Inception's features against a statistics file."""
        return "FID" if self.judge.by == "inception" and self.statistics is not None else "Fréchet distance"

    @property
    def compared_with(self) -> str:
        """What Fréchet distances are to."""
        return "held-out images" if self.statistics is None else "the statistics file"

    def extras(self) -> dict[str, object]:
        """What results say beyond those of maps of pixels that are told nothing."""
        more: dict[str, object] = {} if self.statistics is None else {"measure": self.measure, "to": self.compared_with}
        if self.conditions is not None and self.conditions.conditional:
            more["conditional"] = True
        return more

    def frechet(self, x: Tensor) -> float:
        """Fréchet distance of samples to the held-out images, in the judge's features."""
        return self.frechet_of(self.judge.features(x))

    def frechet_of(self, features: Tensor) -> float:
        """The same of features (n, d) that are known."""
        return frechet_distance(features, self.reference if self.statistics is None else self.statistics)

    def floor(self) -> float:
        """The same for the images trained on: what nothing can be expected to beat by much."""
        return self.frechet(self.seen)


class Diversity(NamedTuple):
    """Mean pairwise distance and Vendi score in the judge's features; both depend on how many samples there are."""

    distance: float
    vendi: float


def diversity_of(features: Tensor) -> Diversity:
    """Of features (n, d)."""
    return Diversity(mean_pairwise_distance(features), vendi_score(features))


def finite_samples(x: Tensor) -> tuple[Tensor, int]:
    """The samples (n, *event) that are finite, and how many are not."""
    finite = x.flatten(1).isfinite().all(1)
    return x[finite], int((~finite).sum())


def per_sample(cost: dict[str, float], n: int) -> dict[str, float]:
    """A run's cost per returned sample."""
    shared = {k: cost[k] / n for k in ("forwards", "backwards", "reward_calls", "reward_backwards", "seconds")}
    nfe = sum(shared[k] for k in ("forwards", "backwards", "reward_calls", "reward_backwards"))
    return {**shared, "nfe": nfe}


def cost_of_parts(parts: Sequence[Shard], n: int) -> dict[str, float]:
    """The cost a sample of n that were made in parts."""
    return per_sample({k: sum(part.facts["cost"][k] for part in parts) for k in parts[0].facts["cost"]}, n)


def cost_of(result: SteerResult) -> dict[str, float]:
    """The cost of a returned sample."""
    return per_sample(result.cost, len(result.samples))


class TableRows(TypedDict):
    """A table as results.json and the report hold it: numbers as they are."""

    head: list[str]
    rows: list[list[object]]


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> TableRows:
    """A table of rows."""
    return {"head": list(head), "rows": [list(row) for row in rows]}


def table_of(first: str, rows: Mapping[str, R], columns: Mapping[str, Callable[[R], object]]) -> TableRows:
    """One row a result by its title; a column is its title and what it shows."""
    return table([first, *columns], ([name, *(shown(row) for shown in columns.values())] for name, row in rows.items()))
