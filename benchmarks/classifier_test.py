"""A classifier two-sample test (C2ST): how often a classifier tells draws of one law from draws of another.

Its accuracy on points that it was not trained on: .5 where it cannot tell them apart, 1 where it always can.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaflowmaps.random import stream

FOLDS, WIDTH, STEPS = 2, 64, 400


def c2st(x: Tensor, y: Tensor, seed: int = 0) -> float:
    """The accuracy of a perceptron of two hidden layers, in [0, 1], averaged over two folds.

    Args:
        x: (n, d).
        y: (n, d).
        seed: of folds and weights.
    """
    points = torch.cat([x, y])
    points = (points - x.mean(0)) / x.std(0)
    labels = torch.cat([torch.zeros(len(x)), torch.ones(len(y))])
    order = torch.randperm(len(points), generator=stream(seed, "folds"))
    right = []
    for fold in range(FOLDS):
        held = torch.zeros(len(points), dtype=torch.bool)
        held[order[fold::FOLDS]] = True
        classifier = _fitted(points[~held], labels[~held], seed)
        with torch.no_grad():
            said = classifier(points[held])[:, 0] > 0
        right.append(float((said == labels[held].bool()).double().mean()))
    return sum(right) / FOLDS


def _fitted(points: Tensor, labels: Tensor, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(points.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)]
    classifier = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3, weight_decay=1e-4)
    for _ in range(STEPS):
        loss = functional.binary_cross_entropy_with_logits(classifier(points)[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier
