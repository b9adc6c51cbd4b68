"""A mixture whose components have classes."""

import torch
from torch import Tensor

from metaflowmaps.laws.mixture import GaussianMixture


class LabelledLaw:
    """A law of (x_1, y): a component's label is its class; ``classes`` are the laws p(x_1 | y)."""

    def __init__(self, law: GaussianMixture, labels: list[int]) -> None:
        self.num_classes = len(set(labels))
        classes = [torch.tensor([label == y for label in labels]) for y in range(self.num_classes)]
        self.law, self.weights = law, torch.stack([law.weights[mine].sum() for mine in classes])
        self.classes = tuple(  # p(x_1 | y)
            GaussianMixture(law.means[mine], law.covariances[mine], law.weights[mine] / weight)
            for mine, weight in zip(classes, self.weights, strict=True)
        )

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """x_1 ~ p_1: (n, d)."""
        return self.law.sample(n, generator)

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x_1 ~ p_1 (n, d) and y ~ p(y | x_1) (n,)."""
        x_1 = self.law.sample(n, generator)
        evidence = torch.stack([law.log_prob(x_1.double()) for law in self.classes])
        edges = (self.weights.log()[:, None] + evidence).softmax(0).cumsum(0)[:-1]
        return x_1, (torch.rand(n, generator=generator, dtype=torch.float64) > edges).sum(0)
