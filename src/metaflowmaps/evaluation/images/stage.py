r"""What every image experiment stands on: the map, the data it was not trained on, and a judge.

The **judge** is a classifier that no sampler ever sees: samples are compared in its features (a Fréchet distance *in
classifier features*, not "FID"), and it names their classes. Rewards use another classifier, the **guide**, of another
architecture and seed: a reward that is raised by fooling the guide does not fool the judge. Without a judge images are
compared in the leading principal components of the training images, and classes are not named.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from metaflowmaps.config import Config
from metaflowmaps.data import Examples
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.meter import Meter
from metaflowmaps.metrics.diversity import mean_pairwise_distance, vendi_score
from metaflowmaps.metrics.frechet import frechet_distance
from metaflowmaps.randomness import stream
from metaflowmaps.sharding import Made, Pieces
from metaflowmaps.steering import SteerResult

COMPONENTS = 32
FITTED = 1000  # images that the components are found from
BATCH = 1024
Say = Callable[[str], None]


class ImageEvalConfig(Config):
    """What every image experiment can be told: whose classifiers, which drift, where the images are now."""

    guide: str | None = None  # None: NAME-guide beside the run, or the shipped one; NAME is that of the data set
    judge: str | None = None
    drift: str | None = None  # None: the run's own drift stage, or the shipped one; "none": the map's own drift alone
    data: str | None = None  # None: where the map was trained from
    seed: int = Field(0, ge=0)


class Judge:
    """Features and classes of images, from a classifier or, for want of one, from principal components."""

    def __init__(self, classifier: nn.Module | None, train: Examples) -> None:
        self.classifier, self._train = classifier, train

    @property
    def space(self) -> str:
        """What images are compared in."""
        if self.classifier is not None:
            return "features of the judging classifier"
        return f"{len(self._components[1])} principal components"

    @cached_property
    def _components(self) -> tuple[Tensor, Tensor]:
        """Mean (p,) and leading axes (k, p) of the training images; eigenvectors of X Xᵀ, n × n, give those of XᵀX."""
        flat = self._train.tensor(slice(FITTED)).flatten(1).double()
        centred = flat - flat.mean(0)
        squares, vectors = torch.linalg.eigh(centred @ centred.T)  # ascending
        kept = squares > 1e-9 * squares[-1]  # fewer images than components, or images that repeat
        axes = (vectors[:, kept] / squares[kept].sqrt())[:, -COMPONENTS:].T @ centred
        return flat.mean(0).float(), axes.float()

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(n, *event) -> (n, d), on the CPU."""
        return torch.cat([self._features(part).cpu() for part in x.split(BATCH)])

    def _features(self, x: Tensor) -> Tensor:
        if self.classifier is None:
            mean, axes = self._components
            scores: Tensor = (x.cpu().flatten(1) - mean) @ axes.T
            return scores
        out: Tensor = self.classifier.features(x)  # type: ignore[operator]
        return out

    @torch.no_grad()
    def classes(self, x: Tensor) -> Tensor:
        """(n, *event) -> (n,) int64."""
        if self.classifier is None:
            raise InputError("classes need a judging classifier: train one and give it with --set judge=RUN")
        return torch.cat([self.classifier(part).argmax(1).cpu() for part in x.split(BATCH)])


@dataclass
class Stage:
    """A map with everything that judges it."""

    model: MetaFlowMap
    train: Examples
    held_out: Examples
    judge: Judge
    guide: nn.Module | None = None
    drift: Any = None  # (t, x) -> b, of a model trained for that alone; None: the map's own
    pieces: Pieces | None = None  # where what is drawn is kept, and shared with other processes; None: nowhere
    shard: int = BATCH  # samples of a cell that is cut by their indices

    def share(self, cells: Mapping[str, Callable[[], Made]]) -> Callable[[str], Made]:
        """The draws of each cell by its name, when all have been made: here, or by any worker, and kept till the end.

        A cell is a function of its name and of the configuration, dear to make; judging it is cheap and done once.
        """
        if self.pieces is None:
            return lambda name: cells[name]()
        files = {f"{i:05d}.{re.sub(r'[^0-9A-Za-z.+-]', '_', name)}": name for i, name in enumerate(cells)}
        names, pieces = {name: file for file, name in files.items()}, self.pieces
        pieces.begin(list(files), self.shard)
        pieces.work(lambda file: cells[files[file]]())

        def get(name: str) -> Made:
            made = pieces.get(names[name], lambda file: cells[files[file]]())
            return Made({key: value.to(self.model.device) for key, value in made.tensors.items()}, made.facts)

        return get

    def images(self, n: int, name: str, seed: int) -> tuple[Tensor, Tensor | None]:
        """n held-out images, each as often as any other, with their labels."""
        order = torch.randperm(len(self.held_out), generator=stream(seed, "held-out", name))
        index = order[torch.arange(n) % len(order)]
        labels = None if self.held_out.labels is None else self.held_out.labels[index]
        return self.held_out.tensor(index).to(self.model.device), labels

    @cached_property
    def reference(self) -> Tensor:
        """Features of the held-out images."""
        return self.judge.features(self.held_out.tensor().to(self.model.device))

    def everything(self) -> Tensor:
        """All images there are."""
        return torch.cat([self.train.tensor(), self.held_out.tensor()]).to(self.model.device)

    def frechet(self, x: Tensor) -> float:
        """Fréchet distance of samples to the held-out images, in the judge's features."""
        return frechet_distance(self.judge.features(x), self.reference)

    def floor(self) -> float:
        """The same for the images trained on: what nothing can be expected to beat by much."""
        return self.frechet(self.train.tensor().to(self.model.device))

    def diversity(self, x: Tensor) -> dict[str, float]:
        """Mean pairwise distance and Vendi score in the judge's features; both depend on how many samples there are."""
        features = self.judge.features(x)
        return {"distance": mean_pairwise_distance(features), "vendi": vendi_score(features)}


def per_sample(cost: dict[str, float], n: int) -> dict[str, float]:
    """A run's cost per returned sample."""
    shared = {k: cost[k] / n for k in ("forwards", "backwards", "reward_calls", "reward_backwards", "seconds")}
    nfe = sum(shared[k] for k in ("forwards", "backwards", "reward_calls", "reward_backwards"))
    return {**shared, "nfe": nfe}


def cost_of_parts(parts: Sequence[Made], n: int) -> dict[str, float]:
    """The cost a sample of n that were made in parts."""
    return per_sample({k: sum(part.facts["cost"][k] for part in parts) for k in parts[0].facts["cost"]}, n)


def cost_of(result: SteerResult) -> dict[str, float]:
    return per_sample(result.cost, len(result.samples))


class Timed:
    """``with Timed(model) as timed: …`` and then ``timed.cost(n)`` per sample."""

    def __init__(self, model: MetaFlowMap) -> None:
        self.meter = Meter(model.network)

    def __enter__(self) -> "Timed":
        self.meter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.meter.__exit__(*error)

    def cost(self, n: int) -> dict[str, float]:
        return per_sample(self.meter.cost(), n)


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> dict[str, Any]:
    """A table as results.json and the report hold it."""
    return {"head": list(head), "rows": [list(row) for row in rows]}
