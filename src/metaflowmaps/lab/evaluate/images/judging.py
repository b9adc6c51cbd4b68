"""Whom pictures are compared by: a classifier, Inception, or principal components.

Samples of a latent map are decoded before a judge of pictures sees them, PART at a time: what is kept of a sample is
its features, never its picture. Principal components are those of the samples themselves, latents included.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.data import Examples
from metaflowmaps.errors import InputError

COMPONENTS = 32
FITTED = 1000  # images that the components are found from
BATCH = 1024
PART = 64  # pictures decoded at a time


class Judge:
    """Features and classes of samples, from a classifier, Inception or, for want of both, principal components.

    ``by`` names the one that gives the features; None: the classifier, where there is one. ``decode`` makes pictures
    of latents; a classifier of latents sees them as they are.
    """

    def __init__(
        self,
        classifier: nn.Module | None,
        train: Examples,
        by: str | None = None,
        inception: Any = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.classifier, self._train, self.inception, self.decode = classifier, train, inception, decode
        self.by = by or ("components" if classifier is None else "classifier")

    @property
    def space(self) -> str:
        """What images are compared in."""
        if self.by == "inception":
            return "Inception features"
        if self.by == "classifier":
            return "features of the judging classifier"
        return f"{len(self._components[1])} principal components" + " of the latents" * (self.decode is not None)

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
        return torch.cat([self._features(part).cpu() for part in x.split(self._size)])

    def _features(self, x: Tensor) -> Tensor:
        if self.by == "components":
            mean, axes = self._components
            scores: Tensor = (x.cpu().flatten(1) - mean) @ axes.T
            return scores
        if self.by == "inception":
            seen = x if self.decode is None else self.decode(x)
            out: Tensor = self.inception.features(seen)
            return out
        found: Tensor = self._known.features(self._seen(x))  # type: ignore[operator]
        return found

    @torch.no_grad()
    def classes(self, x: Tensor) -> Tensor:
        """(n, *event) -> (n,) int64."""
        return torch.cat([self._known(self._seen(part)).argmax(1).cpu() for part in x.split(self._size)])

    @property
    def _size(self) -> int:
        return BATCH if self.decode is None else PART

    @property
    def _known(self) -> nn.Module:
        if self.classifier is None:
            raise InputError("classes need a judging classifier: train one and give it with --set judge=RUN")
        return self.classifier

    def _seen(self, x: Tensor) -> Tensor:
        """Samples as the classifier takes them."""
        return x if self.decode is None or takes(self.classifier, tuple(x.shape[1:])) else self.decode(x)


def takes(classifier: Any, shape: tuple[int, ...]) -> bool:
    """Is the classifier one of samples of this shape?"""
    return tuple(classifier.event_shape) == shape
